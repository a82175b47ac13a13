"""Where answers go, and how a run behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchvlm.config.choices import OnMismatch


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where and how results are written."""

    dir: str = "outputs/${data.name}-${task.name}"
    """Folder of the output, also in an object store (`s3://bucket/folder`, `gs://bucket/folder`);
    run the same command again to finish an interrupted job."""
    rows_per_shard: int = 4096
    """Most rows of one part; fixed once an output folder exists."""
    flush_every_s: float = 30.0
    """Finished rows of an unfinished shard reach the disk at least this often, in seconds."""
    flush_every_rows: int | None = None
    """... and whenever this many rows of one shard are waiting; null: by the clock alone."""
    on_mismatch: OnMismatch = OnMismatch.error
    """Where `dir` holds the answers to another question: `error` refuses, `new_folder` writes to
    `dir-FINGERPRINT` beside it, `overwrite` deletes the old answers once the model has loaded."""
    keep_columns: list[str] = field(default_factory=list)
    """Input columns copied to the output unchanged; null where a file of the input has no such
    column."""
    token_ids: bool = False
    """Add the column `token_ids` with each answer's token ids."""


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Which rows with an error are computed again (`retry=none|transient`)."""

    errors: list[str] = field(default_factory=list)
    """Error types; their rows in finished parts and segments are answered anew and superseded."""
    invalid_json: int = 0
    """Times that a row whose answer has not the form asked for is answered again in the same run:
    with twice the tokens where it was cut, else with another seed and a temperature of 0.5 at
    least. Their images are kept meanwhile, `batching.max_window_bytes` of them at most."""
    max_attempts: int = 3
    """A row that was tried this often is left as it is."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the work is spread. Changes speed, never an answer."""

    num_tasks: int = 1
    """Slices of the whole job, such as SLURM array elements."""
    task_id: int = 0
    """Which slice this process computes: shards with `index % num_tasks == task_id`."""
    num_workers: int | None = None
    """Processes that prepare samples; 0: in this process; null: by the number of cores."""
    num_threads: int | None = None
    """Compute threads of the engine on a CPU; null: torch's choice."""
    sample_timeout_s: float = 60.0
    """Preparing one row may take this long, in seconds; needs `num_workers` above 0."""
    log_every_s: float = 10.0
    """Seconds between progress lines where stderr is no terminal."""
    log_json: bool = False
    """Write each log line as a JSON object, progress with its numbers; no bar is drawn."""
    max_error_rate: float | None = None
    """A share of failed rows above this ends the run, exit code 3; null: never."""
    max_error_rate_after: int = 100
    """Rows that must be done or with the engine before `max_error_rate` is looked at."""
    stall_timeout_s: float | None = 1800.0
    """Without a finished row for so long, in seconds, the run prints where every thread is, brings
    finished rows to disk and exits with 75; null: wait forever."""
    grace_s: float = 30.0
    """From a signal to the exit, in seconds, whatever the model is doing then."""
    walltime_margin_s: float = 90.0
    """With less of the SLURM job's time left, in seconds, or less than a quarter of it, no further
    row is begun; the run ends with 75 when those at the engine are answered. 0: never by itself."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the counts of a running job also go. Each process is a run of its own there."""

    trackers: list[str] = field(default_factory=list)
    """`tensorboard`, `wandb`: through accelerate's trackers; each needs its package."""
    project: str = "batchvlm"
    """wandb: the project."""
    dir: str | None = None
    """Folder for what trackers write; null: `_batchvlm/tracking` in the output folder. Set it where
    that is in an object store."""
    prometheus_file: str | None = None
    """File in the Prometheus text format, for node_exporter's textfile collector (`*.prom`). Of a
    job of several processes, each adds its task and rank to the name."""
    every_s: float = 10.0
    """Seconds between two sets of counts."""

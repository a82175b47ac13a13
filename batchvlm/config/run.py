"""The output, and how a run behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchvlm.config.choices import OnMismatch


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """How results are written."""

    dir: str = "outputs/${data.name}-${task.name}"
    """Output folder, which may be in an object store (`s3://bucket/folder`, `gs://bucket/folder`).
    Run the same command again to resume an interrupted job."""
    rows_per_shard: int = 4096
    """Maximum number of rows in a shard. Fixed once the output folder exists."""
    flush_every_s: float = 30.0
    """Maximum time between flushes of finished rows of unfinished shards, in seconds."""
    flush_every_rows: int | None = None
    """Also flush when this many finished rows of one shard are waiting; null: by time only."""
    on_mismatch: OnMismatch = OnMismatch.error
    """What to do if `output.dir` holds a run with another fingerprint or other fixed settings
    (`rows_per_shard`, `keep_columns`, ...). `error`: end the run. `new_folder`: write to
    `dir-FINGERPRINT` beside it. `overwrite`: delete the old answers once the model has loaded."""
    keep_columns: list[str] = field(default_factory=list)
    """Input columns to copy to the output unchanged. They are null for input files without the
    column."""
    token_ids: bool = False
    """Add the column `token_ids` with the token ids of the answer."""


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Which rows are computed again (`retry=none|transient`)."""

    errors: list[str] = field(default_factory=list)
    """Error types to retry. Their rows in finished parts and segments are computed again and
    replaced."""
    invalid_json: int = 0
    """Maximum retries, in the same run, of an answer without the requested form: with twice the
    tokens if it was cut off, else with another seed and a temperature of at least 0.5. Samples are
    kept for this up to `batching.max_window_bytes`; rows beyond that are not retried."""
    max_attempts: int = 3
    """A row that was tried this often is not computed again."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the work is distributed. Changes speed, never an answer."""

    num_tasks: int = 1
    """Number of slices of the job, such as SLURM array elements."""
    task_id: int = 0
    """Slice that this process computes: the shards with `index % num_tasks == task_id`."""
    num_workers: int | None = None
    """Number of processes that prepare samples. 0: the main process prepares them. null: one for
    each core but one, at most 16; the ranks of a machine share its cores."""
    num_threads: int | None = None
    """Number of compute threads of the engine on a CPU; null: the default of torch."""
    sample_timeout_s: float = 60.0
    """Timeout for preparing one row, in seconds. Requires `num_workers` above 0."""
    log_every_s: float = 10.0
    """Seconds between progress lines if stderr is not a terminal."""
    log_json: bool = False
    """Write each log line as a JSON object, with progress as numbers. Disables the progress bar."""
    max_error_rate: float | None = None
    """End the run with exit code 3 if the share of failed rows exceeds this; null: never."""
    max_error_rate_after: int = 100
    """Rows that must be finished or in the engine before `max_error_rate` is checked."""
    stall_timeout_s: float | None = 1800.0
    """If no row is finished for this many seconds, print the stack of every thread, flush and exit
    with 75; null: never."""
    grace_s: float = 30.0
    """Maximum time from a signal to the exit, in seconds."""
    walltime_margin_s: float = 90.0
    """When the SLURM job has fewer seconds left, start no further row, finish those in the engine
    and exit with 75. At most a quarter of the time left at the start; 0: no deadline."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where to send metrics of a running job. Each process is a separate run there."""

    trackers: list[str] = field(default_factory=list)
    """`tensorboard`, `wandb`, through the trackers of accelerate. Each needs its package."""
    project: str = "batchvlm"
    """wandb: name of the project."""
    dir: str | None = None
    """Folder for the files of trackers; null: `_batchvlm/tracking` in the output folder. Required
    with `trackers` if the output folder is in an object store."""
    prometheus_file: str | None = None
    """File in the Prometheus text format, for node_exporter's textfile collector (`*.prom`). In a
    job of several processes, each adds its task and rank to the name."""
    every_s: float = 10.0
    """Seconds between updates."""

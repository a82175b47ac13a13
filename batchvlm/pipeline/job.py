"""A job checked against its input and its output folder, before any model is loaded."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from batchvlm.config import (
    DataConfig,
    EngineName,
    JobConfig,
    OnMismatch,
    SourceKind,
    TaskConfig,
    TaskName,
    sent_as,
)
from batchvlm.errors import ConfigError, FingerprintError, InputError, OutputError
from batchvlm.forms.forms import run_choices, run_form
from batchvlm.identity import (
    answer_identity,
    output_layout,
    package_versions,
    pin_model,
    served_model,
)
from batchvlm.output.bucket import is_url
from batchvlm.output.fingerprint import fingerprint
from batchvlm.output.folder import OutputFolder
from batchvlm.output.parts import Failures, failures_in_parts, shards_to_retry
from batchvlm.output.run_file import RunFile, differs, find_run, read_run
from batchvlm.output.schema import kept_fields, output_schema
from batchvlm.output.status import JobStatus, status
from batchvlm.output.typed import Parsed, parsed_column
from batchvlm.plan import plan_shards
from batchvlm.preprocess.preprocessor import PreprocessSpec
from batchvlm.prompts.builder import PromptBuilder
from batchvlm.records import FormKind, InputFile, Shard
from batchvlm.settings.compose import to_plain
from batchvlm.sources import Source, check_columns, open_source
from batchvlm.sources.files import is_hidden
from batchvlm.tasks import Task, open_task

if TYPE_CHECKING:
    from batchvlm.fetch.ahead import Fetcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked configuration with the source, prompts, task and output folder of its run."""

    cfg: JobConfig
    source: Source
    prompts: PromptBuilder
    prompt_columns: tuple[str, ...]
    task: Task
    folder: OutputFolder
    run: RunFile
    schema: Any
    """Arrow schema of the output."""
    parsed: Parsed
    """The output column `parsed` of typed answers."""
    is_overwriting: bool = False
    """Whether the folder still holds another run, which is replaced once the model has loaded."""

    @property
    def key(self) -> str:
        """Identifies the job among those of one launch, such as a sweep."""
        cfg = self.cfg
        return fingerprint(
            {
                "run": self.run.fingerprint,
                "folder": str(self.folder.root),
                "task": [cfg.runtime.task_id, cfg.runtime.num_tasks],
                "retry": to_plain(cfg.retry),
            }
        )

    def failures(self, indices: Collection[int]) -> Failures:
        """The failed rows in parts of these shards.

        Raises:
            OutputError: as for `failures_in_parts`.
        """
        if self.is_overwriting:
            return Counter()
        return failures_in_parts(self.folder, self.run.plan, self.run.fingerprint, indices)

    def finished_shards(
        self, shards: Sequence[Shard], failures: Failures | None = None
    ) -> frozenset[int]:
        """The indices of the given shards that have nothing left to compute.

        Args:
            failures: those in parts of these shards; None to look for them if they are needed.
        """
        if self.is_overwriting:
            return frozenset()
        folder, retry, num_shards = self.folder, self.cfg.retry, len(self.run.plan)
        indices = [shard.index for shard in shards]
        finished = folder.finished_shards(num_shards, indices)
        if not retry.errors:
            return finished
        wanted = finished.intersection(indices)
        if failures is None:
            failures = self.failures(wanted)
        return finished - shards_to_retry(folder, failures, wanted, retry)

    def preprocess_spec(self) -> PreprocessSpec:
        """The settings that worker processes need to make samples."""
        cfg = self.cfg
        return PreprocessSpec(
            model=cfg.model,
            task=cfg.task,
            columns=cfg.data.columns,
            generation=cfg.generation,
            image_root=self.source.image_root,
            max_source_pixels=cfg.data.max_source_pixels,
            max_image_bytes=cfg.data.max_image_bytes,
            device=cfg.engine.device,
            sent_as=sent_as(cfg.engine),
        )

    def open_fetcher(self) -> Fetcher:
        """Open the fetcher of images that rows name by URL, which `data.allow_remote` allows."""
        # Imported here: its dependencies are an optional extra.
        from batchvlm.fetch.addresses import Allowed
        from batchvlm.fetch.ahead import Fetcher
        from batchvlm.fetch.client import FetchLimits

        data = self.cfg.data
        return Fetcher(
            Allowed(tuple(data.allow_hosts)),
            FetchLimits(
                timeout_s=data.fetch_timeout_s,
                attempts=data.fetch_attempts,
                concurrency=data.fetch_concurrency,
                max_image_bytes=data.max_image_bytes,
            ),
            self.prompts.addresses,
        )


def open_job(cfg: JobConfig) -> Job:
    """Check a job against its input and its output folder; nothing is loaded.

    Raises:
        ConfigError: the settings do not fit the input, or the folder holds another run.
        InputError: the input cannot be read, or has no rows.
        ModelError: there is no such model.
        OutputError: the output folder cannot be written.
    """
    _warn_of_backslashes(cfg)
    _refuse_output_in_input(cfg.data, cfg.output.dir)
    source = open_source(cfg.data)
    prompts = PromptBuilder(task=cfg.task, columns=cfg.data.columns, generation=cfg.generation)
    needed = prompts.needed_columns()
    kept = {name: "output.keep_columns" for name in cfg.output.keep_columns}
    named = {cfg.data.columns.id: "data.columns.id"} if cfg.data.columns.id else {}
    check_columns(source.schema, kept | named | needed)
    if cfg.data.source is not SourceKind.jsonl:  # JSON Lines have no declared types
        prompts.check_types(source.schema)
    parsed = _parsed_column(cfg.task)
    schema = _output_schema(cfg, source, parsed)
    if cfg.task.scores:
        run_choices(cfg.task.output)
    task = open_task(cfg.task)
    folder = OutputFolder(cfg.output.dir)
    folder.check_writable()
    files = source.files(list(named | needed), list(kept))
    plan = plan_shards(files, rows_per_shard=cfg.output.rows_per_shard, max_rows=cfg.data.max_rows)
    if not plan:
        raise InputError(f"data.path={cfg.data.path} holds no rows")
    is_served = cfg.engine.name is EngineName.endpoint
    cfg = replace(
        cfg,
        model=served_model(cfg.model, cfg.engine.endpoint) if is_served else pin_model(cfg.model),
    )
    folder, run = _find_run(folder, cfg, files, plan)
    there = read_run(folder)
    return Job(
        is_overwriting=there is not None and bool(differs(there, run)),
        cfg=cfg,
        source=source,
        prompts=prompts,
        prompt_columns=tuple(needed),
        task=task,
        folder=folder,
        run=run,
        schema=schema,
        parsed=parsed,
    )


_SAVED = ("state.json", "dataset_dict.json")
"""A folder made by `save_to_disk` has one of these files, which name its data files."""


def _refuse_output_in_input(data: DataConfig, out: str) -> None:
    """Refuse an output folder whose parts a rerun would read as input.

    Raises:
        ConfigError: it is the input's folder, or in it.
    """
    if data.source is SourceKind.parquet:
        hint = "name a folder elsewhere, or in _out there"
    elif data.source is SourceKind.hf and not any(
        os.path.isfile(os.path.join(data.path, name)) for name in _SAVED
    ):
        hint = "name a folder elsewhere"
    else:
        return
    if not (is_url(data.path) or os.path.isdir(data.path)):
        return
    root, inner = (
        path.rstrip("/") if is_url(path) else os.path.realpath(path) for path in (data.path, out)
    )
    if inner == root or (
        inner.startswith(f"{root}/") and not is_hidden(inner.removeprefix(f"{root}/"))
    ):
        raise ConfigError(
            f"output.dir={out} is in data.path={data.path}, all of whose data files are input",
            hint=hint,
        )


def _warn_of_backslashes(cfg: JobConfig) -> None:
    """Warn of a `\\n` that stays two characters: neither shell nor Hydra makes it a line break."""
    texts = {
        **{f"task.{key}": getattr(cfg.task, key) for key in ("prompt", "system", "answer_prefix")},
        "generation.stop": " ".join(cfg.generation.stop),
    }
    for key, text in texts.items():
        # In an expression, as {{ "\n" }}, it is a line break.
        if r"\n" in re.sub(r"\{[{%].*?[%}]\}", "", text or "", flags=re.DOTALL):
            log.warning(
                r"%s has \n as two characters, a backslash and an n; for a line break, type one "
                "inside the quotes",
                key,
            )


def _parsed_column(cfg: TaskConfig) -> Parsed:
    """The column of typed answers, for the form of answers that the run asks for."""
    form = run_form(cfg.output) if cfg.name is TaskName.extract else None
    is_by_row = bool(cfg.output.json_schema_column)
    if cfg.output.choice_column:
        # The rows' choices are texts, and each row may have its own.
        is_by_row |= form is not None and form.kind is not FormKind.CHOICE
        form = None
    parsed = parsed_column(form, is_by_row=is_by_row)
    if parsed.notes:
        log.info("stored as JSON text in parsed: %s", ", ".join(parsed.notes[:20]))
    return parsed


def _output_schema(cfg: JobConfig, source: Source, parsed: Parsed) -> Any:
    task, gen = cfg.task, cfg.generation
    return output_schema(
        kept_fields(source.schema, cfg.output.keep_columns),
        generated_texts=gen.num_return_sequences > 1
        or bool(gen.columns.num_return_sequences)
        or task.name is TaskName.dialog,
        token_ids=cfg.output.token_ids,
        logprobs=gen.logprobs or bool(gen.columns.logprobs),
        scores=task.scores,
        constraint=task.name is TaskName.extract or bool(task.output.json_schema_column),
        parsed=parsed.type,
    )


def _find_run(
    folder: OutputFolder, cfg: JobConfig, files: Sequence[InputFile], plan: list[Shard]
) -> tuple[OutputFolder, RunFile]:
    """The run to continue or to start, and its folder; `on_mismatch` decides if another is there.

    Raises:
        FingerprintError: the folder's run has another identity or layout.
    """
    identity, layout = answer_identity(cfg, files), output_layout(cfg)

    def find(folder: OutputFolder) -> RunFile:
        return find_run(
            folder,
            identity=identity,
            layout=layout,
            settings=to_plain(cfg),
            packages=package_versions(),
            plan=plan,
            overwrite=cfg.output.on_mismatch is OnMismatch.overwrite,
        )

    try:
        return folder, find(folder)
    except FingerprintError as error:
        if cfg.output.on_mismatch is not OnMismatch.new_folder:
            raise
        other = OutputFolder(f"{folder.root}-{fingerprint(identity)}")
        try:
            run = find(other)
        except FingerprintError:  # a run of the same identity with another layout
            both = {"identity": identity, "layout": layout}
            other = OutputFolder(f"{folder.root}-{fingerprint(both)}")
            run = find(other)
        log.warning("%s; writing to %s", error.message, other)
        return other, run


def announce_overwriting(job: Job) -> None:
    """Warn, before the model is loaded, what `output.on_mismatch=overwrite` will delete.

    Raises:
        FingerprintError: a live process is working on the run in the folder.
    """
    found: JobStatus | None = None
    try:
        found = status(job.folder)
    except OutputError as error:
        log.warning("%s", error)
    # Read after the status: another rank of this launch may have replaced the run by now, and the
    # live processes would be those of this launch.
    there = read_run(job.folder)
    if there is None or not (changes := "; ".join(differs(there, job.run))):
        return
    if found is not None and found.num_live:
        raise FingerprintError(
            f"{job.folder} holds the answers of another job: {changes}; "
            "output.on_mismatch=overwrite deletes nothing while processes are at work on it, and "
            f"{found.num_live} are",
            hint="end them first (one that was killed counts for a minute), or name another "
            "output.dir; batchvlm status tells more",
        )
    rows = "its rows" if found is None else f"{found.num_done:,} rows that it has answered"
    log.warning(
        "%s holds the answers of another job: %s; once the model has loaded, "
        "output.on_mismatch=overwrite deletes %s",
        job.folder,
        changes,
        rows,
    )

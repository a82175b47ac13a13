"""README.md of the output folder, which is also the dataset card on the Hub.

The card may be published, so it contains no passwords and no paths of this machine.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import DatasetCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from batchvlm import __version__
from batchvlm.config import JobConfig, TaskName
from batchvlm.errors import OutputError
from batchvlm.output.folder import OutputFolder
from batchvlm.output.run_file import RunFile
from batchvlm.report.outputs import Output, job_config, open_output
from batchvlm.report.redact import redact, redact_all

log = logging.getLogger(__name__)

_MAX_PARTS = 5000
"""With more parts a run writes no card at its end: counting all rows would take too long."""

MARK = "<!-- Written by batchvlm, which writes it anew; without this line the file is yours. -->"
_UNFINISHED = "The job was not finished when this was written"
_CATEGORIES = {
    TaskName.caption: "image-to-text",
    TaskName.vqa: "visual-question-answering",
    TaskName.extract: "image-text-to-text",
    TaskName.dialog: "image-text-to-text",
}
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
MEANINGS = {
    "id": "the row's own key, else `file:row`",
    "row_index": "position in the input",
    "source_file": "file of the input",
    "status": "`success` or `error`",
    "error_type": "why there is no answer",
    "error_message": "the same in a sentence",
    "attempts": "how often the row was tried",
    "generated_text": "the answer; null where there is none",
    "generated_texts": "all answers, of a dialog turn by turn",
    "finish_reasons": "finish reason of each of `generated_texts`",
    "token_ids": "token ids of the answer",
    "logprobs": "log-probability of each of these ids",
    "parsed": "the answer, typed by its schema, or as JSON text",
    "json_valid": "whether the answer has the requested form",
    "constraint": "how far decoding enforced the form: `strict`, `lenient`, `xgrammar`, or `none`",
    "scores": "of each choice: log-probability, and probability among the row's choices",
    "finish_reason": "`stop`, `length` (cut at the limit), or `repetition`",
    "prompt_tokens": "tokens of the prompt, those of images included",
    "image_tokens": "tokens of images, included in prompt_tokens",
    "completion_tokens": "tokens of all answers",
    "num_images": "images of the row",
    "image_sizes": "in pixels, as the model saw them",
    "model": "which model answered",
    "fingerprint": "digest of all that the answer depends on",
    "run_id": "process that wrote the row",
    "latency_s": "seconds from the start of the row's batch to its answer",
}
# Only settings that answers depend on; others may hold paths of this machine.
_GROUPS = ("model", "generation")


def write_first_card(folder: OutputFolder, run: RunFile, schema: pa.Schema) -> None:
    """Write a card without row counts, unless the folder has one of this run or of a user.

    With the card's header, `load_dataset` can read `data` while the job runs. Never raises.
    """
    path = folder.root / "README.md"
    try:
        old = folder.read_bytes(path)
        if old is not None and (MARK.encode() not in old or run.fingerprint.encode() in old):
            return
        text = card(Output(folder=folder, run=run, parts=[], schema=schema))
        data = text.encode("utf-8", "replace")
        folder.commit_file(lambda file: file.write(data), path, replace=old is not None)
    except Exception as error:
        log.warning("no dataset card yet: %s", error)


def complete_card(folder: OutputFolder) -> None:
    """Write the card if a finished job has none or an unfinished one. Never raises.

    A process that is killed after it wrote the last part leaves a folder without a finished card.
    """
    try:
        old = folder.read_bytes(folder.root / "README.md")
    except OutputError as error:
        log.warning("no dataset card: %s", error)
        return
    if old is None or (MARK.encode() in old and _UNFINISHED.encode() in old):
        write_finished_card(folder)


def write_finished_card(folder: OutputFolder) -> None:
    """Write the card if every shard is finished. Never raises."""
    try:
        output = open_output(folder.root)
        if len(output.run.plan) > _MAX_PARTS:
            log.info("%d parts: batchvlm report writes the dataset card", len(output.run.plan))
        elif len(folder.finished_shards(len(output.run.plan))) == len(output.run.plan):
            write_card(output)
    # The answers are on disk, so an error here must not fail the run.
    except Exception as error:
        log.warning("no dataset card: %s", error)


def write_card(output: Output) -> Path | None:
    """Write README.md into the output folder, unless it has one without `MARK`.

    Returns:
        The path; None if nothing was written because the file is a user's.

    Raises:
        OutputError: a part cannot be read, or the folder cannot be written.
    """
    path = output.folder.root / "README.md"
    old = output.folder.read_bytes(path)
    if old is not None and MARK.encode() not in old:
        return None
    text = card(output).encode("utf-8", "replace")
    if old != text:
        output.folder.commit_file(lambda file: file.write(text), path)
    return path


def card(output: Output, *, features: Sequence[dict[str, Any]] | None = None) -> str:
    """Return the card as Markdown with its YAML header.

    Args:
        features: the columns in the form of a card's `dataset_info`; None to leave them out, so
            that `datasets` infers them.
    """
    cfg = job_config(output.run)
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    tokens = 0
    for batch in output.batches(["status", "error_type", "completion_tokens"]):
        for counts, name in ((statuses, "status"), (errors, "error_type")):
            for item in pc.value_counts(batch.column(name).drop_null()):
                counts[item["values"].as_py()] += item["counts"].as_py()
        tokens += pc.sum(batch.column("completion_tokens")).as_py() or 0
    num_rows = statuses.total()
    template = _environment().get_template("card.md.jinja")
    return template.render(
        header=_header(output, cfg, num_rows, features),
        mark=MARK,
        name=_title(output, cfg),
        cfg=cfg,
        model=redact(output.model),
        input=_input_name(cfg),
        num_rows=num_rows,
        num_planned=output.num_planned,
        unfinished=_UNFINISHED,
        statuses=statuses,
        errors=errors.most_common(),
        tokens=tokens,
        columns=[(f.name, _type_name(f.type), _meaning(f.name)) for f in output.schema],
        settings=_settings(output),
        run=output.run,
        version=output.run.packages.get("batchvlm", __version__),
    )


def _title(output: Output, cfg: JobConfig) -> str:
    return f"{redact(cfg.data.name)}: {cfg.task.name.value} by {redact(output.model)}"


def _header(
    output: Output, cfg: JobConfig, num_rows: int, features: Sequence[dict[str, Any]] | None
) -> str:
    size = next((name for limit, name in _SIZES if num_rows < limit), "n>1T")
    about: dict[str, Any] = {}
    if features is not None:
        splits = [{"name": "train", "num_examples": num_rows}]
        about["dataset_info"] = {"features": features, "splits": splits}
    data = DatasetCardData(
        pretty_name=_title(output, cfg),
        task_categories=[_CATEGORIES[cfg.task.name]],
        size_categories=["1B<n<10B" if num_rows >= 10**9 else size],
        tags=["batchvlm", "synthetic", "image", "text"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
        **about,
    )
    return str(data.to_yaml())


def _input_name(cfg: JobConfig) -> str:
    path = cfg.data.path
    # Hub names and URLs are valid everywhere; of a path, keep only the last component.
    is_public = "://" in path or (cfg.data.source.value == "hf" and not Path(path).exists())
    return redact(path) if is_public else PurePath(path).name


def _settings(output: Output) -> list[tuple[str, str]]:
    shown = redact_all({name: output.run.settings.get(name, {}) for name in _GROUPS})
    defaults: tuple[Any, ...] = (None, {}, [], "")
    return [
        (f"{group}.{name}", str(PurePath(value).name if _is_local(name, value) else value))
        for group, values in shown.items()
        for name, value in values.items()
        if value not in defaults and name not in ("columns", "trust_remote_code")
    ]


def _is_local(name: str, value: Any) -> bool:
    return name == "path" and (PurePath(str(value)).is_absolute() or Path(str(value)).exists())


def _meaning(name: str) -> str:
    return MEANINGS.get(name, "as in the input")


def _type_name(kind: pa.DataType) -> str:
    return str(kind).replace("element: ", "").replace("item: ", "")


def _environment() -> Environment:
    # Autoescape is for HTML; templates pass external text through `cell`, `code` or `fenced`.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["code"] = _code
    environment.filters["fenced"] = _fenced
    return environment


def _cell(value: Any) -> str:
    """Return text for a line of Markdown or a table cell, with all markup escaped."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>#!|~&$])", r"\\\1", text)


def _code(value: Any) -> str:
    """Return text as inline code, with backticks and bars replaced."""
    return f"`{' '.join(str(value).split()).translate({ord('`'): chr(39), ord('|'): '/'})}`"


def _fenced(value: Any) -> str:
    """Return text as a code block with a fence longer than any in the text."""
    runs: Sequence[str] = re.findall(r"`+", str(value))
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    return f"{fence}text\n{value}\n{fence}"

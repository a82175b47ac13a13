"""Print a summary at the end of a run: counts, rates, some rows, and the output's path."""

from __future__ import annotations

import logging
import os
import shutil
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchvlm.pipeline.pipeline import Summary
from batchvlm.words import counted, number_of, printable

log = logging.getLogger(__name__)

_NUM_ANSWERS = 5
_NUM_ERRORS = 5


def print_summary(summary: Summary) -> None:
    """Print the summary of a run to stdout.

    Raises:
        OutputError: one of the parts whose rows are shown cannot be read.
    """
    metrics = summary.metrics
    print()
    print(_headline(summary))
    for word, errors in (("errors", metrics.errors), ("earlier", metrics.found_errors)):
        if errors:
            print(f"{word:<8} {counted(errors)}")
    if summary.num_given_up:
        were = "was" if summary.num_given_up == 1 else "were"
        print(
            f"retry    {number_of(summary.num_given_up, 'row')} {were} left: tried "
            f"{number_of(summary.max_attempts, 'time')} already (retry.max_attempts)"
        )
    if metrics.constraints:
        print(f"{'guided':<8} {counted(metrics.constraints)}")
    engine = metrics.engine
    if metrics.num_rows:
        print(
            f"speed    {metrics.rows_per_s:,.1f} rows/s, "
            f"{metrics.completion_tokens_per_s:,.0f} tokens/s; "
            f"{metrics.start_s:.1f} s to load, {metrics.run_s:.1f} s to answer"
        )
        batches = number_of(engine.num_batches, "batch")
        print(
            f"engine   {batches}, {engine.padding_share:.0%} padding, "
            f"{metrics.wait_share:.0%} of the time waiting for data"
        )
    _print_rows(summary)
    if metrics.num_rows and not metrics.num_success:
        ((kind, count),) = metrics.errors.most_common(1)
        log.warning(
            "no row was answered: %d of %d with %s, such as %s",
            count,
            metrics.num_rows,
            kind,
            printable(metrics.examples.get(kind, "")),
        )
    folder = summary.folder
    data = folder.address(folder.data)
    if folder.is_local:
        data = _short(os.path.abspath(data))
    print(f"output   {data}/*.parquet")
    print(f'read it  datasets.load_dataset("parquet", data_dir="{data}")')


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _headline(summary: Summary) -> str:
    metrics = summary.metrics
    share = "" if summary.num_mine == summary.num_rows else f" of {summary.num_rows:,}"
    num_errors = metrics.found_errors.total()
    with_errors = f", {num_errors:,} of them errors" if num_errors else ""
    found = f", {summary.num_found:,} were there already" if summary.num_found else ""
    return (
        f"rows     {summary.num_mine:,}{share}: {metrics.num_success:,} answered, "
        f"{number_of(metrics.num_errors, 'error')}{found}{with_errors}"
    )


def _print_rows(summary: Summary) -> None:
    rows = list(islice(_read_rows(summary), 200))
    answers = [row for row in rows if row["status"] == "success"][:_NUM_ANSWERS]
    errors = [row for row in rows if row["status"] == "error"][:_NUM_ERRORS]
    if not rows:
        return
    print()
    # At least 4, so that a shortened id has room for its three dots.
    width = max(4, min(max(len(row["id"]) for row in answers + errors), 32))
    for row in answers:
        _print_row(row["id"], row["generated_text"], width)
    for row in errors:
        _print_row(row["id"], f"[{row['error_type']}] {row['error_message']}", width)
    print()


def _read_rows(summary: Summary) -> Any:
    columns = ["id", "status", "error_type", "error_message", "generated_text"]
    for part in summary.folder.parts(summary.num_shards):
        try:
            with summary.folder.open(part.path) as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=columns):
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise summary.folder.damaged(part.path, error) from error


def _print_row(name: str, text: str, width: int) -> None:
    room = max(20, shutil.get_terminal_size((100, 24)).columns - width - 4)
    print(f"  {_shorten(name, width):<{width}}  {_shorten(text, room)}")


def _shorten(text: str, width: int) -> str:
    """Return text as one line of at most `width` characters."""
    # Text of models and files must not send control characters to the terminal.
    line = " ".join(printable(text).split())
    return line if len(line) <= width else f"{line[: width - 3].rstrip()}..."

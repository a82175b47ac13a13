"""`batchvlm report`: one HTML page about an output folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchvlm.config import JobConfig
from batchvlm.report.gallery import gallery
from batchvlm.report.inputs import Inputs, open_inputs
from batchvlm.report.outputs import Output, Process, job_config, read_processes
from batchvlm.report.page import render, share
from batchvlm.report.plots import (
    Plot,
    check_library,
    curve_plots,
    latency_plot,
    seconds,
    token_plot,
)
from batchvlm.report.redact import redact, redact_all
from batchvlm.report.time_line import TimeLine, read_time_line
from batchvlm.report.totals import Totals, Values, read_totals
from batchvlm.words import counted, number_of

_NUM_VALUES = 10
_FREQUENT = 0.005
"""Answers are only listed if the most frequent one has at least this share of them."""
_TITLES = {
    "prompt_tokens": "Prompt tokens",
    "image_tokens": "Image tokens",
    "completion_tokens": "Answer tokens",
}
_SORTS = (
    ("row", "input order"),
    ("id", "id"),
    ("error", "error type"),
    ("length", "length of the answer"),
    ("tokens", "answer tokens"),
    ("promptTokens", "prompt tokens"),
    ("seconds", "latency"),
)


@dataclass(frozen=True, kw_only=True)
class ValueTable:
    """A table of values with their counts or shares."""

    title: str
    note: str
    counts: Sequence[tuple[str, float]]
    num: float
    is_share: bool = False
    """Whether `counts` are shown as percentages of `num`."""


def report(
    output: Output,
    *,
    num_sampled: int,
    num_failed: int,
    seed: int = 0,
    images: bool = True,
    input_path: str | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        num_sampled: number of rows to sample from all.
        num_failed: number of rows to sample from those with an error.
        seed: seed of the samples.
        images: whether to make thumbnails.
        input_path: the input's present path, in place of `data.path`; None if it has not moved.

    Raises:
        BatchvlmError: matplotlib is missing, or a part cannot be read.
    """
    check_library()
    cfg = job_config(output.run)
    totals = read_totals(output, num_sampled=num_sampled, num_failed=num_failed, seed=seed)
    chosen = sorted({*totals.sample.rows, *totals.failed.rows})
    inputs = open_inputs(output.run, cfg, path=input_path)
    rows = gallery(output, chosen, inputs, images=images)
    line = read_time_line(output.folder)
    processes = read_processes(output.folder)
    curves = curve_plots(line) if line is not None else []
    distributions = list(_distributions(totals))
    errors = [(kind, count, _examples(totals, kind)) for kind, count in totals.errors.most_common()]
    answers = list(_answers(totals))
    work = _time_shares(processes)
    prompt_label, prompt = _prompt_of(cfg)
    sections = [("summary", "Summary", True), ("speed", "Speed", bool(curves or work))]
    sections += [("lengths", "Tokens and latency", bool(distributions))]
    sections += [("errors", "Errors", bool(errors)), ("answers", "Answers", bool(answers))]
    sections += [("rows-head", "Rows", True)]
    return render(
        "report.html.jinja",
        title=f"{cfg.data.name}, {cfg.task.name.value}, by {redact(output.model)}",
        subtitle=f"Fingerprint {output.run.fingerprint}, started {output.run.created_at}",
        sections=[(name, text) for name, text, is_there in sections if is_there],
        notices=_notices(output, totals, inputs, images),
        facts=list(_facts(output, totals, line, processes)),
        prompt_label=prompt_label,
        prompt=prompt,
        system=cfg.task.system,
        answer_prefix=cfg.task.answer_prefix,
        settings=flat_settings(output),
        curves=curves,
        work=work,
        distributions=distributions,
        errors=errors,
        answers=answers,
        sample_note=_sample_note(totals, rows),
        rows=rows,
        statuses=Counter(row["status"] for row in rows).most_common(),
        error_types=Counter(row["error"] for row in rows if row["error"]).most_common(),
        sorts=_SORTS,
    )


def _prompt_of(cfg: JobConfig) -> tuple[str, str]:
    """Return a heading and the source of the prompts: a column or the template."""
    if cfg.data.columns.messages:
        return "Messages from column", cfg.data.columns.messages
    if cfg.data.columns.turns:
        return "User turns from column", cfg.data.columns.turns
    return "Prompt template", cfg.task.prompt


def flat_settings(output: Output) -> list[tuple[str, str]]:
    """Return every setting with its dotted name; passwords are removed."""
    return list(_flat(redact_all(dict(output.run.settings)), ""))


def _flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _notices(output: Output, totals: Totals, inputs: Inputs, images: bool) -> list[str]:
    notices = []
    if totals.num_rows < output.num_planned:
        notices.append(
            f"The job is not finished: {totals.num_rows:,} of {output.num_planned:,} rows are in "
            "finished shards, and this page speaks of these alone."
        )
    if inputs.problem:
        notices.append(f"Prompts and images are not shown, since {inputs.problem}.")
    elif not images:
        notices.append("Images are left out, as --no-images asks.")
    return notices


def _facts(
    output: Output, totals: Totals, line: TimeLine | None, processes: Sequence[Process]
) -> Iterator[tuple[str, str, str]]:
    yield "Rows", f"{totals.num_rows:,}", f"of {output.num_planned:,} in the input"
    yield "Answered", share(totals.num_success, totals.num_rows), f"{totals.num_success:,} rows"
    yield "Errors", share(totals.num_errors, totals.num_rows), f"{totals.num_errors:,} rows"
    yield "Images", f"{totals.num_images:,}", ""
    prompt, answer = totals.tokens["prompt_tokens"], totals.tokens["completion_tokens"]
    yield "Prompt tokens", f"{prompt.total:,}", f"{prompt.mean:,.1f} a row"
    yield "Answer tokens", f"{answer.total:,}", f"{answer.mean:,.1f} a row"
    run_s = sum(process.run_s for process in processes)
    num_rows = sum(process.num_rows for process in processes)
    num_tokens = sum(process.completion_tokens for process in processes)
    if line is not None:
        yield "Running time", seconds(line.active_s), number_of(len(processes), "process")
        yield "Rows per second", f"{num_rows / line.active_s:,.1f}", "of all processes together"
        yield "Answer tokens per second", f"{num_tokens / line.active_s:,.0f}", ""
    elif run_s:
        yield (
            "Computing time",
            seconds(run_s),
            f"of {number_of(len(processes), 'process')}, added up",
        )
        yield "Rows per second", f"{num_rows / run_s:,.1f}", "of one process"
        yield "Answer tokens per second", f"{num_tokens / run_s:,.0f}", "of one process"
    if totals.num_retried:
        yield "Tried again", f"{totals.num_retried:,}", "rows"
    if totals.constraints:
        held = totals.constraints.total() - totals.constraints["none"]
        yield "Held to a form", share(held, totals.num_rows), counted(totals.constraints)
    cut = totals.finish_reasons.get("length", 0)
    if cut:
        yield "Cut at the limit", share(cut, totals.num_rows), f"{cut:,} answers: max_new_tokens"
    repeated = totals.finish_reasons.get("repetition", 0)
    if repeated:
        yield "Repeat themselves", share(repeated, totals.num_rows), f"{repeated:,} answers"


def _time_shares(processes: Sequence[Process]) -> ValueTable | None:
    """Return how the processes' time is divided; None if no process has recorded any."""
    run_s = sum(p.run_s for p in processes)
    if not run_s:
        return None

    def of_engine(name: str) -> float:
        values = (p.engine.get(name) for p in processes)
        return sum(float(v) for v in values if isinstance(v, int | float))

    wait_s = sum(p.wait_s for p in processes)
    known = [
        ("loading the model", sum(p.start_s for p in processes)),
        ("waiting for data", wait_s),
        ("encoding images", of_engine("vision_s")),
        ("prompts", of_engine("prefill_s")),
        ("answers, token by token", of_engine("decode_s")),
    ]
    rest_s = run_s - sum(value for _, value in known[1:])
    counts = [(f"{name}: {seconds(value)}", value) for name, value in known if value > 0]
    if rest_s > 0.005 * run_s:
        counts.append((f"all else: {seconds(rest_s)}", rest_s))
    total_s = sum(value for _, value in counts)
    return ValueTable(
        title="Where the time went",
        note=f"{seconds(total_s)} of {number_of(len(processes), 'process')}, added up",
        counts=counts,
        num=total_s,
        is_share=True,
    )


def _distributions(totals: Totals) -> Iterator[Plot]:
    for name, title in _TITLES.items():
        counts = totals.tokens[name]
        if counts.total:
            yield token_plot(title, counts)
    if totals.latencies.num:
        yield latency_plot(totals.latencies)


def _examples(totals: Totals, kind: str) -> list[tuple[str, str]]:
    return [(name, redact(message)) for name, message in totals.examples.get(kind, [])]


def _answers(totals: Totals) -> Iterator[ValueTable]:
    for name, values in totals.fields.items():
        yield _value_table(name, values)
    answers = totals.answers
    # A list of texts that rarely repeat is useless; JSON answers are listed by field.
    top = answers.most_common(1)[0][1] if answers.counts else 0
    if not totals.fields and top >= max(2, _FREQUENT * answers.num):
        yield _value_table("Most frequent answers", answers)


def _value_table(title: str, values: Values) -> ValueTable:
    distinct = f"{'more than ' * values.is_full}{len(values.counts):,} different"
    note = f"{values.num:,} values, {distinct}"
    if values.numbers:
        mean = values.total / values.numbers
        note += f"; numbers from {values.low:g} to {values.high:g}, mean {mean:.4g}"
    return ValueTable(
        title=title, note=note, counts=values.most_common(_NUM_VALUES), num=values.num
    )


def _sample_note(totals: Totals, rows: Sequence[Any]) -> str:
    if len(rows) == totals.num_rows:
        return f"All {len(rows):,} rows."
    num_failed = sum(row["status"] == "error" for row in rows)
    of_failed = (
        f"all {num_failed:,} with an error"
        if num_failed == totals.num_errors
        else f"{num_failed:,} of the {totals.num_errors:,} with an error"
    )
    return (
        f"{len(rows):,} of {totals.num_rows:,} rows: {len(totals.sample.rows):,} drawn at random, "
        f"and {of_failed}."
    )

"""Show a plan as text: a table, small histograms, and rows that will fail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from batchvlm.before.plan import Plan
from batchvlm.before.tokens import RowCount
from batchvlm.config import EngineName, OnMismatch, TaskName
from batchvlm.output.run_file import read_run
from batchvlm.words import duration, large_number, num_bytes, number_of, printable

_NUM_BINS = 8
_BAR = 40
_NUM_EXAMPLES = 3
_ON_MISMATCH = {
    OnMismatch.error: "refuse it (output.dir, output.on_mismatch)",
    OnMismatch.new_folder: "write to a new folder beside it",
    OnMismatch.overwrite: "overwrite them",
}


def table(plan: Plan) -> Iterator[str]:
    """Yield the lines of `batchvlm plan`."""
    yield from _job(plan)
    yield from _distributions(plan)
    yield from _memory(plan)
    yield from _time(plan)
    yield from _failures(plan)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as a JSON object."""
    footprint, estimate = plan.footprint, plan.estimate
    return {
        "num_rows": plan.num_rows,
        "num_files": plan.num_files,
        "num_shards": len(plan.job.run.plan),
        "num_mine": plan.num_mine,
        "num_done": plan.num_done,
        "num_sampled": len(plan.drawn.records),
        "fingerprint": plan.job.run.fingerprint,
        "prompt_tokens": _quantiles([row.prompt_tokens for row in plan.counts]),
        "image_tokens": _quantiles([row.image_tokens for row in plan.counts]),
        "images": sum(len(row.sizes) for row in plan.counts),
        "failures": {kind: len(rows) for kind, rows in _by_kind(plan.failed).items()},
        "padding_share": plan.padding_share,
        "engine": footprint.engine.value,
        "device": footprint.device,
        "num_params": footprint.num_params,
        "weight_bytes": footprint.weight_bytes,
        "free_bytes": footprint.free_bytes,
        "token_bytes": footprint.token_bytes,
        "num_slots": footprint.num_slots,
        "rows_per_s": estimate.speed.rows_per_s if estimate else None,
        "estimated_s": estimate.total_s if estimate else None,
    }


def _job(plan: Plan) -> Iterator[str]:
    job, footprint = plan.job, plan.footprint
    per_shard = max(shard.num_rows for shard in job.run.plan)
    yield _line(
        "input",
        f"{number_of(plan.num_rows, 'row')} in {number_of(plan.num_files, 'file')}; "
        f"{number_of(len(job.run.plan), 'shard')} of at most {number_of(per_shard, 'row')}",
    )
    runtime = job.cfg.runtime
    if runtime.num_tasks > 1:
        yield _line(
            "task",
            f"{runtime.task_id} of {runtime.num_tasks}: {number_of(plan.num_mine, 'row')}",
        )
    if job.is_overwriting:
        stored = read_run(job.folder)
        is_same = stored is not None and stored.fingerprint == job.run.fingerprint
        state = "was started with other settings" if is_same else "holds the answers of another job"
        state += "; a run would " + _ON_MISMATCH[job.cfg.output.on_mismatch]
    elif plan.num_done:
        state = f"{number_of(plan.num_done, 'row')} done, {plan.num_todo:,} left"
    else:
        state = "nothing done yet"
    yield _line("output", f"{job.folder}: {state}")
    engine = f"engine {footprint.engine.value}"
    if footprint.reason:
        engine += f", since {footprint.reason}"
    yield _line(
        "model",
        f"{footprint.class_name}, {large_number(footprint.num_params)} parameters in "
        f"{footprint.dtype}; {engine}",
    )
    num_drawn = len(plan.drawn.records)
    if plan.drawn.is_all:
        yield _line("looked at", "every row")
    else:
        places = number_of(plan.drawn.num_places, "place")
        yield _line(
            "looked at",
            f"{number_of(num_drawn, 'row')} from {places} of the input; "
            "all that follows is estimated from them (--sample N)",
        )


def _distributions(plan: Plan) -> Iterator[str]:
    if not plan.counts:
        return
    sizes = [size for row in plan.counts for size in row.sizes]
    yield ""
    if sizes:
        by_area = sorted(sizes, key=lambda size: size[0] * size[1])
        shown = [f"{w} x {h}" for w, h in (by_area[0], by_area[len(sizes) // 2], by_area[-1])]
        yield _line(
            "images",
            f"{len(sizes) / len(plan.counts):.2f} a row; pixels: {shown[0]} at least, "
            f"{shown[1]} at the median, {shown[2]} at most",
        )
    columns = {
        "prompt tokens": [row.prompt_tokens for row in plan.counts],
        "of images": [row.image_tokens for row in plan.counts],
        "room to answer": [row.max_new_tokens for row in plan.counts],
    }
    heads = ["least", "median", "mean", "95%", "most"]
    yield " " * 16 + "".join(f"{head:>9}" for head in heads)
    for name, values in columns.items():
        yield f"{name:<16}" + "".join(f"{q:>9,.0f}" for q in _quantiles(values).values())
    if plan.job.cfg.task.name is TaskName.dialog:
        yield _line("", "(of a dialog's last turn, without the answers before it; room for all)")
    for name in ("prompt tokens", "of images"):
        if len(set(columns[name])) > 1:
            yield ""
            yield name if name == "prompt tokens" else "image tokens"
            yield from histogram(columns[name])


def histogram(values: Sequence[int]) -> Iterator[str]:
    """Yield a bar for each of a few equal ranges, with the number of values in it."""
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // _NUM_BINS)
    places = [(value - low) // width for value in values]
    counts = [places.count(place) for place in range(max(places) + 1)]
    digits = len(f"{high:,}")
    for place, count in enumerate(counts):
        first, last = low + place * width, min(low + (place + 1) * width - 1, high)
        # A range with any values has a visible bar.
        bar = "█" * max(round(_BAR * count / max(counts)), count > 0)
        yield f"  {first:>{digits},} - {last:>{digits},}  {bar}{' ' if bar else ''}{count:,}"


def _memory(plan: Plan) -> Iterator[str]:
    footprint = plan.footprint
    yield ""
    if footprint.engine is EngineName.slots:
        yield _line("padding", "none: prompts are computed in packs, answers in slots")
    elif plan.num_batches:
        rows = len(plan.counts) / plan.num_batches
        yield _line(
            "padding", f"{plan.padding_share:.0%} of the prompts, in batches of {rows:.0f} rows"
        )
    yield _line(
        "memory",
        f"{num_bytes(footprint.weight_bytes)} of weights, {num_bytes(footprint.token_bytes)} for "
        f"each token under way; {num_bytes(footprint.free_bytes)} free on {footprint.device}",
    )
    if footprint.weight_bytes > footprint.free_bytes:
        yield _line("", f"the weights do not fit on {footprint.device}")
    elif plan.counts and footprint.engine is EngineName.slots:
        longest = max(row.prompt_tokens + row.max_new_tokens for row in plan.counts)
        yield _line(
            "slots",
            f"{footprint.num_slots:,} rows at once, even of the longest ({longest:,} tokens with "
            f"its answer, {num_bytes(longest * footprint.token_bytes)})",
        )


def _time(plan: Plan) -> Iterator[str]:
    estimate = plan.estimate
    if estimate is None:
        yield _line("time", "unknown; --calibrate answers some rows to estimate it")
        return
    speed = estimate.speed
    yield _line(
        "speed",
        f"{speed.rows_per_s:,.1f} rows/s, {speed.completion_tokens / speed.run_s:,.0f} tokens/s "
        f"on {plan.footprint.device}, by {number_of(speed.num_rows, 'row')} answered in "
        f"{speed.run_s:.1f} s",
    )
    limit = "the engine"
    if estimate.prepare_s > max(estimate.engine_s, estimate.shared_s):
        limit = "preparing samples: runtime.num_workers"
    elif estimate.shared_s > 1.05 * estimate.engine_s:
        limit = "the cores, which prepare samples beside the engine"
    yield _line(
        "time",
        f"{duration(estimate.total_s)} for {number_of(plan.num_todo, 'row')} on one device, "
        f"{duration(speed.load_s)} of it to load; the limit is {limit}",
    )
    if plan.footprint.device.startswith("cuda"):
        total_s = estimate.total_s * plan.num_rows / max(1, plan.num_mine)
        yield _line("", f"{total_s / 3600:,.2f} GPU-hours for the whole input")


def _failures(plan: Plan) -> Iterator[str]:
    yield ""
    num_drawn = len(plan.drawn.records)
    if not plan.failed:
        yield "no row is seen that will fail"
        return
    share = len(plan.failed) / num_drawn
    about = "" if plan.drawn.is_all else f", about {share * plan.num_rows:,.0f} of the whole input"
    yield f"will fail: {len(plan.failed):,} of {number_of(num_drawn, 'row')} ({share:.1%}{about})"
    for kind, rows in _by_kind(plan.failed).items():
        yield f"  {len(rows):,} {kind}"
        for row in rows[:_NUM_EXAMPLES]:
            assert row.failure is not None
            yield f"    row {row.row_index}, {_cut(row.id, 32)}: {_cut(row.failure.message, 160)}"


def _by_kind(failed: Sequence[RowCount]) -> dict[str, list[RowCount]]:
    """Return rows by error type, the most common type first."""
    kinds: defaultdict[str, list[RowCount]] = defaultdict(list)
    for row in failed:
        assert row.failure is not None
        kinds[str(row.failure.error_type)].append(row)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "min": float(min(values)),
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "p95": float(np.quantile(values, 0.95)),
        "max": float(max(values)),
    }


def _line(name: str, text: str) -> str:
    return f"{name:<10} {text}"


def _cut(text: str, width: int) -> str:
    line = printable(text)
    return line if len(line) <= width else f"{line[: width - 3]}..."

"""Answer a few rows in the terminal, one after the other, printing each token as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from typing import Any

from transformers import TextStreamer

from batchvlm.before.drawn import draw_random
from batchvlm.before.thumbnail import print_thumbnail
from batchvlm.engine import Engine, open_engine
from batchvlm.engine.stops import SpokenTokens
from batchvlm.errors import RowError
from batchvlm.model.loading import load_processor
from batchvlm.pipeline.job import Job
from batchvlm.preprocess.images import at_hand, load_image
from batchvlm.preprocess.preprocessor import Preprocessor
from batchvlm.records import Completion, Failure, Record, Sample
from batchvlm.runtime.ranks import find_device
from batchvlm.words import printable

_MAX_SCORES = 10
_MAX_THUMBNAILS = 4
"""Most thumbnails of one row."""
_THUMBNAIL_PIXELS = 512 * 512
_KEPT = "\n\t"
"""Control characters that are printed."""
_MIN_RUN = 4
"""A long token that is repeated at least this often is printed once, with the number."""


def preview(
    job: Job, *, num_rows: int, seed: int, with_images: bool, engine: Engine | None = None
) -> None:
    """Answer a random sample of rows and print their prompts, answers and timings.

    Args:
        seed: seed of the sample.
        with_images: whether to show thumbnails, if stdout is a terminal.
        engine: used in place of the model that the configuration names.

    Raises:
        BatchvlmError: the job cannot run.
    """
    records = draw_random(job, num_rows, seed=seed)
    preprocessor = Preprocessor(job.preprocess_spec())
    tokenizer = load_processor(job.cfg.model).tokenizer
    engine = engine or open_engine(job.cfg, device=find_device(job.cfg))
    for place, record in enumerate(records, start=1):
        print(f"\n--- {place} of {len(records)}: row {record.row_index}, {printable(record.id)}")
        if with_images and sys.stdout.isatty():
            _show_images(job, record)
        _answer(job, record, preprocessor, tokenizer, engine)


def _answer(
    job: Job, record: Record, preprocessor: Preprocessor, tokenizer: Any, engine: Engine
) -> None:
    sample = preprocessor.prepare(record)
    if isinstance(sample, Failure):
        print(f"{sample.error_type}: {printable(sample.message)}")
        return
    print(readable(sample.features["input_ids"][0].tolist(), tokenizer), end="", flush=True)
    # One row at a time, so that answers are not interleaved.
    is_plain = job.cfg.generation.skip_special_tokens
    streamer = _Streamer(tokenizer if is_plain else SpokenTokens(tokenizer))
    if hasattr(engine, "on_token"):
        engine.on_token = streamer.push
    start_s = time.perf_counter()
    ((_, outcome),) = engine.run([sample])
    run_s = time.perf_counter() - start_s
    streamer.end()  # type: ignore[no-untyped-call]
    if isinstance(outcome, Failure):
        print(f"\n{outcome.error_type}: {printable(outcome.message)}")
        return
    if not streamer.has_text:
        print(printable(outcome.text))
    for place, other in enumerate(outcome.alternatives, start=2):
        print(f"\n[answer {place}] {printable(other.text, keep=_KEPT)}", end="")
    for score in sorted(outcome.scores or (), key=lambda score: -score.probability)[:_MAX_SCORES]:
        print(f"{score.probability:7.2%}  {printable(score.choice)}")
    print("\n" + "; ".join(_facts(job, outcome, sample, run_s)))
    reading = job.task.read(outcome.text, json_schema=sample.json_schema, choices=sample.choices)
    if sample.turns_left:
        # The next turn of a dialog: the answer is part of its prompt.
        record = replace(record, answers=(*record.answers, outcome))
        _answer(job, record, preprocessor, tokenizer, engine)
    elif reading.failure is not None:
        print(f"{reading.failure.error_type}: {printable(reading.failure.message)}")
    elif reading.parsed is not None:
        print(f"parsed: {printable(reading.parsed)}")


def _facts(job: Job, outcome: Completion, sample: Sample, run_s: float) -> Iterator[str]:
    num_tokens = sum(len(answer.token_ids) for answer in (outcome, *outcome.alternatives))
    yield f"{sample.prompt_tokens:,} tokens of prompt, {sample.image_tokens:,} of them of images"
    yield f"{num_tokens:,} of answer in {run_s:.2f} s ({num_tokens / max(run_s, 1e-9):,.0f}/s)"
    limit = sample.generation.max_new_tokens
    name = f"generation.max_new_tokens={limit}"
    if limit != job.cfg.generation.max_new_tokens:  # set by the row, or by the model's length
        name = f"{limit:,} tokens"
    ended = {"length": f"cut at its limit ({name})"}
    yield ended.get(str(outcome.finish_reason), f"ended by {outcome.finish_reason}")


def _show_images(job: Job, record: Record) -> None:
    cfg = job.cfg
    if record.failure is not None:
        return
    # Errors of a row are printed once, when its sample is prepared.
    with suppress(RowError):
        for ref in job.prompts.build(record).images[:_MAX_THUMBNAILS]:
            print_thumbnail(
                load_image(
                    at_hand(ref, record.fetched),
                    image_root=job.source.image_root,
                    max_image_bytes=cfg.data.max_image_bytes,
                    max_source_pixels=cfg.data.max_source_pixels,
                    max_pixels=_THUMBNAIL_PIXELS,
                )
            )


class _Streamer(TextStreamer):
    """Prints an answer word by word, without control characters."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.has_text = False

    def push(self, row_index: int, token: int) -> None:
        """Add the next token."""
        import torch

        self.put(torch.tensor([token]))  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print text that further tokens cannot change."""
        self.has_text = self.has_text or bool(text)
        print(printable(text, keep=_KEPT), end="", flush=True)


def readable(ids: Sequence[int], tokenizer: Any) -> str:
    """Return a prompt with its special tokens; long runs of a token are shown as a count."""
    pieces: list[str] = []
    text: list[int] = []
    for token, group in groupby(ids):
        length = len(list(group))
        if length < _MIN_RUN or len(tokenizer.decode([token]).strip()) < _MIN_RUN:
            text += [token] * length
            continue
        pieces += [tokenizer.decode(text), f"{tokenizer.decode([token])}[{length} times]"]
        text = []
    return printable("".join([*pieces, tokenizer.decode(text)]), keep=_KEPT)

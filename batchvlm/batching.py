"""Samples -> length-sorted batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from batchvlm.config import BatchingConfig
from batchvlm.records import Batch, Sample


def group_by_length(samples: Iterable[Sample], cfg: BatchingConfig) -> Iterator[Batch]:
    """Yield every sample once, in batches within the padded-token budget.

    A window of samples is sorted by the answer's limit and the prompt's length, image tokens
    included. It is divided into batches whose padded size is at most `cfg.max_batch_tokens`.
    Windows grow from one batch to `cfg.sort_window` samples. A sample above the budget forms a
    batch of one. The same samples in the same order give the same batches.
    """
    for window in _windows(samples, cfg):
        # Longest first: the batch likeliest to run out of memory fails early, and later batches
        # reuse the memory that it allocated. The answer's limit is the first key, because a batch
        # decodes until its last row ends.
        window.sort(
            key=lambda s: (
                # In powers of two: if rows have limits of their own, sorting by the exact ones
                # would leave prompts unsorted.
                s.generation.max_new_tokens.bit_length(),
                s.prompt_tokens,
                -s.row_index,
            ),
            reverse=True,
        )
        yield from _pack(window, cfg)


def _windows(samples: Iterable[Sample], cfg: BatchingConfig) -> Iterator[list[Sample]]:
    window: list[Sample] = []
    size_bytes = 0
    # The first window is one batch and each next one is twice as large, so that the engine starts
    # before the workers have prepared a full window.
    max_samples = min(cfg.max_batch_size, cfg.sort_window)
    for sample in samples:
        window.append(sample)
        size_bytes += sample.size_bytes
        if len(window) >= max_samples or size_bytes >= cfg.max_window_bytes:
            yield window
            window, size_bytes = [], 0
            max_samples = min(2 * max_samples, cfg.sort_window)
    if window:
        yield window


def _pack(ordered: Iterable[Sample], cfg: BatchingConfig) -> Iterator[Batch]:
    batch: list[Sample] = []
    prompts: list[int] = []
    longest_answer = 0
    for sample in ordered:
        prompts.append(sample.prompt_tokens)
        own_answer = sample.generation.max_new_tokens
        longest_answer = max(longest_answer, own_answer)
        is_over_budget = len(prompts) * (max(prompts) + longest_answer) > cfg.max_batch_tokens
        # A row less than half as long as the longest would be mostly padding. In a sorted window
        # this adds few batches: one each time the length halves.
        is_uneven = 2 * min(prompts) < max(prompts) or 2 * own_answer < longest_answer
        if batch and (is_over_budget or is_uneven or len(batch) == cfg.max_batch_size):
            yield Batch(samples=tuple(batch))
            batch, prompts, longest_answer = [], [sample.prompt_tokens], own_answer
        batch.append(sample)
    if batch:
        yield Batch(samples=tuple(batch))

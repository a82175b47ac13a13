"""Samples -> length-sorted batches under a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from batchvlm.config import BatchingConfig
from batchvlm.records import Batch, Sample


def group_by_length(samples: Iterable[Sample], cfg: BatchingConfig) -> Iterator[Batch]:
    """Yield every sample once, in batches within the padded-token budget.

    A bounded window of samples is sorted by length, image tokens and room for the answer included,
    and cut into batches whose padded size stays within `cfg.max_batch_tokens`. The window grows
    from one batch to `cfg.sort_window` samples. A sample above the
    budget forms a batch of one. The same samples in the same order give the same batches.
    """
    for window in _windows(samples, cfg):
        # Longest first: the batch likeliest to run out of memory fails early, and memory that it
        # took is reused by all that follow. The answer's room leads, since a batch decodes until
        # its last row is done.
        window.sort(
            key=lambda s: (
                # By powers of two: exact limits of the rows' own would leave prompts unsorted.
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
    # The first window is one batch, each next one twice as large: the engine starts while the
    # workers are still at what a whole window would hold.
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
        # Rows less than half as long as the longest would be mostly padding. In a sorted window
        # this costs few more batches: one each time lengths halve.
        is_uneven = 2 * min(prompts) < max(prompts) or 2 * own_answer < longest_answer
        if batch and (is_over_budget or is_uneven or len(batch) == cfg.max_batch_size):
            yield Batch(samples=tuple(batch))
            batch, prompts, longest_answer = [], [sample.prompt_tokens], own_answer
        batch.append(sample)
    if batch:
        yield Batch(samples=tuple(batch))

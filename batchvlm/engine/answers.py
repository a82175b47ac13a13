"""Several answers per row: a sample runs once for each, and `join` merges the results.

engine.run(samples) = join(answered(expand(samples)))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from batchvlm.engine.protocol import SampleStream
from batchvlm.records import Completion, Failure, Sample, derived_seed


def expand(samples: Iterable[Sample]) -> SampleStream:
    """Repeat each sample `num_return_sequences` times.

    The copies share their features and differ in `answer` and in the seed. The first is the sample
    itself, so its answer equals that of a row with one answer. The seeds of the others are derived
    from the row's seed, so they do not depend on the batch.
    """
    return _Expanded(samples)


class _Expanded:
    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples
        self._num_left = 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            num_answers = sample.generation.num_return_sequences
            for answer in range(num_answers):
                self._num_left = num_answers - answer - 1
                yield sample if answer == 0 else _copy(sample, answer)

    def is_ready(self) -> bool:
        if self._num_left == 0 and isinstance(self._samples, SampleStream):
            return self._samples.is_ready()
        return True


def join(
    outcomes: Iterable[tuple[Sample, Completion | Failure]],
) -> Iterator[tuple[int, Completion | Failure]]:
    """Yield each row once, when all its answers have arrived, which may be in any order.

    The other answers become the `alternatives` of the first, in order. The latency is that of the
    slowest. If an answer failed, the row fails.
    """
    incomplete: dict[int, dict[int, Completion | Failure]] = {}
    for sample, outcome in outcomes:
        answers = incomplete.setdefault(sample.row_index, {})
        assert sample.answer not in answers, f"row {sample.row_index} was answered twice"
        answers[sample.answer] = outcome
        if len(answers) == sample.generation.num_return_sequences:
            del incomplete[sample.row_index]
            yield sample.row_index, _joined([answers[i] for i in range(len(answers))])


def _copy(sample: Sample, answer: int) -> Sample:
    seed = derived_seed("answer", sample.generation.seed, answer)
    generation = replace(sample.generation, seed=seed)
    return replace(sample, answer=answer, generation=generation)


def _joined(answers: list[Completion | Failure]) -> Completion | Failure:
    completions: list[Completion] = []
    for answer in answers:
        if isinstance(answer, Failure):
            return answer
        completions.append(answer)
    first, *others = completions
    if not others:
        return first
    latency_s = max(completion.latency_s for completion in completions)
    return replace(first, alternatives=tuple(others), latency_s=latency_s)

"""The engine for any model: transformers' `generate()` on padded batches."""

from __future__ import annotations

import copy
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteria

from batchvlm.batching import group_by_length
from batchvlm.config import BatchingConfig
from batchvlm.constraints.constraints import Constraints, Unconstrained, special_ids
from batchvlm.constraints.masks import RowMatcher
from batchvlm.engine.answers import expand, join
from batchvlm.engine.choices import Choices
from batchvlm.engine.collate import as_arguments, collate
from batchvlm.engine.faults import device_error, failure_of, free_memory
from batchvlm.engine.forced import ForcedChoices
from batchvlm.engine.parallel import Team
from batchvlm.engine.protocol import OnToken, Outcome
from batchvlm.engine.sampling import NextTokens, RowSampler
from batchvlm.engine.stops import RowStop, SpokenTokens, not_finite
from batchvlm.errors import BatchvlmError, ErrorType, RowError
from batchvlm.model.kinds import reads_prompts
from batchvlm.model.quantization import refuses_inference_mode
from batchvlm.records import (
    Completion,
    EngineStats,
    Failure,
    Sample,
)

log = logging.getLogger(__name__)

# Shape legend: B rows of the batch, T padded prompt length plus tokens generated so far,
# V vocabulary.

# Families whose results are wrong if rows of a batch have different numbers of images (Mllama),
# images of different sizes (Emu3, whose encoder sees the padding), prompts of different lengths
# (Kosmos-2 and -2.5, which count the padding as positions of the answer, and Donut's decoder), or
# padding that moves the ends of the blocks of keys among which layers choose (MiniMax M3).
_ALONE = frozenset(
    {"emu3", "kosmos-2", "kosmos-2.5", "minimax_m3_vl", "mllama", "vision-encoder-decoder"}
)
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 19):
    # These versions merge all images of a batch by the grid of the first image.
    _ALONE |= {"minicpmv4_6"}
# Families that take exactly one image per row. Given several, some silently use only the first.
ONE_IMAGE = frozenset(
    {"blip-2", "florence2", "instructblip", "kosmos-2", "kosmos-2.5", "vision-encoder-decoder"}
)
# Families whose generate() delegates to a part of them, which has its own generation config.
_INNER_GENERATE = {
    "blip-2": "language_model",
    "instructblip": "language_model",
    "kosmos-2": "text_model",
}
# Families whose repositories do not name the token that ends an answer.
_ENDS = {"got_ocr2": "<|im_end|>"}
# Families that express locations by special tokens.
_KEEPS_SPECIAL_TOKENS = frozenset({"florence2"})
# Families whose own generate(), which can also generate images, drops logits processors.
_OWN_GENERATE = frozenset({"janus"})
_MAX_ANSWERS = 256
_KEPT_DEFAULTS = (
    *("bos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    # The first tokens of an encoder-decoder's completions.
    *("decoder_start_token_id", "forced_bos_token_id"),
)


class GenerateEngine:
    """Runs padded batches through `model.generate`, each row with its own settings.

    Args:
        model: a transformers model for image-text-to-text.
        tokenizer: the tokenizer that decodes completions.
        batching: how samples are grouped.
        constraints: constrained decoding; None without.
        pixel_dtype: dtype of image inputs; None: the model's.
        choices: the choices to score, instead of decoding; None to decode.
        keeps_special_tokens: whether special tokens are part of an answer's text.
        team: the other processes of a tensor-parallel replica; None without.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batching: BatchingConfig | None = None,
        *,
        constraints: Constraints | None = None,
        pixel_dtype: torch.dtype | None = None,
        choices: Choices | None = None,
        keeps_special_tokens: bool = False,
        team: Team | None = None,
    ) -> None:
        self._choices = choices
        self._max_answers = _MAX_ANSWERS
        """Maximum number of choices, over all rows of a batch, that are scored at once."""
        self.stats = EngineStats()
        self.on_token: OnToken | None = None
        self._pixel_dtype = pixel_dtype or model.dtype
        self._team = team
        self._constraints = constraints or Unconstrained()
        self._batching = batching or BatchingConfig()
        self._model = model
        kind = model.config.model_type
        is_spoken = keeps_special_tokens or kind in _KEEPS_SPECIAL_TOKENS
        self._tokenizer = SpokenTokens(tokenizer) if is_spoken else tokenizer
        self._special_ids = special_ids(self._tokenizer)
        self._takes_one_image = kind in ONE_IMAGE
        self._is_encoder_decoder = reads_prompts(model.config)
        self._eos_ids = eos_ids(model, tokenizer)
        pad_id = tokenizer.pad_token_id
        self._pad_id = pad_id if pad_id is not None else next(iter(self._eos_ids), 0)
        for part in generating(model):
            part.generation_config = without_defaults(part.generation_config, pad_id=self._pad_id)

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer every sample exactly once; see `Engine.run`."""
        try:
            yield from join(self._answer(self._constraints.in_order(expand(samples))))
        finally:
            self._constraints.close()

    def _answer(self, samples: Iterable[Sample]) -> Iterator[Outcome]:
        is_alone = self._model.config.model_type in _ALONE
        if is_alone:
            log.info(
                "%s answers row by row: its rows cannot be batched", type(self._model).__name__
            )
        for batch in group_by_length(samples, self._batching):
            valid = batch.samples
            if self._takes_one_image:
                valid = tuple(sample for sample in valid if len(sample.image_sizes) == 1)
                for sample in batch.samples:
                    if len(sample.image_sizes) != 1:
                        yield sample, self._not_one_image(len(sample.image_sizes))
            groups = [(sample,) for sample in valid] if is_alone else self._grouped(valid)
            for group in groups:
                yield from self._run_or_split(group)

    def _grouped(self, samples: Sequence[Sample]) -> list[tuple[Sample, ...]]:
        """Split a batch into the groups that run together."""
        if self._choices is None:
            return [tuple(samples)] if samples else []
        # All rows of a group run as many choices as the row with the most, so similar numbers are
        # grouped.
        by_num: dict[int, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_num[len(sample.choices or ()).bit_length()].append(sample)
        return [tuple(group) for group in by_num.values()]

    def _not_one_image(self, num_images: int) -> Failure:
        return Failure(
            error_type=ErrorType.PROMPT if num_images else ErrorType.MISSING_IMAGE,
            message=f"{type(self._model).__name__} takes one image a row, not {num_images}",
        )

    def _run_or_split(self, samples: Sequence[Sample]) -> Iterator[Outcome]:
        is_inference = not refuses_inference_mode(self._model)
        try:
            with torch.no_grad(), torch.inference_mode(is_inference):
                outcomes = self._outcomes(samples)
        except RowError as error:
            failure = Failure.of(error)
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except BatchvlmError:
            raise  # not caused by a row
        except Exception as error:
            failure = failure_of(error)
        else:
            yield from zip(samples, outcomes, strict=True)
            return
        # Only after the except clause are the error and its traceback released, and with them the
        # tensors of the failed attempt.
        free_memory(self._model.device)
        if len(samples) == 1:
            if self._choices is not None and self._lower_max_answers(failure):
                yield from self._run_or_split(samples)
            else:
                yield samples[0], failure
            return
        # A batch that raises is halved until the failing row is alone.
        log.warning("a batch of %d rows failed (%s); halving it", len(samples), failure.message)
        middle = len(samples) // 2
        yield from self._run_or_split(samples[:middle])
        yield from self._run_or_split(samples[middle:])

    def _lower_max_answers(self, failure: Failure) -> bool:
        """After an OOM, lower the number of choices scored at once; False if it cannot help."""
        if failure.error_type is not ErrorType.OOM or self._max_answers == 1:
            return False
        self._max_answers //= 4
        return True

    def _outcomes(self, samples: Sequence[Sample]) -> list[Completion | Failure]:
        return self._generate(samples) if self._choices is None else self._score(samples)

    def _score(self, samples: Sequence[Sample]) -> list[Completion | Failure]:
        """Score the choices of each row by teacher forcing."""
        assert self._choices is not None
        start = time.perf_counter()
        choices = [self._choices.of(sample) for sample in samples]
        budget = self._batching.max_batch_tokens
        longest = max(s.prompt_tokens + c.max_tokens for s, c in zip(samples, choices, strict=True))
        forced = ForcedChoices(
            choices,
            eos_ids=self._eos_ids,
            max_answers=min(self._max_answers, budget // longest),
        )
        batch = self._collated(samples)
        self._call_generate(
            batch, max_new_tokens=max(c.max_tokens for c in choices) + 2, custom_generate=forced
        )
        latency_s = time.perf_counter() - start
        self._count(samples, batch, forced.row_steps)
        outcomes: list[Completion | Failure] = []
        for sample, row, logprobs, is_finite in zip(
            samples, choices, forced.logprobs, forced.is_finite, strict=True
        ):
            if is_finite:
                answer = self._choices.answer(sample, row, logprobs, latency_s=latency_s)
            else:
                answer = not_finite(0)
            outcomes.append(answer)
        return outcomes

    def _generate(self, samples: Sequence[Sample]) -> list[Completion | Failure]:
        start = time.perf_counter()
        batch = self._collated(samples)
        # generate() of an encoder-decoder returns a start token and the completion, no prompt.
        prompt_width = 1 if self._is_encoder_decoder else batch["input_ids"].shape[1]
        sampler = RowSampler(len(samples), eos_ids=self._eos_ids, device=self._model.device)
        matchers = [self._constraints.begin(sample) for sample in samples]
        for i, sample in enumerate(samples):
            settings = sample.generation
            if matchers[i] is not None:
                # The grammar ends the answer; it may allow nothing after a complete one.
                settings = replace(settings, min_new_tokens=0)
            sampler.admit(i, settings, sample.features["input_ids"])
        chosen = ChosenToken(sampler, matchers, self._constraints)
        known = frozenset(self._eos_ids), self._tokenizer, self._special_ids
        stops = [RowStop(row.generation, *known, row.continued_ids) for row in samples]
        rows = [sample.row_index if sample.answer == 0 else None for sample in samples]
        criterion = RowStops(stops, chosen, self._eos_ids, rows=rows, on_token=self.on_token)
        generate = self.generate if self._team is None else partial(self._team.run, self.generate)
        max_new_tokens = max(sample.generation.max_new_tokens for sample in samples)
        ids_BT = generate(batch, max_new_tokens, chosen, criterion)
        latency_s = time.perf_counter() - start
        self._count(samples, batch, len(samples) * (ids_BT.shape[1] - prompt_width))
        outcomes: list[Completion | Failure] = []
        for i, (sample, stop) in enumerate(zip(samples, stops, strict=True)):
            if i in criterion.failures:
                outcomes.append(criterion.failures[i])
                continue
            completion = stop.completion(sample.row_index, latency_s)
            if (matcher := matchers[i]) is not None:
                completion = replace(completion, constraint=matcher.constraint)
            outcomes.append(completion)
        return outcomes

    def _collated(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        return collate(samples, pad_id=self._pad_id, pads_right=self._is_encoder_decoder)

    def _count(
        self, samples: Sequence[Sample], batch: Mapping[str, Tensor], row_steps: int
    ) -> None:
        self.stats.num_batches += 1
        self.stats.prompt_tokens += sum(sample.prompt_tokens for sample in samples)
        self.stats.prompt_cells += batch["input_ids"].numel()
        self.stats.row_steps += row_steps

    def generate(
        self,
        batch: Mapping[str, Tensor],
        max_new_tokens: int,
        processor: LogitsProcessor,
        criterion: StoppingCriteria,
    ) -> Tensor:
        """Run the model's `generate()` on a batch.

        Args:
            batch: from `collate`.
            processor: chooses the tokens.
            criterion: ends the rows.

        Returns:
            ids_BT: prompts and completions, padded; of an encoder-decoder a start token and
                completions.
        """
        return self._call_generate(
            batch,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=[criterion],
        )

    def _call_generate(self, batch: Mapping[str, Tensor], **how: Any) -> Tensor:
        generate = self._model.generate
        if self._model.config.model_type in _OWN_GENERATE:
            generate = partial(GenerationMixin.generate, self._model)
        arguments = {
            name: self._to_device(value) if isinstance(value, Tensor) else value
            for name, value in as_arguments(batch).items()
        }
        ids_BT: Tensor = generate(**arguments, **how)
        return ids_BT

    def _to_device(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.to(self._model.device, self._pixel_dtype)
        return tensor.to(self._model.device)


def generating(model: Any) -> list[Any]:
    """Return a model and, if its `generate()` delegates to a part of it, that part."""
    name = _INNER_GENERATE.get(model.config.model_type)
    return [model] if name is None else [model, getattr(model, name)]


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return all EOS ids, from the generation config and the tokenizer.

    As in vLLM, both are used: repositories often have the end of text in one, and the end of turn
    in the other.
    """
    ids: list[int | None] = []
    for part in generating(model):
        named = part.generation_config.eos_token_id
        ids += named if isinstance(named, list | tuple) else [named]
    ids.append(tokenizer.eos_token_id)
    if end := _ENDS.get(model.config.model_type):
        ids.append(tokenizer.convert_tokens_to_ids(end))
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def without_defaults(config: Any, *, pad_id: int) -> Any:
    """Return a model's generation config without defaults.

    Only the ids that start an answer, and those that are suppressed, are kept.

    transformers fills settings that a call does not give from the model's repository. A greedy run
    would then use the repository's repetition penalty, and a row that ignores EOS would still end.
    """
    config = copy.deepcopy(config)
    for name, value in vars(type(config)()).items():
        if name not in _KEPT_DEFAULTS and not name.startswith("_"):
            setattr(config, name, value)
    config.update(do_sample=False, pad_token_id=pad_id)
    return config


class ChosenToken(LogitsProcessor):
    """Sets the score of the sampled token to infinity, so that `generate()`'s argmax picks it."""

    next_tokens: NextTokens
    """Tokens of the last step."""

    def __init__(
        self,
        sampler: RowSampler,
        matchers: Sequence[RowMatcher | None],
        constraints: Constraints | Unconstrained,
    ) -> None:
        self._sampler = sampler
        self.matchers = matchers
        self.constraints = constraints

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask_BW = self.constraints.take(self.matchers)
        self.next_tokens = self._sampler.choose(scores, slice(len(scores)), mask_BW=mask_BW)
        return scores.scatter(-1, self.next_tokens.ids_B[:, None], torch.inf)


class RowStops(StoppingCriteria):
    """Ends each row of a batch by its own `RowStop`, or because its logits are not finite."""

    def __init__(
        self,
        stops: Sequence[RowStop],
        chosen: ChosenToken,
        eos_ids: Sequence[int],
        *,
        rows: Sequence[int | None] = (),
        on_token: OnToken | None = None,
    ) -> None:
        # generate() checks for this attribute to decide whether to pad finished rows.
        self.eos_token_id = torch.tensor(list(eos_ids) or [-1])
        self.failures: dict[int, Failure] = {}
        """Index in the batch -> failure."""
        self._stops = stops
        self._chosen = chosen
        self._is_done = [False] * len(stops)
        self._rows = rows
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        chosen = self._chosen.next_tokens
        tokens, is_finite = input_ids[:, -1].tolist(), chosen.is_finite_B.tolist()
        logprobs = [None] * len(tokens) if chosen.logprobs_B is None else chosen.logprobs_B.tolist()
        for i, stop in enumerate(self._stops):
            if self._is_done[i]:
                continue
            if self._on_token is not None and (row_index := self._rows[i]) is not None:
                self._on_token(row_index, tokens[i])
            if is_finite[i]:
                self._is_done[i] = stop.push(tokens[i], logprobs[i])
                if (matcher := self._chosen.matchers[i]) is not None:
                    matcher.commit(tokens[i])
            else:
                self.failures[i] = not_finite(stop.num_tokens)
                self._is_done[i] = True
        if not all(self._is_done):
            # The next masks are computed while the model runs.
            self._chosen.constraints.start(self._chosen.matchers)
        return torch.tensor(self._is_done, device=input_ids.device)

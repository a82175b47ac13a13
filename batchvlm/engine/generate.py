"""The engine that every model allows: transformers' `generate()` on padded batches."""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from batchvlm.batching import group_by_length
from batchvlm.config import BatchingConfig, ModelConfig
from batchvlm.engine.collate import collate
from batchvlm.engine.sampling import RowSampler
from batchvlm.errors import DeviceError, ErrorType, ModelError
from batchvlm.loading import load_model, load_processor
from batchvlm.records import (
    Completion,
    EngineStats,
    Failure,
    FinishReason,
    Generation,
    Sample,
)

log = logging.getLogger(__name__)

# Shape legend: B rows of the batch, T padded prompt length plus tokens generated so far,
# V vocabulary.

# Families whose features do not follow the rule of `collate`: cross-attention masks (Mllama),
# absolute indices (Molmo 2), patches on the last dimension (MiniCPM-V).
_ALONE = frozenset({"mllama", "molmo2", "minicpmv4_6"})
_KEPT_DEFAULTS = ("bos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


class GenerateEngine:
    """Runs padded batches through `model.generate`, every row under its own settings.

    Args:
        model: a transformers model for image-text-to-text.
        tokenizer: the tokenizer that decodes its answers.
        batching: how samples are grouped.
    """

    def __init__(self, model: Any, tokenizer: Any, batching: BatchingConfig | None = None) -> None:
        self.stats = EngineStats()
        self._batching = batching or BatchingConfig()
        self._model = model
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids(model, tokenizer)
        pad_id = tokenizer.pad_token_id
        self._pad_id = pad_id if pad_id is not None else next(iter(self._eos_ids), 0)
        if model.config.is_encoder_decoder:
            raise ModelError(
                f"{type(model).__name__} is an encoder-decoder; only decoder-only models run yet"
            )
        model.generation_config = without_defaults(model.generation_config, pad_id=self._pad_id)

    @classmethod
    def load(cls, cfg: ModelConfig, batching: BatchingConfig, *, device: str) -> GenerateEngine:
        """Load a model and its tokenizer.

        Raises:
            ModelError: either cannot be loaded.
        """
        # The processor first: whatever is wrong with it is known before the weights are read.
        tokenizer = load_processor(cfg).tokenizer
        return cls(load_model(cfg, device=device), tokenizer, batching)

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        """Answer every sample exactly once; see `Engine.run`."""
        is_alone = self._model.config.model_type in _ALONE
        if is_alone:
            log.info(
                "%s answers row by row: its rows cannot be batched", type(self._model).__name__
            )
        for batch in group_by_length(samples, self._batching):
            groups = [(sample,) for sample in batch.samples] if is_alone else [batch.samples]
            for group in groups:
                yield from self._run_or_split(group)

    def _run_or_split(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[int, Completion | Failure]]:
        try:
            completions = self._generate(samples)
        except torch.AcceleratorError as error:
            # After this every call fails, so every row would: none of them is at fault.
            raise DeviceError(
                f"the accelerator failed: {_one_line(error)}",
                hint="run the same command again: it goes on from the last finished rows",
            ) from error
        except Exception as error:
            failure = _failure(error)
        else:
            yield from ((completion.row_index, completion) for completion in completions)
            return
        # Only here, behind the except clause, is the error gone, and with its traceback the tensors
        # of the failed attempt.
        self._free_memory()
        if len(samples) == 1:
            yield samples[0].row_index, failure
            return
        # A batch that raises is halved until the row at fault stands alone.
        log.warning("a batch of %d rows failed (%s); halving it", len(samples), failure.message)
        middle = len(samples) // 2
        yield from self._run_or_split(samples[:middle])
        yield from self._run_or_split(samples[middle:])

    def _free_memory(self) -> None:
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _generate(self, samples: Sequence[Sample]) -> list[Completion]:
        start = time.perf_counter()
        device = self._model.device
        inputs = {
            name: self._to_device(tensor)
            for name, tensor in collate(samples, pad_id=self._pad_id).items()
        }
        rows = [sample.generation for sample in samples]
        prompt_width = inputs["input_ids"].shape[1]
        stops = RowStops(rows, self._eos_ids, prompt_width, self._tokenizer, device)
        sampler = RowSampler(rows, eos_ids=self._eos_ids, device=device)
        processors = LogitsProcessorList()
        if not sampler.is_greedy:
            processors.append(ChosenToken(sampler, inputs["attention_mask"]))
        ids_BT = self._model.generate(
            **inputs,
            max_new_tokens=max(r.max_new_tokens for r in rows),
            logits_processor=processors,
            stopping_criteria=[stops],
        )
        latency_s = time.perf_counter() - start
        self.stats.num_batches += 1
        self.stats.prompt_tokens += sum(sample.prompt_tokens for sample in samples)
        self.stats.prompt_cells += inputs["input_ids"].numel()
        self.stats.row_steps += len(samples) * (ids_BT.shape[1] - prompt_width)
        answers = ids_BT[:, prompt_width:].tolist()
        return [
            stops.completion(i, sample.row_index, answers[i], latency_s)
            for i, sample in enumerate(samples)
        ]

    def _to_device(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.to(self._model.device, self._model.dtype)
        return tensor.to(self._model.device)


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: those of the generation config, and the tokenizer's.

    Both, as in vLLM: repositories often name the end of the text in one and of the turn in the
    other.
    """
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return tuple(dict.fromkeys(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None))


def without_defaults(config: Any, *, pad_id: int) -> Any:
    """A model's generation config, emptied of all but the ids that the model must not say.

    transformers fills every setting that a call leaves open from the model's repository, so a
    greedy run would take over its repetition penalty and a row that ignores EOS would still end.
    """
    config = copy.deepcopy(config)
    for name, value in vars(type(config)()).items():
        if name not in _KEPT_DEFAULTS and not name.startswith("_"):
            setattr(config, name, value)
    config.update(do_sample=False, pad_token_id=pad_id)
    return config


class ChosenToken(LogitsProcessor):
    """Lets `generate()`'s argmax find the token that our sampler chose."""

    def __init__(self, sampler: RowSampler, mask_BT: Tensor) -> None:
        self._sampler = sampler
        self._prompt_mask_BT = mask_BT

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_mask_BT.shape[1]
        answer_BT = torch.ones_like(input_ids[:, self._prompt_mask_BT.shape[1] :])
        mask_BT = torch.cat([self._prompt_mask_BT, answer_BT], dim=1)
        chosen_B = self._sampler.choose(scores, input_ids, mask_BT, step)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen_B[:, None], 0.0)


class RowStops(StoppingCriteria):
    """Ends each row by its own limit, its own stop strings and, unless ignored, the model's EOS."""

    def __init__(
        self,
        rows: Sequence[Generation],
        eos_ids: Sequence[int],
        prompt_width: int,
        tokenizer: Any,
        device: torch.device,
    ) -> None:
        # generate() looks for this name to know that finished rows must be padded.
        self.eos_token_id = torch.tensor(list(eos_ids) or [-1], device=device)
        self._eos_ids = frozenset(eos_ids)
        self._rows = rows
        self._prompt_width = prompt_width
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._limits_B = torch.tensor([r.max_new_tokens for r in rows], device=device)
        self._heeds_eos_B = torch.tensor([not r.ignore_eos for r in rows], device=device)
        self._stop_rows = [i for i, row in enumerate(rows) if row.stop]

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        num_new = input_ids.shape[1] - self._prompt_width
        is_eos_B = torch.isin(input_ids[:, -1], self.eos_token_id)
        done_B = (is_eos_B & self._heeds_eos_B) | (self._limits_B <= num_new)
        for i in self._stop_rows:
            is_early = num_new < self._rows[i].min_new_tokens
            if is_early or done_B[i]:
                continue
            done_B[i] = self._stopped_chars(i, input_ids[i, self._prompt_width :].tolist()) > 0
        return done_B

    def _stopped_chars(self, i: int, ids: Sequence[int]) -> int:
        """How much a stop string that the last id completes takes off the text's end; 0: none."""
        if ids[-1] in self._special_ids:
            return 0  # adds no text
        # A stop string may begin and end inside tokens, so look at text, but only at its end: no
        # token of text adds less than a byte, hence as many as the longest string has bytes.
        stops = self._rows[i].stop
        longest = max(len(stop.encode()) for stop in stops)
        backwards = (token for token in reversed(ids) if token not in self._special_ids)
        tail = list(islice(backwards, longest + 1))[::-1]
        text, before = self._tokenizer.decode(tail), self._tokenizer.decode(tail[:-1])
        # Half a character decodes to U+FFFD, which the next token takes back.
        num_old = len(before.rstrip("\ufffd"))
        starts = [text.find(stop, max(0, num_old - len(stop) + 1)) for stop in stops]
        return max((len(text) - start for start in starts if start >= 0), default=0)

    def completion(
        self, i: int, row_index: int, ids: Sequence[int], latency_s: float
    ) -> Completion:
        """Cut row i's answer at its end and say why it ended.

        Args:
            i: place in the batch.
            row_index: the sample's row.
            ids: everything generated, padding behind the end included.
            latency_s: seconds that the batch took.
        """
        settings = self._rows[i]
        ids = list(ids[: settings.max_new_tokens])
        said = ids
        cut_chars = 0
        reason = FinishReason.LENGTH
        if not settings.ignore_eos:
            for n, token in enumerate(ids):
                if token in self._eos_ids:
                    ids, said, reason = ids[: n + 1], ids[:n], FinishReason.STOP
                    break
        if settings.stop:
            for n in range(max(1, settings.min_new_tokens), len(said) + 1):
                if cut_chars := self._stopped_chars(i, said[:n]):
                    ids = said = said[:n]
                    reason = FinishReason.STOP
                    break
        # An id that ends answers need not be special: its text is left out by place.
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        return Completion(
            row_index=row_index,
            token_ids=tuple(ids),
            text=text[: len(text) - cut_chars],
            finish_reason=reason,
            latency_s=latency_s,
        )


def _failure(error: Exception) -> Failure:
    text = _one_line(error)
    # torch's CPU allocator raises RuntimeError.
    is_oom = isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "can't allocate memory" in text
    )
    return Failure(
        error_type=ErrorType.OOM if is_oom else ErrorType.ENGINE,
        message=text,
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

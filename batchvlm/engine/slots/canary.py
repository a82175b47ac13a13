"""Self-check: the slot engine's logits of a few rows against those of plain `generate()`.

It detects a model family that transformers has changed, or a kernel that is wrong on this device,
before the first row is answered.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchvlm.engine.collate import collate
from batchvlm.engine.faults import device_error, failure_of, free_memory
from batchvlm.engine.forward.cache import SlotCache
from batchvlm.engine.forward.decoder import Branches, Decoder, Piece, Prompt
from batchvlm.engine.forward.layout import Newest, Span
from batchvlm.engine.generate import without_defaults
from batchvlm.engine.slots.vision import ImageFeatures, batches
from batchvlm.errors import ModelError
from batchvlm.records import Sample

log = logging.getLogger(__name__)

# Shape legend: B rows, V vocabulary.

_NUM_ROWS = 2
_TAIL_TOKENS = 16
_MAX_ERROR = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Limit of `relative_error`. Rounding stays an order of magnitude below it; a wrong position or
image gives 0.5 or more. In a mixture of experts it may change which expert a token has: with four
or more of them a token, an error of 0.1 was observed."""
_MAX_ERROR_QUANTIZED = 0.3
"""If activations are rounded to 8 bits, a difference in the last bit may change the rounding: an
error of 0.06 was observed."""


class Canary:
    """Checks the first rows of a run, and the first rows with images.

    Args:
        model: a transformers model.
        decoder: runs the same model for the slot engine.
        is_on: whether to check at all.
        is_scoring: whether the run scores choices instead of decoding over slots.
    """

    def __init__(self, model: Any, decoder: Decoder, *, is_on: bool, is_scoring: bool) -> None:
        self._model, self._decoder, self._is_scoring = model, decoder, is_scoring
        self._is_checked = self._has_checked_images = not is_on

    def check_new_kind(self, samples: Collection[Sample], images: ImageFeatures) -> bool:
        """Check some of these rows, unless rows of their kind were checked before.

        Args:
            samples: the next rows.
            images: encodes their images, and keeps the features for prefill.

        Returns:
            Whether rows were checked, which takes a second or more.

        Raises:
            ModelError: the logits differ, or the model cannot run over slots.
            DeviceError: the accelerator is broken.
        """
        has_images = any(sample.image_sizes for sample in samples)
        if self._is_checked and (self._has_checked_images or not has_images):
            return False
        self._is_checked = True
        self._has_checked_images = has_images
        try:
            check(self._model, self._decoder, samples, images, is_scoring=self._is_scoring)
        except torch.AcceleratorError as error:
            raise device_error(error) from error
        except ModelError:
            raise
        except NotImplementedError as error:
            raise ModelError(
                f"{type(self._model).__name__} cannot run over slots: {error}",
                hint="engine=generate runs it by transformers' generate()",
            ) from error
        except Exception as error:
            # Most likely an invalid row, or out of memory. The row's own error will say so.
            log.warning("the canary could not run: %s", failure_of(error).message)
            free_memory(self._decoder.device)
        return True


def check(
    model: Any,
    decoder: Decoder,
    samples: Collection[Sample],
    images: ImageFeatures,
    *,
    is_scoring: bool = False,
) -> None:
    """Compare the logits of the first two tokens of the shortest rows with `generate()`.

    Args:
        model: a transformers model.
        decoder: runs the same model for the slot engine.
        samples: candidates; the two shortest, those with images first, run in one pack.
        images: encodes their images.
        is_scoring: whether the second token is computed as a node of a choice tree.

    Raises:
        ModelError: the two differ by more than rounding.
    """
    start_s = time.perf_counter()
    # Rows with images first: they exercise more code.
    rows = sorted(samples, key=lambda s: (not s.image_sizes, s.prompt_tokens))[:_NUM_ROWS]
    expected = [_generated(model, row) for row in rows]
    first_B = torch.stack([token for _, _, token in expected])
    mine = _over_slots(decoder, rows, images, first_B, is_scoring=is_scoring)
    most = _MAX_ERROR.get(model.dtype, 0.3)
    if getattr(model, "is_quantized", False):
        most = _MAX_ERROR_QUANTIZED
    for step, logits_BV in enumerate(mine):
        for row, logits_V, pair in zip(rows, logits_BV, expected, strict=True):
            error = relative_error(logits_V, pair[step])
            # If generate()'s logits are not finite either, the row fails with that error later.
            is_judged = bool(pair[step].isfinite().all())
            if is_judged and not error <= most:
                raise ModelError(
                    f"{type(model).__name__} ({model.config.model_type}) answers differently over "
                    f"slots: the logits of token {step + 1} of row {row.row_index} are off by "
                    f"{error:.0%}",
                    hint="engine=generate runs it by transformers' generate(); please report this",
                )
    log.debug("canary: %d rows in %.2f s", len(rows), time.perf_counter() - start_s)


def relative_error(mine_V: Tensor, its_V: Tensor) -> float:
    """Return |mine - its| / |its - mean(its)|, with Euclidean norms; NaN if not finite."""
    mine_V, its_V = mine_V.float(), its_V.float()
    return float((mine_V - its_V).norm() / (its_V - its_V.mean()).norm())


@torch.inference_mode()
def _generated(model: Any, row: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Return `generate()`'s logits of a row's first two tokens, [V] each, and its first token."""
    inputs = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in collate([row], pad_id=0).items()
    }
    # generate() fills unset settings from the model's own config, so that config is replaced.
    plain = copy.copy(model)
    plain.generation_config = without_defaults(model.generation_config, pad_id=0)
    plain.generation_config.update(
        max_new_tokens=2,
        min_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = plain.generate(**inputs)
    # Ids may be suppressed, so the first token is not always the argmax of its logits.
    return out.logits[0][0], out.logits[1][0], out.sequences[0, -2]


def _over_slots(
    decoder: Decoder,
    rows: Sequence[Sample],
    images: ImageFeatures,
    first_B: Tensor,
    *,
    is_scoring: bool,
) -> tuple[Tensor, Tensor]:
    """Return the slot engine's logits of the first token, and of the second after `first_B`.

    Both are [B, V].
    """
    units = [images.units(row) for row in rows]
    for batch in batches(images.missing(u for own in units for u in own), max_cells=1 << 62):
        images.keep(batch, images.encode(batch))
    prompts = [decoder.prompt(row) for row in rows]
    features = images.joined(images.entries(u for own in units for u in own))
    if len(rows) == 1 and (tail := _tail(decoder, rows[0], prompts[0])):
        # A second row in the pack is needed to detect attention across rows.
        prompts.insert(0, tail)
        first_B = torch.cat([tail.ids_T[-1:], first_B])
    pieces = [Piece(prompt, 0, len(prompt)) for prompt in prompts]
    first_BV, packed = decoder.prefill(pieces, features, ends=range(len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    ends = list(accumulate(lengths))
    caches = [packed.row(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    if is_scoring:
        alone = np.ones((1, 1), dtype=bool)
        ids = first_B.cpu().numpy()
        branches = [
            Branches(prompt, past, ids[i : i + 1], alone)
            for i, (prompt, past) in enumerate(zip(prompts, caches, strict=True))
        ]
        return first_BV[-len(rows) :], decoder.branch(branches)[-len(rows) :]
    cache = SlotCache(packed.row(0, 1), num_slots=len(prompts), length=max(lengths) + 1)
    for slot, past in enumerate(caches):
        cache.put(slot, [past])
    second_BV = decoder.step(
        cache,
        Newest(
            first_B,
            torch.tensor(lengths, device=decoder.device),
            torch.tensor([prompt.rope_delta for prompt in prompts], device=decoder.device),
        ),
        [Span(0, len(prompts), max(lengths) + 1)],
    )
    return first_BV[-len(rows) :], second_BV[-len(rows) :]


def _tail(decoder: Decoder, row: Sample, prompt: Prompt) -> Prompt | None:
    """Return up to 16 text tokens at the end of a prompt as a prompt of their own; None if there
    are none."""
    places = decoder.image_places(row)
    if places is None and row.image_sizes:
        return None
    end = int(places.max()) + 1 if places is not None and len(places) else 0
    start = max(end, len(prompt) - _TAIL_TOKENS)
    if start == len(prompt):
        return None
    positions_RT = prompt.positions_RT[:, start:]
    return Prompt(
        ids_T=prompt.ids_T[start:],
        positions_RT=positions_RT - positions_RT[:, :1],
        rope_delta=0,
        types={name: types_T[start:] for name, types_T in prompt.types.items()},
    )

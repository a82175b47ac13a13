"""What a GPU would refuse or wait for in a decode step, seen without one.

Tensors on the "meta" device have no data: an operation that mixes them with tensors of the host
raises, and so does one that reads a value back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from batchvlm.engine.forward.cache import RowCache, SlotCache
from batchvlm.engine.forward.decoder import Decoder, Piece, Prompt
from batchvlm.engine.forward.layout import Newest, Span
from batchvlm.model.workarounds import patch_model

from .families import FAMILIES, Family, needs_slots

META = torch.device("meta")
NUM_SLOTS, LENGTH, NUM_TOKENS = 4, 64, 6
READS_BACK = {"step3p7"}
"""Families whose experts, in transformers, ask in each layer which of them have tokens."""


@needs_slots
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.why_not_slots_here], ids=lambda f: f.name
)
def test_a_decode_step_mixes_no_devices_and_reads_nothing_back(family: Family) -> None:
    if family.missing:
        pytest.skip(f"{family.title} needs {' and '.join(family.missing)}")
    model = family.build()[0]
    patch_model(model)
    # In half precision, as mixtures of experts have kernels for that alone.
    model = model.eval().to(torch.bfloat16)
    like = row_of(Decoder(copy.deepcopy(model)))
    decoder = Decoder(model.to(META))
    cache = SlotCache(like, num_slots=NUM_SLOTS, length=LENGTH)
    zeros_N = torch.zeros(NUM_SLOTS, dtype=torch.long, device=META)
    newest = Newest(zeros_N, zeros_N, zeros_N)
    spans = [Span(0, 2, LENGTH // 2), Span(2, 4, LENGTH)]
    if family.name in READS_BACK:
        with pytest.raises(NotImplementedError, match="nonzero"):
            decoder.step(cache, newest, spans)
        return
    logits_BV = decoder.step(cache, newest, spans)
    assert logits_BV.device == META and len(logits_BV) == NUM_SLOTS
    with_runs_BV = decoder.step(cache, newest, spans, {1: [5, 6], 3: [7]})
    assert with_runs_BV.shape == logits_BV.shape


def row_of(decoder: Decoder) -> RowCache:
    """The shapes that the model's keys and values have, on the device without data."""
    ids_T = torch.arange(NUM_TOKENS)
    types = {name: torch.zeros_like(ids_T) for name in decoder._types}
    prompt = Prompt(ids_T, ids_T[None], 0, types)
    _, packed = decoder.prefill([Piece(prompt, 0, NUM_TOKENS)], None, ends=[0])
    row = packed.row(0, 1)
    layers = [(keys.to(META), values.to(META)) for keys, values in row.layers]
    return RowCache(layers, row.latent_layers)


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.tolist, bool, Tensor.nonzero, lambda x: x + torch.zeros(1)]
)
def test_what_is_read_back_or_mixed_is_noticed(read: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        read(torch.zeros(1, device=META))

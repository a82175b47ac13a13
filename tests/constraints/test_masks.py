"""A bit for each token, applied to scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from batchvlm.constraints import masks as masks_module
from batchvlm.constraints.constraints import Constraints
from batchvlm.constraints.masks import apply_mask
from batchvlm.records import Form, FormKind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ids", [1, 31, 64, 70, 96, 120])
def test_only_tokens_whose_bit_is_set_keep_their_score(num_ids: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_ids)
    scores = torch.randn(5, num_ids, generator=generator).to(dtype)
    masks = torch.randint(-(2**31), 2**31, (5, 3), generator=generator).to(torch.int32)
    masks[3], masks[4] = 0, -1
    masked = apply_mask(scores, masks)
    assert masked.shape == scores.shape
    for i in range(5):
        for token in range(num_ids):
            word = int(masks[i, token // 32]) if token < 96 else 0
            expected = float(scores[i, token]) if word >> token % 32 & 1 else -torch.inf
            assert float(masked[i, token]) == expected, (i, token)


def test_a_bit_of_a_word_is_that_of_its_token() -> None:
    """Also the last, which is the sign."""
    scores_BV = torch.arange(64.0)[None]
    for token in range(64):
        mask_BW = torch.zeros(1, 2, dtype=torch.int32)
        mask_BW[0, token // 32] = masks_module._word(token % 32)
        assert apply_mask(scores_BV, mask_BW)[0].isfinite().nonzero().tolist() == [[token]]
    is_set_V = torch.rand(64, generator=torch.Generator().manual_seed(0)) < 0.5
    is_set_V[31], is_set_V[63] = True, False
    packed_BV = apply_mask(scores_BV, masks_module._pack(is_set_V)[None])
    assert torch.equal(packed_BV[0].isfinite(), is_set_V)


def test_text_that_reads_like_the_end_of_answers_is_text_behind_other_text() -> None:
    """Also where, as with Llama 2, a text that is tokenized alone begins with a blank."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abs</>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    constraints = Constraints(
        tokenizer,
        num_ids=len(names),
        eos_ids=[2],
        device=torch.device("cpu"),
        form=Form(FormKind.CHOICE, '["a</s>b"]'),
    )
    sample: Any = SimpleNamespace(form=None)
    row = constraints.begin(sample)
    assert row is not None
    said: list[int] = []
    while not row.is_over and row.is_held:
        mask = constraints.take([row])
        assert mask is not None
        scores = apply_mask(torch.zeros(1, len(names)), mask)
        said.append(int(scores[0].argmax()))
        row.commit(said[-1])
    constraints.close()
    assert tokenizer.decode(said[:-1]) == "a</s>b" and said[-1] == 2

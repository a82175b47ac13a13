"""A bit for each token, applied to scores."""

from __future__ import annotations

import pytest
import torch

from batchvlm.constraints.masks import apply_mask


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

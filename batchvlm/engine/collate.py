"""Samples of one batch -> the model's padded tensors.

Each sample is processed alone, so that it can be batched with any other. One rule joins the
processor's arrays of several rows: token rows are padded on the left; other arrays are zero-padded
in their trailing dimensions and concatenated on the first. The rule is exact for families with
images, patches, tiles or rows on the first dimension. `join_features` handles the exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchvlm.preprocess.pixels import to_numbers
from batchvlm.records import Array, Sample

# Shape legend: B rows of the batch, T padded prompt length, T_i length of row i.

TOKEN_TYPES = ("token_type_ids", "image_embeds_position_mask")
"""How the names of features end that have a number for each token: `mm_token_type_ids` too, and
ERNIE-4.5-VL's `moe_mm_token_type_ids`, which says whose experts a token has. Kosmos-2's mask says
which tokens are of the image."""
_NUM_COLOURS = 3
# Some processors return labels for every prompt; given them, a model computes a loss.
_NOT_COLLATED = ("input_ids", "attention_mask", "labels")
_LISTS = ("num_local_patches", "patches_grid")
"""Features of images that models may take as lists alone (Unlimited-OCR)."""


def left_pad(rows: Sequence[Array], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad token rows on the left to equal length.

    A decoder-only model continues from the last column, so padding must not be there.

    Args:
        rows: B arrays of token ids, shapes [T_i], each T_i >= 1.
        pad_id: id for padded cells; never attended to.

    Returns:
        ids_BT: int64 [B, T], T = max T_i.
        mask_BT: int64 [B, T], 1 on real tokens.

    Raises:
        ValueError: `rows` is empty or holds an empty row.
    """
    if not rows or not all(len(row) for row in rows):
        raise ValueError("left_pad needs at least one row and no empty row")
    longest = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids_BT[i, longest - len(row) :] = row
        mask_BT[i, longest - len(row) :] = 1
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


def right_pad(rows: Sequence[Array], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad token rows on the right: an encoder counts positions from the first column."""
    ids_BT, mask_BT = left_pad([row[::-1] for row in rows], pad_id=pad_id)
    return ids_BT.flip(1), mask_BT.flip(1)


def collate(
    samples: Sequence[Sample], *, pad_id: int, pads_right: bool = False
) -> dict[str, Tensor]:
    """Join samples into tensors for the model's `generate`.

    Args:
        samples: at least one.
        pad_id: id for padded cells.
        pads_right: pad on the right, for encoder-decoders.

    Returns:
        `input_ids` and `attention_mask` [B, T], padded; every other feature joined by
        `join_features` over the samples that have it. `as_arguments` makes arguments of it.
    """
    pad = right_pad if pads_right else left_pad
    ids_BT, mask_BT = pad([s.features["input_ids"][0] for s in samples], pad_id=pad_id)
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT}
    names = dict.fromkeys(name for sample in samples for name in sample.features)
    for name in names:
        if name.endswith(TOKEN_TYPES):
            # A text-only row may lack the feature that marks image tokens.
            rows = [
                s.features[name][0]
                if name in s.features
                else np.zeros(s.prompt_tokens, dtype=np.int64)
                for s in samples
            ]
            batch[name], _ = pad(rows, pad_id=0)
    joined = {name for name in names if not name.endswith(TOKEN_TYPES)} - {*_NOT_COLLATED}
    rest = [{n: a for n, a in with_numbers(s).items() if n in joined} for s in samples]
    return batch | join_features(rest)


def as_arguments(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a batch from `collate` in the form in which models take it."""
    return {n: tensor.tolist() if n in _LISTS else tensor for n, tensor in batch.items()}


def with_numbers(sample: Sample) -> Mapping[str, Array]:
    """Return a sample's features, with uint8 pixels rescaled and normalized as the processor
    would."""
    if sample.pixel_table is None:
        return sample.features
    pixels = torch.from_numpy(sample.features["pixel_values"])
    numbers = to_numbers(sample.pixel_table, pixels, torch.float32).numpy()
    return {**sample.features, "pixel_values": numbers}


def join_features(
    rows: Sequence[Mapping[str, Array]], *, is_pinned: bool = False
) -> dict[str, Tensor]:
    """Join the processor's image features of several rows.

    Args:
        rows: arrays by name; a row may have none.
        is_pinned: allocate the result in pinned memory.

    Returns:
        Each feature, concatenated on its first dimension over the rows that have it; MiniCPM-V's
        patches on their last.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    joined = {}
    for name in names:
        arrays = [row[name] for row in rows if name in row]
        if name == "pixel_values" and "target_sizes" in names:
            joined[name] = torch.from_numpy(np.concatenate(arrays, axis=-1))
            continue
        if set(names) == {"pixel_values"} and arrays[0].shape[2:-2] == (_NUM_COLOURS,):
            # PerceptionLM encodes every tile it is given: a tile of zeros would count as one.
            arrays = [a.reshape(-1, 1, *a.shape[2:]) for a in arrays]
        if name == "image_token_pooling":
            # Molmo 2: for each token, the indices of its patches among all patches of the row
            # ([crops, patches, ..] flattened); -1 for none.
            counts = [row["pixel_values"].shape[:2] for row in rows if name in row]
            first = np.cumsum([0, *(crops * patches for crops, patches in counts)])
            arrays = [np.where(a < 0, a, a + n) for a, n in zip(arrays, first, strict=False)]
        joined[name] = _concatenate(arrays, is_pinned=is_pinned)
    return joined


def _concatenate(arrays: Sequence[Array], *, is_pinned: bool) -> Tensor:
    """Concatenate arrays on the first dimension, zero-padded to the largest trailing sizes."""
    trailing = tuple(max(sizes) for sizes in zip(*(a.shape[1:] for a in arrays), strict=True))
    dtype = torch.from_numpy(arrays[0][:0]).dtype
    shape = (sum(len(a) for a in arrays), *trailing)
    joined = torch.empty(shape, dtype=dtype, pin_memory=is_pinned)
    if any(a.shape[1:] != trailing for a in arrays):
        joined.zero_()
    out = joined.numpy()
    start = 0
    for array in arrays:
        region = (slice(start, start + len(array)), *(slice(size) for size in array.shape[1:]))
        out[region] = array
        start += len(array)
    return joined

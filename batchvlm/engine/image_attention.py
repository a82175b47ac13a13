"""Attention over the patches of packed images, on a GPU in one call for all of them.

Encoders of Qwen-VL's kind and Pixtral's take images behind one another. transformers tells them
apart by where they begin for flash attention alone; for any other kernel it calls it window by
window, thousands of times a batch, or makes a dense mask over all patches. So the encoder is told
that it has flash attention, by a name, and gets torch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from batchvlm.engine import flash

# Shape legend: T patches of all images, I images or windows, H heads, D head size.

NAME = "batchvlm_flash_images"
"""transformers looks for "flash" in it."""

_WITHOUT_GRID = frozenset({"pixtral"})
"""Encoders of packed images whose processors give no patch grid."""


@torch.library.custom_op("batchvlm::attend_images", mutates_args=())
def attend_images(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    starts_I1: Tensor,
    longest: int,
    scaling: float,
) -> Tensor:
    """Let patches of each image or window attend to one another.

    Opaque to `torch.compile`, which would otherwise look into it at every length anew.

    Args:
        query_THD: [T, H, D]; the others likewise.
        key_THD: see `query_THD`.
        value_THD: see `query_THD`.
        starts_I1: int32 [I + 1], where each begins and the last one ends.
        longest: patches of the longest one.
        scaling: factor on the scores.

    Returns:
        [T, H, D].
    """
    if flash.is_able(query_THD):
        bounds = flash.Bounds(
            query_B1=starts_I1, key_B1=starts_I1, max_queries=longest, max_keys=longest
        )
        return flash.attend(query_THD, key_THD, value_THD, bounds, scaling=scaling, is_causal=False)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
    for start, stop in pairwise(starts_I1.tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query_THD, key_THD, value_THD))
        attended_HTD = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out_THD[start:stop] = attended_HTD.transpose(0, 1)
    return out_THD


@attend_images.register_fake
def _(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    starts_I1: Tensor,
    longest: int,
    scaling: float,
) -> Tensor:
    return torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend; the signature is that of transformers' attention functions.

    Args:
        module: the layer's attention module.
        query: [1, H, T, D]; `key` and `value` likewise.
        attention_mask: what may be seen, where the encoder says it by a mask.
        scaling: factor on the scores.
        cu_seq_lens_q: int32 [I + 1], where images or windows begin.
        max_length_q: patches of the longest one.

    Returns:
        [1, T, H, D].
    """
    if cu_seq_lens_q is None or max_length_q is None:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    out_THD = attend_images(q_THD, k_THD, v_THD, cu_seq_lens_q, max_length_q, scale)
    return out_THD[None], None


def encoder_configs(model: Any) -> list[Any]:
    """Configs of a model's encoder, to be named anew while it runs.

    Empty where the encoder does not take packed images, and where torch has no flash attention for
    this model.
    """
    if model.device.type != "cuda" or model.dtype not in (torch.float16, torch.bfloat16):
        return []
    config = getattr(model.config, "vision_config", None)
    parameters = inspect.signature(model.base_model.get_image_features).parameters
    if config is None or not ("image_grid_thw" in parameters or config.model_type in _WITHOUT_GRID):
        return []
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [its for its in configs.values() if type(its) is type(config)]


@contextmanager
def attending(configs: list[Any]) -> Iterator[None]:
    """Name this attention in an encoder's configs while it runs."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


AttentionInterface.register(NAME, attention)

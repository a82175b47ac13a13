"""Attention over the patches of images: on a GPU in one call for all images.

Encoders like Qwen-VL's and Pixtral's take concatenated images. Only for flash attention does
transformers pass the images' offsets. Any other kernel it calls window by window, thousands of
times a batch, or with a dense mask over all patches. So the encoder's config gets a name that looks
like flash attention, under which torch's own flash attention is registered.

On a CPU plain matrix products replace torch's attention if they are faster.
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from batchvlm.engine.forward import cpu_attention, flash

# Shape legend: B images of T patches each, or T patches of all I images or windows, H heads, D head
# size.

NAME = "batchvlm_flash_images"
"""The implementation on a GPU: transformers looks for "flash" in the name."""

NAME_ON_CPU = "batchvlm_images"
"""The implementation on a CPU, whose name must not contain "flash"."""

_WITHOUT_GRID = frozenset({"pixtral"})
"""Encoders of concatenated images whose processors return no patch grid."""


@torch.library.custom_op("batchvlm::attend_images", mutates_args=())
def attend_images(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    starts_I1: Tensor,
    longest: int,
    scaling: float,
) -> Tensor:
    """Attend among the patches of each image or window.

    A custom operator, because `torch.compile` would otherwise trace it again for every length.

    Args:
        query_THD: [T, H, D]; the others likewise.
        key_THD: see `query_THD`.
        value_THD: see `query_THD`.
        starts_I1: int32 [I + 1], the offset of each image or window, and the end of the last.
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
        attention_mask: the mask, if the encoder passes one in place of offsets.
        scaling: factor on the scores; None: one over the root of D.
        cu_seq_lens_q: int32 [I + 1], the offsets of images or windows.
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


def attention_on_cpu(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend on a CPU, by products where these are faster; the signature is that of `attention`.

    Args:
        module: the layer's attention module.
        query: [B, H, T, D]; `key` and `value` likewise.
        attention_mask: if there is one, torch's own attention is used.
        scaling: factor on the scores; None: one over the root of D.

    Returns:
        [B, T, H, D].
    """
    num_heads, num_tokens, size = query.shape[1:]
    if (
        attention_mask is None
        and not kwargs.get("is_causal", getattr(module, "is_causal", True))
        and query.shape == key.shape == value.shape
        and num_tokens >= cpu_attention.FEWEST_TOKENS
        and cpu_attention.are_faster_for_images(num_heads, size, query.dtype)
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return cpu_attention.attend_images(query, key, value, scale).transpose(1, 2), None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return out, None


def encoder_configs(model: Any) -> tuple[str, list[Any]]:
    """The name of the attention for a model's encoder, and the configs in which to set it.

    The list of configs is empty if the encoder keeps its own attention.
    """
    config = getattr(model.config, "vision_config", None)
    is_half = model.dtype in (torch.float16, torch.bfloat16)
    if config is None or not is_half:
        return NAME, []
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    own = [its for its in configs.values() if type(its) is type(config)]
    if model.device.type == "cuda":
        parameters = inspect.signature(model.base_model.get_image_features).parameters
        is_packed = "image_grid_thw" in parameters or config.model_type in _WITHOUT_GRID
        return NAME, own if is_packed else []
    is_replaceable = model.device.type == "cpu" and config._attn_implementation == "sdpa"
    return NAME_ON_CPU, own if is_replaceable else []


def run_trials(configs: list[Any], dtype: torch.dtype) -> None:
    """Time products against torch's attention on a CPU, before other work could disturb the trial.

    Encoders whose configs name their heads otherwise run the trial at their first image.
    """
    for config in configs:
        num_heads = getattr(config, "num_heads", None) or getattr(
            config, "num_attention_heads", None
        )
        width = getattr(config, "embed_dim", None) or getattr(config, "hidden_size", None)
        if num_heads and width:
            cpu_attention.are_faster_for_images(num_heads, width // num_heads, dtype)


@contextmanager
def attending(name: str, configs: list[Any]) -> Iterator[None]:
    """Set the attention in an encoder's configs, within this context."""
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


AttentionInterface.register(NAME, attention)
AttentionInterface.register(NAME_ON_CPU, attention_on_cpu)
AttentionMaskInterface.register(NAME_ON_CPU, sdpa_mask)

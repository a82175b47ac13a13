"""Estimate the memory that a model needs without loading its weights."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batchvlm.config import EngineName, JobConfig, ModelConfig
from batchvlm.engine.forward.cache import cached_layers
from batchvlm.engine.select import name_engine
from batchvlm.engine.slots.memory import MemoryPlan, free_bytes
from batchvlm.model.loading import load_skeleton
from batchvlm.model.quantization import (
    check_installed,
    modules_to_skip,
    quantization_config,
    quantized_bytes,
)
from batchvlm.runtime.ranks import find_device


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The memory of a model on a device, and the engine that would run it."""

    class_name: str
    dtype: str
    num_params: int
    weight_bytes: int
    token_bytes: int
    """Size of the keys and values of one token, if all layers keep all tokens."""
    device: str
    free_bytes: int
    """Free memory of the device before the weights are loaded."""
    engine: EngineName
    """`slots` or `generate`."""
    reason: str
    """Why the engine is not `slots`; "" if it is."""
    num_slots: int
    """Number of rows of the greatest length whose cache fits into memory at once."""


def estimate_footprint(cfg: JobConfig, *, row_tokens: int) -> Footprint:
    """Estimate a model's memory without loading its weights.

    Args:
        row_tokens: tokens of prompt and answer of the longest row.

    Raises:
        ModelError: no engine, or not the one in the settings, can run the model.
        ConfigError: `engine.device` names a device that does not exist.
    """
    model = load_skeleton(cfg.model)
    device = torch.device(find_device(cfg))
    weight_bytes = _weight_bytes(model, cfg.model)
    name, reason = name_engine(model, cfg, device=device)
    # In a model of several dtypes, keys and values have that of the language model.
    kept = model.get_input_embeddings().weight.dtype
    token_bytes = _token_bytes(model.config.get_text_config(decoder=True), kept)
    dtypes = {p.dtype: None for p in model.parameters() if p.is_floating_point()}
    dtype = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    kind = cfg.model.quantization
    method = _method_of(model.config) if kind is None else kind.value
    if method is not None:
        dtype += f" and {method}"
    plan = MemoryPlan(cfg.engine, device, taken_bytes=weight_bytes)
    return Footprint(
        class_name=type(model).__name__,
        dtype=dtype,
        num_params=sum(p.numel() for p in model.parameters()),
        weight_bytes=weight_bytes,
        token_bytes=token_bytes,
        device=str(device),
        free_bytes=free_bytes(device),
        engine=name,
        reason=reason,
        num_slots=plan.num_slots(token_bytes, max(1, row_tokens)),
    )


def _method_of(config: Any) -> str | None:
    """Return the name of the method by which a checkpoint was quantized; None if it was not."""
    found = getattr(config, "quantization_config", None)
    return found.get("quant_method") if isinstance(found, dict) else None


def _weight_bytes(model: Any, cfg: ModelConfig) -> int:
    """Return the bytes of the weights; if they will be quantized, also set this in model.config.

    The skeleton of a checkpoint that is quantized already has the shapes of its original, so the
    bytes are those of the files.

    Raises:
        ModelError: the quantization library is missing, or the model lacks a module to skip.
    """
    kind = cfg.quantization
    if kind is None:
        if getattr(model.config, "quantization_config", None) is not None:
            with suppress(OSError, KeyError):  # not in safetensors, or the Hub cannot be reached
                return _saved_bytes(cfg)
        return sum(p.numel() * p.element_size() for p in model.parameters())
    check_installed(kind)
    skip = modules_to_skip(model, cfg.quantization_skip)
    # The choice of the engine depends on this.
    model.config.quantization_config = quantization_config(kind, skip, dtype=model.dtype)
    return quantized_bytes(model, kind, skip)


def _saved_bytes(cfg: ModelConfig) -> int:
    """Return the bytes of a checkpoint's weights, by its index or the size of its only file.

    Raises:
        OSError: it has neither, or the Hub cannot be reached.
        KeyError: the index does not tell.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    try:
        index = cached_file(cfg.path, SAFE_WEIGHTS_INDEX_NAME, revision=cfg.revision)
    except OSError:
        if os.path.isdir(cfg.path):
            return os.path.getsize(os.path.join(cfg.path, SAFE_WEIGHTS_NAME))
        url = hf_hub_url(cfg.path, SAFE_WEIGHTS_NAME, revision=cfg.revision)
        size = get_hf_file_metadata(url).size
        if size is None:
            raise
        return size
    assert index is not None
    return int(json.loads(Path(index).read_bytes())["metadata"]["total_size"])


def _token_bytes(text: Any, dtype: torch.dtype) -> int:
    return sum(heads.num_cached * dtype.itemsize for heads in cached_layers(text))

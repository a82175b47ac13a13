"""A dtype per part of a model, such as float32 for the vision tower and bfloat16 for the rest.

transformers accepts such a mapping but sets one dtype for all modules. Here each part is cast after
loading, and a forward pre-hook casts its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchvlm.errors import ModelError

REST = "rest"
"""Key for everything outside the named parts; transformers uses an empty string."""
_ONE_DTYPE = frozenset({"kosmos-2"})
"""Types whose language model adds positions in the widest dtype to embeddings in its own."""


def saved_dtype(config: Any) -> torch.dtype:
    """Return the dtype in which the weights were saved, by the config; float32 if it has none."""
    text = config.get_text_config(decoder=True)
    saved = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, saved) if isinstance(saved, str) else saved


def part_dtypes(setting: Mapping[str, str], config: Any) -> dict[str, torch.dtype]:
    """Resolve `model.dtype` to a torch dtype per part.

    Args:
        setting: name of a sub-config, or `rest` -> `auto` or the name of a dtype.
        config: config of the model.

    Returns:
        The dtypes of the named sub-configs and, always, of `rest`.

    Raises:
        ModelError: the model has no such part, or one dtype alone.
    """
    if config.model_type in _ONE_DTYPE:
        raise ModelError(
            f"model.dtype: a model of type {config.model_type} has one dtype for all its parts",
            hint="set one, such as model.dtype=bfloat16",
        )
    saved = saved_dtype(config)
    parts = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    dtypes = {REST: saved}
    for key, name in setting.items():
        if key and key not in (*parts, REST):
            raise ModelError(
                f"model.dtype names {key}, which is no part of this model",
                hint=f"there are {', '.join([*parts, REST])}",
            )
        dtypes[key or REST] = saved if name == "auto" else getattr(torch, name)
    return dtypes


def widest(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the dtype to which all of these promote."""
    return reduce(torch.promote_types, dtypes.values())


def cast_parts(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast the weights of each part of a model, and hook its modules to cast their inputs.

    Args:
        model: a transformers model in the widest of these dtypes.
        dtypes: from `part_dtypes`.

    Raises:
        ModelError: a part has no module of its own.
    """
    configs = {id(getattr(model.config, key)): dtypes[key] for key in dtypes if key != REST}
    special = {
        id(module): configs[id(module.config)]
        for module in model.modules()
        if module is not model and id(getattr(module, "config", None)) in configs
    }
    found = {id(getattr(module, "config", None)) for module in model.modules()}
    for key in dtypes:
        if key != REST and id(getattr(model.config, key)) not in found:
            raise ModelError(
                f"model.dtype names {key}, which is no module of its own in {type(model).__name__}",
                hint=f"its weights have the dtype of {REST}",
            )
    # Only what a checkpoint holds is cast: rotary frequencies keep their precision. So do weights
    # that transformers uses in float32 whatever the dtype (those that choose experts in Inkling 2).
    is_saved = model.state_dict().keys()
    saved = {*model.named_parameters(), *model.named_buffers()}
    parts = [f".{part}." for part in model._keep_in_fp32_modules_strict or ()]
    kept = {id(weight) for name, weight in saved if any(part in f".{name}." for part in parts)}
    uncast = {
        id(weight): weight for name, weight in saved if name in is_saved and id(weight) not in kept
    }
    head = model.get_output_embeddings()
    if head is not None and "text_config" in dtypes:
        is_kept = id(head.weight) in kept
        special[id(head)] = torch.float32 if is_kept else dtypes["text_config"]
    for module, dtype in _uniform_modules(model, special, dtypes[REST]):
        for weight in (*module.parameters(), *module.buffers()):
            _cast(uncast.pop(id(weight), None), dtype)
        module.register_forward_pre_hook(_CastInputs(dtype), with_kwargs=True)
    _merge_in_any_dtype(model.base_model)
    # Weights of the model itself or of a parent module, such as LLaVA-NeXT's `image_newline`.
    for weight in uncast.values():
        _cast(weight, dtypes[REST])


def _merge_in_any_dtype(model: nn.Module) -> None:
    """Let image features take the places of embeddings of another dtype.

    SmolVLM and Molmo 2 cast them to the dtype of the model's first weight, or not at all.
    """
    forward = model.forward

    @wraps(forward)
    def merging(*args: Any, **kwargs: Any) -> Any:
        with _Merging():
            return forward(*args, **kwargs)

    model.forward = merging


class _Merging(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.masked_scatter and len(args) == 3:
            args = (*args[:2], args[2].to(args[0].dtype))
        return func(*args, **(kwargs or {}))


def _cast(weight: Tensor | None, dtype: torch.dtype) -> None:
    if weight is not None and weight.is_floating_point():
        weight.data = weight.data.to(dtype)


def _uniform_modules(
    module: nn.Module, special: Mapping[int, torch.dtype], rest: torch.dtype
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Yield the largest submodules of uniform dtype, with that dtype."""
    for child in module.children():
        if id(child) in special:
            yield child, special[id(child)]
        elif any(id(inner) in special for inner in child.modules()):
            yield from _uniform_modules(child, special, rest)
        else:
            yield child, rest


class _CastInputs:
    """A forward pre-hook that casts floating-point inputs to one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._cast(args), self._cast(kwargs)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        # Exact types only: a KV cache, which may be a subclass, must not be copied.
        if type(value) is dict:
            return {key: self._cast(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cast(inner) for inner in value)
        return value

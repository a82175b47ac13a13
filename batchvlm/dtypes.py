"""A dtype for each part of a model, such as images in float32 before a language model in bfloat16.

transformers takes such a mapping and sets one dtype for all modules, so it is done here: a part is
cast once it has loaded, and what comes into it is cast on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from batchvlm.errors import ModelError

REST = "rest"
"""Names what belongs to no part that is named; transformers writes an empty text."""


def saved_dtype(config: Any) -> torch.dtype:
    """The dtype that a model's config says its weights were saved in; float32 where it does not."""
    text = config.get_text_config(decoder=True)
    saved = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, saved) if isinstance(saved, str) else saved


def part_dtypes(setting: Mapping[str, str], config: Any) -> dict[str, torch.dtype]:
    """What `model.dtype` asks of each part that a model has.

    Args:
        setting: names of the config's sub-configs, and `rest`, -> `auto` or a dtype's name.
        config: the model's.

    Returns:
        The named sub-configs and, always, `rest`.

    Raises:
        ModelError: the model has no such part.
    """
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
    """The dtype that holds the numbers of all the others."""
    return reduce(torch.promote_types, dtypes.values())


def cast_parts(model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
    """Cast each part of a model, and from now on the numbers that come into it.

    Args:
        model: a transformers model in the widest of these dtypes.
        dtypes: from `part_dtypes`.
    """
    configs = {id(getattr(model.config, key)): dtypes[key] for key in dtypes if key != REST}
    own = {
        id(module): configs[id(module.config)]
        for module in model.modules()
        if module is not model and id(getattr(module, "config", None)) in configs
    }
    head = model.get_output_embeddings()
    if head is not None and "text_config" in dtypes:
        own[id(head)] = dtypes["text_config"]
    # What a checkpoint holds: the angles of rotary positions stay as precise as they are.
    is_saved = model.state_dict().keys()
    saved = {*model.named_parameters(), *model.named_buffers()}
    left = {id(weight): weight for name, weight in saved if name in is_saved}
    for module, dtype in _tops(model, own, dtypes[REST]):
        for weight in (*module.parameters(), *module.buffers()):
            _cast(left.pop(id(weight), None), dtype)
        module.register_forward_pre_hook(_CastInputs(dtype), with_kwargs=True)
    # Of no module below, such as the row that ends a line of an image's patches.
    for weight in left.values():
        _cast(weight, dtypes[REST])


def _cast(weight: Tensor | None, dtype: torch.dtype) -> None:
    if weight is not None and weight.is_floating_point():
        weight.data = weight.data.to(dtype)


def _tops(
    module: nn.Module, own: Mapping[int, torch.dtype], rest: torch.dtype
) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The largest modules that are of one dtype throughout."""
    for child in module.children():
        if id(child) in own:
            yield child, own[id(child)]
        elif any(id(inner) in own for inner in child.modules()):
            yield from _tops(child, own, rest)
        else:
            yield child, rest


class _CastInputs:
    """A module's forward pre-hook."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return self._cast(args), self._cast(kwargs)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._dtype) if value.is_floating_point() else value
        # Exactly these: a cache of keys and values is not to be copied.
        if type(value) is dict:
            return {key: self._cast(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cast(inner) for inner in value)
        return value

"""The tensors that image encoders derive from patch grids, computed on the host.

Encoders like Qwen-VL's get each image's patch grid and derive positions, windows and sequence
offsets from it. If the grids are on a GPU, they read them back one by one; each read synchronizes,
after which the GPU idles until the next launch. transformers also accepts the derived tensors as
arguments, under the names of `transformers.vision_utils`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# Shape legend: I images.

_NEEDED = ("get_vision_attention_seqlens", "get_vision_position_ids")
_PER_FRAME = "get_vision_frame_index"
"""Encoders with this function need more for the frames of a video than is computed here."""


def find_encoder(model: Any) -> nn.Module | None:
    """The model's encoder that takes patch grids; None if it does not accept derived tensors."""
    for module in model.modules():
        functions = vars(sys.modules[type(module).__module__])
        if "grid_thw" in inspect.signature(module.forward).parameters:
            is_known = all(name in functions for name in _NEEDED) and _PER_FRAME not in functions
            return module if is_known else None
    return None


def grid_inputs(encoder: nn.Module, grids_I3: Tensor) -> dict[str, Any]:
    """Compute what an encoder would derive from its images' patch grids.

    Args:
        encoder: an encoder that `find_encoder` returned.
        grids_I3: int64 [I, 3], frames, rows and columns of patches of each image, on the host.

    Returns:
        Tensors on the host and numbers, by the names of the encoder's arguments.

    Source: `transformers.exporters.utils`, which takes seconds to import.
    """
    functions: dict[str, Callable[..., Any]] = vars(sys.modules[type(encoder).__module__])
    merge_size = _attribute(encoder, "spatial_merge_size") or 1
    made: dict[str, Any] = {}
    made["cu_seqlens"], made["max_seqlen"] = functions["get_vision_attention_seqlens"](
        grids_I3, encoder.config
    )
    made["position_ids"] = functions["get_vision_position_ids"](grids_I3, merge_size)
    if window := functions.get("get_vision_window_index"):
        made["window_index"], made["cu_window_seqlens"] = window(
            grids_I3,
            merge_size,
            _attribute(encoder, "window_size"),
            _attribute(encoder, "patch_size"),
        )
        made["max_window_seqlen"] = functions["get_max_seqlen"](
            made["cu_window_seqlens"], encoder.config
        )
    if interpolate := functions.get("get_vision_interpolation_indices_and_weights"):
        made["interp_indices"], made["interp_weights"] = interpolate(
            grids_I3,
            _attribute(encoder, "num_grid_per_side"),
            mode=_attribute(encoder, "interpolation_mode") or "bilinear",
            padding=_attribute(encoder, "interpolation_padding") or "border",
            align_corners=_attribute(encoder, "interpolation_align_corners") is True,
            spatial_merge_size=merge_size,
        )
    return {name: value for name, value in made.items() if value is not None}


def _attribute(encoder: nn.Module, name: str) -> Any:
    """The first attribute of this name that is not None, of the encoder or of its submodules."""
    for module in encoder.modules():
        value = getattr(module, name, None)
        if value is not None:
            return value
    return None

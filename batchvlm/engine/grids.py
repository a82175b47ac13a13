"""What image encoders make of patch grids, worked out on the host.

Encoders of Qwen-VL's kind get the number of patches of each image, and make places, windows and
bounds of it. From numbers on a GPU they read these back one by one, and each time wait for all that
was launched before; then the GPU waits for what comes next. transformers takes all of it from
outside too, under the names of `transformers.vision_utils`.
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
"""Encoders with this function put more between the frames of a video than is made here."""


def find_encoder(model: Any) -> nn.Module | None:
    """The part of a model that makes something of patch grids; None where none takes it made."""
    for module in model.modules():
        functions = vars(sys.modules[type(module).__module__])
        if "grid_thw" in inspect.signature(module.forward).parameters:
            is_known = all(name in functions for name in _NEEDED) and _PER_FRAME not in functions
            return module if is_known else None
    return None


def made_of_grids(encoder: nn.Module, grids_I3: Tensor) -> dict[str, Any]:
    """What an encoder would make of its images' patch grids, by the names of its arguments.

    Args:
        encoder: as `find_encoder` finds it.
        grids_I3: int64 [I, 3], frames, rows and columns of patches of each image, on the host.

    Returns:
        Tensors on the host, and numbers.

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
    """The first of this name, of the encoder or of one of its parts."""
    for module in encoder.modules():
        value = getattr(module, name, None)
        if value is not None:
            return value
    return None

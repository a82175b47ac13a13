"""Faults of transformers' processors and models, worked around where they are loaded."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

_NEED_TOKEN_TYPES = frozenset({"Cosmos3EdgeProcessor"})
"""Processors of models that raise without token types, which these do not return by themselves."""


def patch_processor(processor: Any) -> None:
    """Set what a processor should have by itself, in place."""
    if type(processor).__name__ in _NEED_TOKEN_TYPES:
        processor.return_mm_token_type_ids = True


def patch_model(model: Any) -> None:
    """Let a model run that raises as it is, in place."""
    if model.config.model_type == "llama4":
        # In transformers 5.24 it reads a field of its language model's output that is not there.
        model.language_model.register_forward_hook(_with_image_outputs)


def _with_image_outputs(module: Any, args: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


@contextlib.contextmanager
def without_video(has_torchvision: bool) -> Iterator[None]:
    """Avoid failures of video processors, which are not used here, while a processor loads."""
    if has_torchvision:
        from transformers.video_processing_utils import BaseVideoProcessor

        # transformers 5.17 and 5.18 pass the image backend on to video processors, which raise.
        with _replaced(BaseVideoProcessor, "from_dict") as from_dict:

            def without_backend(cls: type, values: Any, /, **kwargs: Any) -> Any:
                kwargs.pop("backend", None)
                return from_dict(cls, values, **kwargs)

            setattr(BaseVideoProcessor, "from_dict", classmethod(without_backend))  # noqa: B010
            yield
        return
    from transformers import ProcessorMixin

    # Video processors need torchvision, and processors like Qwen-VL's do not load without theirs.
    # No row here is a video, so the video processor is left out.
    with _replaced(ProcessorMixin, "get_attributes") as get_attributes:

        def without_video(cls: type) -> list[str]:
            return [name for name in get_attributes(cls) if name != "video_processor"]

        setattr(ProcessorMixin, "get_attributes", classmethod(without_video))  # noqa: B010
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str) -> Iterator[Any]:
    """Yield the function of a class method, and restore the class method on exit."""
    original = inspect.getattr_static(owner, name)
    try:
        yield original.__func__
    finally:
        setattr(owner, name, original)

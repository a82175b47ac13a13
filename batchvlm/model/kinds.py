"""Kinds of models: the auto classes of transformers, and what some model types do otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchvlm.errors import ModelError

_OTHERWISE = {
    "diffusion_gemma": "it writes by diffusion, not token by token",
    "evolla": "it reads proteins, not images",
    "instructblipvideo": "it reads videos alone",
    "pi0": "it answers with movements of a robot",
    "pix2struct": "its prompt is drawn into the image, or begins the answer",
    "pp_formulanet": "it takes no prompt",
    "shieldgemma2": "its processor puts questions of its own in place of the prompt",
    "udop": "it needs the words of a page and their places",
}
"""Types among transformers' image-text-to-text that do not answer a prompt and images with text."""


def check_answers(model_type: str) -> None:
    """Refuse a model that does another thing than answer a prompt and images with text.

    Raises:
        ModelError: it does.
    """
    if why := _OTHERWISE.get(model_type):
        raise ModelError(f"models of type {model_type} are not supported: {why}")


def reads_prompts(config: Any) -> bool:
    """Whether an encoder reads the prompt, so that the decoder's output begins with the answer.

    Donut is an encoder-decoder too, but its encoder reads the image alone, and its prompt is the
    beginning of the decoder's output.

    Args:
        config: of a transformers model.
    """
    return bool(config.is_encoder_decoder) and config.model_type != "vision-encoder-decoder"


def from_auto_class(make: Callable[[Any], Any], *, has_remote_code: bool) -> Any:
    """Create a model with the first of transformers' auto classes that supports its config.

    Args:
        make: creates it with a class.
        has_remote_code: whether code of the model's repository may run.

    Raises:
        ValueError: no class supports it.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    autos: list[Any] = [AutoModelForImageTextToText, AutoModelForMultimodalLM]
    if has_remote_code:
        # Remote code may register itself under these as well.
        autos += [AutoModelForCausalLM, AutoModel]
    for auto in autos:
        try:
            return make(auto)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            unknown = error
    raise unknown

"""The model's chat template: which one it is, its variables, and messages -> token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from batchvlm.errors import ConfigError, ErrorType, ModelError, RowError
from batchvlm.records import Array

_RENDERED = ("messages", "tools", "documents", "add_generation_prompt")
"""Variables of chat templates that are set for each prompt."""
_CONSTANTS = ("true", "false", "none")
_NONE: Mapping[str, Any] = {}
_MAX_NAME_CHARS = 80


def default_template(processor: Any) -> str | None:
    """Return the processor's only or default chat template; None if it has none."""
    found: Any = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(found, dict) and "default" not in found:
        raise ModelError(
            f"the model has chat templates named {', '.join(sorted(found))} and none as default",
            hint="give the text of one by model.processor_kwargs.chat_template",
        )
    template: str | None = found["default"] if isinstance(found, dict) else found
    return template


def check_variables(template: str | None, variables: Iterable[str]) -> None:
    """Check that a model's chat template, if it has one, takes variables of these names.

    Raises:
        ConfigError: the template does not name one, or it is one that every prompt sets.
    """
    if why := _why_not_set(template, variables):
        raise ConfigError(
            f"model.chat_template_kwargs: {why}", hint="check the spelling, or leave it out"
        )


def _why_not_set(template: str | None, names: Iterable[str]) -> str:
    """Return why a variable of one of these names cannot be set; "" if all can."""
    for name in names:
        shown = repr(name[:_MAX_NAME_CHARS])
        if template is None or not re.search(rf"\b{re.escape(name)}\b", template):
            return f"the model's chat template has no variable {shown}"
        if not name.isidentifier() or name in _RENDERED or name.lower() in _CONSTANTS:
            return f"{shown} is no variable to set"
    return ""


def _with_variables(template: str, variables: Mapping[str, Any]) -> str:
    """Return a chat template that begins by setting variables to JSON values."""
    # The line break after a block is no part of a prompt: transformers sets `trim_blocks`.
    sets = (f"{{% set {name} = {value!r} %}}\n" for name, value in variables.items())
    return "".join(sets) + template


def check_prompt_tokens(processor: Any, tokens: Sequence[str]) -> None:
    """Check the tokens that the text of prompts may spell.

    Raises:
        ConfigError: the tokenizer does not have one of them, or it stands for an image.
    """
    known = processor.tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            raise ConfigError(
                f"model.prompt_tokens: the model's tokenizer has no token {token!r}",
                hint="check the spelling, or leave it out",
            )
        if token in _slots(processor):
            raise ConfigError(
                f"model.prompt_tokens: {token!r} stands for an image or the like",
                hint="images come from columns and messages",
            )


def _slots(processor: Any) -> set[str]:
    """Return the tokens of a processor that stand for images and other inputs."""
    names = (
        *("image_token", "video_token", "audio_token", "boi_token", "fake_image_token"),
        # What Qianfan-OCR's chat template writes for an image, which is no token.
        "image_placeholder_token",
    )
    return {str(token) for name in names if (token := getattr(processor, name, None))}


class ChatTemplate:
    """Renders a processor's chat template, with control tokens in the text of rows escaped.

    A model that was not trained to chat has no template. Its prompt is the plain text, with the
    processor's image token for each image.

    "<image>" in the text of a row would become an image slot, and "<|im_end|>" would end the user's
    turn. A space is inserted after the first character of such text, which keeps it readable.

    Args:
        processor: from `load_processor`.
        allowed: control tokens that are not escaped.
        variables: the model's variables of the template, checked by `check_variables`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        allowed: Sequence[str] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._processor = processor
        self._variables = {**(variables or {})}
        self._template: str | None = processor.chat_template
        self._slot = _image_slot(processor) if self._template is None else ""
        # Lists of images within the list would be the pages of one document (GOT-OCR 2).
        self._is_flat = getattr(processor, "multi_page", None) is False
        added = processor.tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special} - {*allowed}
        tokens |= _slots(processor)
        # Longest first: if one token is a prefix of another, the longer one must match.
        control = sorted((t for t in tokens if len(t.strip()) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image],
        variables: Mapping[str, Any] = _NONE,
    ) -> dict[str, Array]:
        """Render the chat template, expand image slots, tokenize, and compute pixel values.

        The prompt ends within the last message if that is the assistant's, for the answer to
        continue it, and else with the beginning of an assistant's message.

        Args:
            messages: those of a `Prompt`.
            images: one for each slot.
            variables: the row's own variables of the template, which override the model's.

        Returns:
            The processor's arrays for a batch of one row: `input_ids` int64 [1, T] and, depending
            on the model family, `pixel_values`, `image_grid_thw`, `token_type_ids`, ...

        Raises:
            RowError: a variable cannot be set (`prompt`).
        """
        template = self._template_with(variables)
        if self._is_flat or template is None:
            # A flat list would mean one image for each prompt, but to a processor of pages.
            pictures = [*images] if self._is_flat else [[*images]]
            encoded = self._processor(
                text=[self.text(messages, images, variables)],
                images=pictures if images else None,
                return_tensors="pt",
            )
        else:
            encoded = self._processor.apply_chat_template(
                [self._filled(messages, images)],
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **_ending(messages),
            )
        arrays = {key: array_of(value) for key, value in encoded.items()}
        return {key: array for key, array in arrays.items() if array.dtype.kind in "biuf"}

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Any],
        variables: Mapping[str, Any] = _NONE,
    ) -> str:
        """Return the rendered template, with one placeholder per image."""
        filled, template = self._filled(messages, images), self._template_with(variables)
        if template is None:
            return self._plain(filled)
        rendered: str = self._processor.apply_chat_template(
            filled, chat_template=template, tokenize=False, **_ending(messages)
        )
        return rendered

    def _template_with(self, variables: Mapping[str, Any]) -> str | None:
        """Return the template with the model's variables and a row's own; None without one."""
        if why := _why_not_set(self._template, variables):
            raise RowError(
                ErrorType.PROMPT,
                f"chat_template_kwargs: {why} (data.columns.chat_template_kwargs=null ignores the "
                "column)",
            )
        if self._template is None:
            return None
        own = {name: self._escaped(value) for name, value in variables.items()}
        return _with_variables(self._template, self._variables | own)

    def _escaped(self, value: Any) -> Any:
        """Return a JSON value with the control tokens in its texts escaped."""
        match value:
            case str():
                return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", value)
            case list() | tuple():
                return [self._escaped(item) for item in value]
            case dict():
                return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        return value

    def _plain(self, filled: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt of a model without a template."""
        parts = [part for message in filled for part in message["content"]]
        return "".join(p["text"] if p["type"] == "text" else self._slot for p in parts)

    def _filled(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Any]
    ) -> list[dict[str, Any]]:
        pictures = iter(images)
        return [
            {
                "role": m["role"],
                "content": [self._fill(part, pictures) for part in _joined(m["content"])],
            }
            for m in messages
        ]

    def _fill(self, part: Mapping[str, Any], pictures: Iterator[Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {"type": "image", "image": next(pictures)}
        return {"type": "text", "text": self._escaped(part["text"])}


def array_of(value: Any) -> Array:
    """Return a tensor or a list as an array."""
    # NumPy has no bfloat16, in which Llama 4's processor returns pixels.
    is_bfloat16 = str(getattr(value, "dtype", "")) == "torch.bfloat16"
    return np.asarray(value.float() if is_bfloat16 else value)


def _ending(messages: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return the arguments of `apply_chat_template` that say how the prompt ends."""
    is_continued = messages[-1]["role"] == "assistant"
    return {"continue_final_message": is_continued, "add_generation_prompt": not is_continued}


def _image_slot(processor: Any) -> str:
    """Return the image token of a processor; empty if it puts images before the text itself.

    Raises:
        ModelError: it makes no tokens of a prompt (TrOCR's).
    """
    try:
        probe = processor(text=["a"], images=[[Image.new("RGB", (64, 64))]], return_tensors="pt")
    except Exception:
        return str(getattr(processor, "image_token", ""))
    if "input_ids" not in probe:
        raise ModelError(f"{type(processor).__name__} makes no tokens of a prompt")
    return ""


def _joined(parts: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    # Adjacent texts are joined, because each could hold half of a control token.
    for is_text, group in groupby(parts, key=lambda part: part["type"] == "text"):
        if is_text:
            yield {"type": "text", "text": "".join(part["text"] for part in group)}
        else:
            yield from group

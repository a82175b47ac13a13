"""Count the tokens of a row's prompt from its text and the headers of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from batchvlm.errors import ErrorType, RowError
from batchvlm.model.chat_template import ChatTemplate
from batchvlm.model.loading import load_limits, load_processor
from batchvlm.pipeline.job import Job
from batchvlm.preprocess.images import at_hand, capped_size, image_size
from batchvlm.preprocess.preprocessor import check_length, room_behind
from batchvlm.preprocess.recent import KEY, RecentImageProcessor
from batchvlm.records import Completion, Failure, FinishReason, Prompt, Record
from batchvlm.words import described

_CHECKED_ROWS = 3
"""Rows with images for which the quick count must equal the processor's before it is used."""
_RECENT_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class RowCount:
    """Token counts and image sizes of one row."""

    row_index: int
    id: str
    failure: Failure | None = None
    """Why the row cannot be answered; the counts are then 0."""
    prompt_tokens: int = 0
    """Includes image tokens; for a dialog, those of the last turn without earlier answers."""
    image_tokens: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) in pixels of its images in the input, after EXIF rotation."""
    max_new_tokens: int = 0
    """Sum over all turns, limited by the model's length."""


class TokenCounter:
    """Counts the tokens of prompts without decoding an image.

    The processor is run on blank images of the same sizes. If it can also compute the number of
    tokens from sizes alone, and this is right for the first rows, only that is used.

    Raises:
        ModelError: the processor cannot be loaded.
    """

    def __init__(self, job: Job) -> None:
        cfg = job.cfg
        self._cfg = cfg
        self._image_root = job.source.image_root
        self._prompts = job.prompts
        self._processor = load_processor(cfg.model)
        self._limits = load_limits(cfg.model)
        self._chat = ChatTemplate(
            self._processor,
            allowed=cfg.model.prompt_tokens,
            variables=cfg.model.chat_template_kwargs,
        )
        # Caches processed images; all blank images of one size have the same key.
        self._processor.image_processor = RecentImageProcessor(
            self._processor.image_processor, _RECENT_BYTES
        )
        self._num_to_check = _CHECKED_ROWS
        self._is_quick = hasattr(self._processor, "_get_num_multimodal_tokens")

    def count(self, record: Record) -> RowCount:
        """Count one row. Never raises on a row."""
        failure = record.failure
        if failure is None:
            try:
                return self._count(record)
            except RowError as error:
                failure = Failure.of(error)
            # A processor can raise any error for an unusual size.
            except Exception as error:
                failure = Failure(error_type=ErrorType.PREPROCESS, message=described(error))
        return RowCount(row_index=record.row_index, id=record.id, failure=failure)

    def _count(self, record: Record) -> RowCount:
        data = self._cfg.data
        prompt = self._prompts.build(record)
        num_turns = 1 + prompt.turns_left
        if prompt.turns_left:
            answers = (_empty_completion(record.row_index),) * prompt.turns_left
            prompt = self._prompts.build(replace(record, answers=answers))
        sizes = [
            image_size(
                at_hand(ref, record.fetched),
                image_root=self._image_root,
                max_image_bytes=data.max_image_bytes,
                max_source_pixels=data.max_source_pixels,
            )
            for ref in prompt.images
        ]
        seen = [capped_size(size, self._cfg.model.max_image_pixels) for size in sizes]
        num_tokens, num_image_tokens = self._num_tokens(prompt, seen)
        check_length(self._cfg.model, self._limits, num_tokens, num_image_tokens, len(sizes))
        max_new_tokens = num_turns * prompt.generation.max_new_tokens
        if (room := room_behind(self._limits, num_tokens)) is not None:
            max_new_tokens = min(max_new_tokens, room)
        return RowCount(
            row_index=record.row_index,
            id=record.id,
            prompt_tokens=num_tokens,
            image_tokens=num_image_tokens,
            sizes=tuple(sizes),
            max_new_tokens=max_new_tokens,
        )

    def _num_tokens(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        if not self._is_quick or not sizes:
            return self._by_processor(prompt, sizes)
        if self._num_to_check == 0:
            return self._by_sizes(prompt, sizes)
        self._num_to_check -= 1
        exact = self._by_processor(prompt, sizes)
        try:
            self._is_quick = self._by_sizes(prompt, sizes) == exact
        except Exception:  # processors that do not support it raise various errors
            self._is_quick = False
        return exact

    def _by_processor(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        images = [_blank(size) for size in sizes]
        encoded = self._chat.encode(prompt.messages, images, prompt.template_variables)
        ids = encoded["input_ids"]
        token_id = self._limits.image_token_id
        return ids.shape[-1], 0 if token_id is None else int((ids == token_id).sum())

    def _by_sizes(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        tokenizer = self._processor.tokenizer
        text = self._chat.text(prompt.messages, sizes, prompt.template_variables)
        num_text = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        counts: Any = self._processor._get_num_multimodal_tokens(
            image_sizes=[(height, width) for width, height in sizes]
        )
        num_image = sum(counts.num_image_tokens)
        return num_text - len(sizes) + num_image, num_image


def _empty_completion(row_index: int) -> Completion:
    return Completion(
        row_index=row_index,
        token_ids=(),
        text="",
        finish_reason=FinishReason.STOP,
        latency_s=0.0,
    )


def _blank(size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.info[KEY] = f"blank {size}"
    return image

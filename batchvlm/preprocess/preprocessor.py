"""Record -> sample: builds the prompt, decodes the images and runs the model's processor.

Runs in worker processes. An error fails only the row that caused it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from batchvlm.config import (
    ColumnsConfig,
    DataConfig,
    GenerationConfig,
    ImageFormat,
    ModelConfig,
    TaskConfig,
)
from batchvlm.errors import ErrorType, RowError
from batchvlm.model.chat_template import ChatTemplate
from batchvlm.model.loading import ModelLimits, load_limits, load_processor
from batchvlm.preprocess.images import at_hand, image_file, load_image
from batchvlm.preprocess.recent import KEY, Recent, RecentImageProcessor
from batchvlm.prompts.builder import PromptBuilder
from batchvlm.records import (
    Array,
    ChatRequest,
    Failure,
    ImageRef,
    PixelTable,
    Prompt,
    Record,
    Sample,
)
from batchvlm.words import described

_RECENT_BYTES = 128 << 20
"""Size of a worker's cache of processed images: two of Qwen-VL's at the default
`model.max_image_pixels`. The cache of decoded images has a quarter of that."""


@dataclass(frozen=True, kw_only=True)
class PreprocessSpec:
    """Settings of a worker process; picklable."""

    model: ModelConfig
    task: TaskConfig
    columns: ColumnsConfig
    generation: GenerationConfig
    image_root: str | None
    max_source_pixels: int
    max_image_bytes: int = DataConfig.max_image_bytes
    device: str = "cpu"
    """`engine.device`. For a CUDA device, pixels may stay uint8."""
    sent_as: ImageFormat | None = None
    """Format in which images are sent to a server, which runs the processor; None without one."""


class Preprocessor:
    """Turns records into samples with the processor of one model.

    Raises:
        ModelError: the processor cannot be loaded.
    """

    def __init__(self, spec: PreprocessSpec) -> None:
        self._spec = spec
        self._prompts = PromptBuilder(
            task=spec.task, columns=spec.columns, generation=spec.generation
        )
        self._recent: Recent[Image.Image] = Recent(_RECENT_BYTES // 4)
        if spec.sent_as is not None:
            return
        self._processor = load_processor(spec.model)
        self._pixel_table: PixelTable | None = None
        if is_for_gpu(spec.device):
            # Imported here because it imports torch, which workers for a server do not need.
            from batchvlm.preprocess.pixels import find_table, leave_as_bytes

            self._pixel_table = find_table(self._processor.image_processor)
            if self._pixel_table is not None:
                leave_as_bytes(self._processor.image_processor)
        self._processor.image_processor = RecentImageProcessor(
            self._processor.image_processor, _RECENT_BYTES
        )
        self._limits = load_limits(spec.model)
        self._chat = ChatTemplate(
            self._processor,
            allowed=spec.model.prompt_tokens,
            variables=spec.model.chat_template_kwargs,
        )

    def prepare(self, record: Record) -> Sample | Failure:
        """Return the sample of a record, or its failure. Never raises because of a row."""
        if record.failure is not None:
            return record.failure
        try:
            prompt = self._prompts.build(record)
            refs = [at_hand(ref, record.fetched) for ref in prompt.images]
            pictures = [self._picture(ref) for ref in refs]
            if self._spec.sent_as is not None:
                return _request(prompt, pictures, self._spec.sent_as)
            return self._processed(prompt, pictures)
        except RowError as error:
            return Failure.of(error)
        # A processor may raise any exception on an unusual image.
        except Exception as error:
            return Failure(error_type=ErrorType.PREPROCESS, message=described(error))

    def _picture(self, ref: ImageRef) -> Image.Image:
        """Return the decoded image of a reference, with its pixel digest in `info[KEY]`."""

        def load() -> Image.Image:
            picture = load_image(
                ref,
                image_root=self._spec.image_root,
                max_image_bytes=self._spec.max_image_bytes,
                max_source_pixels=self._spec.max_source_pixels,
                max_pixels=self._spec.model.max_image_pixels,
            )
            picture.info[KEY] = pixel_digest(picture)
            return picture

        key = ref.path if ref.data is None else hashlib.blake2b(ref.data, digest_size=16).digest()
        return self._recent.get(key, load, lambda picture: 3 * picture.width * picture.height)

    def _processed(self, prompt: Prompt, images: Sequence[Image.Image]) -> Sample:
        """Return the sample of a prompt, with the processor's features."""
        if prompt.is_continued and self._limits.is_encoder_decoder:
            raise RowError(
                ErrorType.PROMPT,
                "the prompt ends with the beginning of the answer, which an encoder-decoder model "
                "cannot continue",
            )
        features = self._chat.encode(prompt.messages, images, prompt.template_variables)
        table = self._pixel_table if "pixel_values" in features else None
        if table is not None:
            from batchvlm.preprocess.pixels import bytes_of

            pixels = bytes_of(features["pixel_values"])
            assert pixels is not None, "a processor that makes bytes of some images only"
            features["pixel_values"] = pixels
        num_tokens = features["input_ids"].shape[-1]
        num_image_tokens = 0
        if self._limits.image_token_id is not None:
            num_image_tokens = int((features["input_ids"] == self._limits.image_token_id).sum())
        generation = prompt.generation
        room = room_behind(self._limits, num_tokens)
        if room is not None and 0 < room < generation.max_new_tokens:
            generation = replace(
                generation,
                max_new_tokens=room,
                min_new_tokens=min(generation.min_new_tokens, room),
            )
        check_length(self._spec.model, self._limits, num_tokens, num_image_tokens, len(images))
        return _sample(
            replace(prompt, generation=generation),
            features=features,
            image_tokens=num_image_tokens,
            image_sizes=image_sizes(features, [image.size for image in images], self._limits),
            image_keys=tuple(image.info[KEY] for image in images),
            pixel_table=table,
            room=room,
        )


def room_behind(limits: ModelLimits, num_tokens: int) -> int | None:
    """Return how many tokens fit after a prompt of `num_tokens`; None if the model has no limit."""
    if limits.max_positions is None:
        return None
    return limits.max_positions - (1 if limits.is_encoder_decoder else num_tokens)


def check_length(
    cfg: ModelConfig, limits: ModelLimits, num_tokens: int, num_image_tokens: int, num_images: int
) -> None:
    """Refuse a prompt that is empty, or longer than the model or `model.max_prompt_tokens` allow.

    Raises:
        RowError: `prompt_too_long`, or `prompt`.
    """
    if not num_tokens:
        # Possible without a chat template, if the tokenizer adds no BOS token.
        raise RowError(ErrorType.PROMPT, "the prompt is empty")
    longest = cfg.max_prompt_tokens
    if limits.max_positions is not None:
        longest = min(longest or limits.max_positions, limits.max_positions - 1)
    if longest is not None and num_tokens > longest:
        raise RowError(
            ErrorType.PROMPT_TOO_LONG,
            f"the prompt is {num_tokens} tokens, {num_image_tokens} of them of "
            f"{num_images} images; the limit is {longest}",
        )


def _request(prompt: Prompt, images: Sequence[Image.Image], kind: ImageFormat) -> Sample:
    """Return the sample of a prompt that a server tokenizes."""
    return _sample(
        prompt,
        features={},
        image_tokens=0,
        image_sizes=tuple(image.size for image in images),
        request=ChatRequest(
            messages=prompt.messages,
            images=tuple(image_file(image, kind) for image in images),
            template_variables=prompt.template_variables,
        ),
    )


def _sample(prompt: Prompt, **inputs: Any) -> Sample:
    """Return a sample with these inputs of the model or server, and all else that a prompt asks."""
    return Sample(
        row_index=prompt.row_index,
        generation=prompt.generation,
        json_schema=prompt.json_schema,
        choices=prompt.choices,
        turns_left=prompt.turns_left,
        is_continued=prompt.is_continued,
        **inputs,
    )


def is_for_gpu(device: str) -> bool:
    """Whether `engine.device` is, or resolves to, a CUDA device."""
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def pixel_digest(image: Image.Image) -> str:
    """Return a digest of an image's mode, size and pixels; images with equal digests are equal."""
    digest = hashlib.blake2b(repr((image.mode, image.size)).encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def image_sizes(
    features: Mapping[str, Array], given: Sequence[tuple[int, int]], limits: ModelLimits
) -> tuple[tuple[int, int], ...]:
    """Return the (width, height) of each image as the model sees it.

    Exact if the processor returns a patch grid (as Qwen-VL's) or one array per image. For a
    processor that tiles images it is the input size, after `model.max_image_pixels`.
    """
    grid = features.get("image_grid_thw")
    if grid is not None and limits.patch_size is not None and len(grid) == len(given):
        return tuple((int(w) * limits.patch_size, int(h) * limits.patch_size) for _, h, w in grid)
    pixels = features.get("pixel_values")
    if pixels is not None and pixels.ndim >= 4 and "image_sizes" not in features:
        height, width = pixels.shape[-2:]
        if int(np.prod(pixels.shape[:-3])) == len(given):
            return tuple((int(width), int(height)) for _ in given)
    return tuple(given)

"""Qwen-Omni, of which the part that writes is run, and Cosmos3."""

from __future__ import annotations

from typing import Any

import transformers as tf

from ..tiny import (
    VISION,
    Built,
    chat_template,
    model_of,
    processor_of,
    rope,
    text_config,
    token_id,
    tokenizer,
)
from .family import family
from .mixtures import EXPERTS
from .qwen import DEEPSTACK, QWEN3_VISION, qwen_of

_AUDIO = {
    "downsample_hidden_size": 16,
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 64,
}


WINDOWED_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_heads": 4,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
OMNI = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


@family(
    title="Qwen2.5-Omni",
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    image_tokens=(6, 10, 24),
    needs=("torchvision",),
)
def qwen2_5_omni() -> Built:
    """The part of the model that writes."""
    vocabulary = tokenizer(list(OMNI.values()), **OMNI)
    config = qwen2_5_thinker(vocabulary)
    return model_of(config), _omni_processor(tf.Qwen2_5OmniProcessor, vocabulary, patch_size=14)


def qwen2_5_thinker(vocabulary: Any) -> Any:
    """The config of the part of Qwen2.5-Omni that writes."""
    return tf.Qwen2_5OmniThinkerConfig(
        text_config=text_config(vocabulary, rope_parameters=rope([2, 3, 3])),
        vision_config=WINDOWED_VISION,
        audio_config=_AUDIO,
        **_omni_ids(vocabulary),
    )


@family(
    title="Qwen3-Omni",
    model_class="Qwen3OmniMoeThinkerForConditionalGeneration",
    image_tokens=(6, 10, 16),
    needs=("torchvision",),
)
def qwen3_omni_moe() -> Built:
    """The part of the model that writes."""
    vocabulary = tokenizer(list(OMNI.values()), **OMNI)
    turns = rope([4, 2, 2], mrope_interleaved=True)
    config = tf.Qwen3OmniMoeThinkerConfig(
        text_config=text_config(vocabulary, head_dim=16, rope_parameters=turns, **EXPERTS),
        vision_config={**QWEN3_VISION, **DEEPSTACK},
        audio_config=_AUDIO,
        **_omni_ids(vocabulary),
    )
    return model_of(config), _omni_processor(tf.Qwen3OmniMoeProcessor, vocabulary, patch_size=16)


def _omni_ids(vocabulary: Any) -> dict[str, int]:
    names = {
        "image_token_id": "image_token",
        "video_token_id": "video_token",
        "audio_token_id": "audio_token",
        "vision_start_token_id": "vision_bos_token",
        "vision_end_token_id": "vision_eos_token",
        "audio_start_token_id": "audio_bos_token",
        "audio_end_token_id": "audio_eos_token",
    }
    return {key: token_id(vocabulary, OMNI[name]) for key, name in names.items()}


def _omni_processor(processor_class: Any, vocabulary: Any, *, patch_size: int) -> Any:
    pixels_per_token = (2 * patch_size) ** 2
    return processor_of(
        processor_class,
        "Qwen2VLVideoProcessor",
        image_processor=tf.Qwen2VLImageProcessorPil(
            patch_size=patch_size,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 4 * pixels_per_token, "longest_edge": 64 * pixels_per_token},
        ),
        feature_extractor=tf.WhisperFeatureExtractor(feature_size=16),
        tokenizer=vocabulary,
        chat_template=chat_template("<|vision_bos|><|IMAGE|><|vision_eos|>"),
    )


@family(
    title="Cosmos3",
    model_class="Cosmos3OmniForConditionalGeneration",
    image_tokens=(6, 10, 16),
)
def cosmos3_omni() -> Built:
    """Qwen3-VL in all but its classes."""
    return qwen_of(
        tf.Cosmos3OmniConfig,
        tf.Qwen3VLProcessor,
        {**QWEN3_VISION, **DEEPSTACK},
        video_processor="Qwen3VLVideoProcessor",
        head_dim=16,
        rope_parameters=rope([4, 2, 2], mrope_interleaved=True),
    )


@family(
    title="Cosmos3 Edge",
    model_class="Cosmos3EdgeForConditionalGeneration",
    image_tokens=(6, 10, 24),
    since=(5, 23),
)
def cosmos3_edge() -> Built:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = tokenizer(marks)
    config = tf.Cosmos3EdgeConfig(
        text_config=text_config(vocabulary, head_dim=16, rope_parameters=rope([4, 2, 2])),
        vision_config={**VISION, "num_patches": 16},
        projector_hidden_size=64,
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        vision_start_token_id=token_id(vocabulary, "<|vision_start|>"),
        vision_end_token_id=token_id(vocabulary, "<|vision_end|>"),
    )
    processor = processor_of(
        tf.Cosmos3EdgeProcessor,
        "Cosmos3EdgeVideoProcessor",
        image_processor=tf.Cosmos3EdgeImageProcessorPil(
            patch_size=14, size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model_of(config), processor

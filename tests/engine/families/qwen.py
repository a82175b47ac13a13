"""Qwen-VL and GLM-4V: patches of any number, rotary positions in time, height and width."""

from __future__ import annotations

from typing import Any

import transformers as tf

from ..tiny import (
    Built,
    chat_template,
    model_of,
    processor_of,
    rope,
    text_config,
    token_id,
    tokenizer,
)
from .family import LINEAR, family

HYBRID_TEXT = {
    "head_dim": 32,
    # The other way round, as on the hub, so small a model says the same whatever it is asked.
    "layer_types": ["full_attention", "linear_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.25),
}

QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_heads": 4,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}
DEEPSTACK = {"depth": 3, "deepstack_visual_indexes": [0, 1]}
GLM_TEXT = {"rope_parameters": rope([2, 3, 3], partial_rotary_factor=1.0)}


@family(
    title="Qwen2-VL",
    model_class="Qwen2VLForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def qwen2_vl() -> Built:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return qwen_of(tf.Qwen2VLConfig, tf.Qwen2VLProcessor, vision, rope_parameters=rope([2, 3, 3]))


@family(
    title="Qwen2.5-VL",
    model_class="Qwen2_5_VLForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def qwen2_5_vl() -> Built:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return qwen_of(
        tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor, vision, rope_parameters=rope([2, 3, 3])
    )


@family(
    title="Qwen3-VL",
    model_class="Qwen3VLForConditionalGeneration",
    image_tokens=(6, 10, 16),
)
def qwen3_vl() -> Built:
    return qwen_of(
        tf.Qwen3VLConfig,
        tf.Qwen3VLProcessor,
        {**QWEN3_VISION, **DEEPSTACK},
        video_processor="Qwen3VLVideoProcessor",
        head_dim=16,
        rope_parameters=rope([4, 2, 2], mrope_interleaved=True),
    )


@family(
    title="Qwen3.5",
    model_class="Qwen3_5ForConditionalGeneration",
    image_tokens=(6, 10, 16),
    why_not_slots=LINEAR,
)
def qwen3_5() -> Built:
    """Some layers attend linearly: they keep a state instead of keys and values."""
    return qwen_of(
        tf.Qwen3_5Config,
        tf.Qwen3VLProcessor,
        QWEN3_VISION,
        video_processor="Qwen3VLVideoProcessor",
        **HYBRID_TEXT,
    )


def qwen_of(
    config_class: Any,
    processor_class: Any,
    vision: dict[str, Any],
    *,
    video_processor: str = "Qwen2VLVideoProcessor",
    **text: Any,
) -> Built:
    """A model of one of Qwen-VL's generations, with its processor."""
    vocabulary = tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    config = config_class(
        text_config=text_config(vocabulary, **text),
        vision_config=vision,
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        vision_start_token_id=token_id(vocabulary, "<|vision_start|>"),
        vision_end_token_id=token_id(vocabulary, "<|vision_end|>"),
    )
    pixels_per_token = (2 * vision["patch_size"]) ** 2
    processor = processor_of(
        processor_class,
        video_processor,
        image_processor=tf.Qwen2VLImageProcessorPil(
            patch_size=vision["patch_size"],
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 4 * pixels_per_token, "longest_edge": 64 * pixels_per_token},
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model_of(config), processor


@family(
    title="GLM-4V",
    model_class="Glm4vForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def glm4v() -> Built:
    return glm_of(tf.Glm4vConfig, **GLM_TEXT)


def glm_of(config_class: Any, *, processor: str = "Glm4v", **text: Any) -> Built:
    """A model of one of GLM-V's generations, with the processor classes of this name."""
    tokens = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    vocabulary = tokenizer(list(tokens.values()))
    config = config_class(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "out_hidden_size": 64,
            "intermediate_size": 64,
        },
        text_config=text_config(vocabulary, **text),
        **{key: token_id(vocabulary, token) for key, token in tokens.items()},
    )
    image_processor = getattr(tf, f"{processor}ImageProcessorPil")
    return model_of(config), processor_of(
        getattr(tf, f"{processor}Processor"),
        f"{processor}VideoProcessor",
        image_processor=image_processor(
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 128 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )

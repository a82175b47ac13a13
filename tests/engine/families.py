"""Tiny random models with full processors, one for each family that the engine must get right.

A family is a function that returns (model, processor) and a line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as tf

from .tiny import (
    CLIP_VISION,
    SIGLIP_VISION,
    VISION,
    chat_template,
    model_of,
    rope,
    text_config,
    token_id,
    tokenizer,
    without_video,
)

Built = tuple[Any, Any]
"""Model and processor."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, and what it makes of the test's pictures."""

    build: Callable[[], Built]
    image_tokens: tuple[int, int, int]
    """Image tokens of a picture of 90 x 60 pixels, one of 70 x 150, and of two in one prompt, of
    48 x 48 and 130 x 100."""
    takes_text_alone: bool = True
    """Whether prompts without an image are allowed."""

    @property
    def name(self) -> str:
        return self.build.__name__


def llava(**text: Any) -> Built:
    """LLaVA over a decoder of these settings."""
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    config = tf.LlavaConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, **{"model_type": "llama", **text}),
        image_token_index=token_id(vocabulary, "<image>"),
        image_seq_length=16,
    )
    processor = tf.LlavaProcessor(
        tf.LlavaImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        vocabulary,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


def llava_next() -> Built:
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    grids = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config = tf.LlavaNextConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_index=token_id(vocabulary, "<image>"),
        image_seq_length=16,
        image_grid_pinpoints=grids,
    )
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=grids,
        ),
        vocabulary,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


def llava_onevision() -> Built:
    vocabulary = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    grids = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = tf.LlavaOnevisionConfig(
        vision_config=SIGLIP_VISION,
        text_config=text_config(vocabulary, model_type="qwen2"),
        image_token_index=token_id(vocabulary, "<image>"),
        video_token_index=token_id(vocabulary, "<video>"),
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_4",
    )
    processor = without_video(tf.LlavaOnevisionProcessor)(
        image_processor=tf.LlavaOnevisionImageProcessorPil(
            size={"height": 56, "width": 56}, image_grid_pinpoints=grids
        ),
        tokenizer=vocabulary,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


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
    return _qwen(tf.Qwen2VLConfig, tf.Qwen2VLProcessor, vision, rope_parameters=rope([2, 3, 3]))


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
    return _qwen(
        tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLProcessor, vision, rope_parameters=rope([2, 3, 3])
    )


def qwen3_vl() -> Built:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "num_heads": 4,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return _qwen(
        tf.Qwen3VLConfig,
        tf.Qwen3VLProcessor,
        vision,
        head_dim=16,
        rope_parameters=rope([4, 2, 2], mrope_interleaved=True),
    )


def _qwen(config_class: Any, processor_class: Any, vision: dict[str, Any], **text: Any) -> Built:
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
    processor = without_video(processor_class)(
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


def glm4v() -> Built:
    tokens = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    vocabulary = tokenizer(list(tokens.values()))
    config = tf.Glm4vConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "out_hidden_size": 64,
            "intermediate_size": 64,
        },
        text_config=text_config(
            vocabulary, rope_parameters=rope([2, 3, 3], partial_rotary_factor=1.0)
        ),
        **{key: token_id(vocabulary, token) for key, token in tokens.items()},
    )
    processor = without_video(tf.Glm4vProcessor)(
        image_processor=tf.Glm4vImageProcessorPil(
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 128 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return model_of(config), processor


def idefics2() -> Built:
    vocabulary = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    config = tf.Idefics2Config(
        vision_config={**VISION, "image_size": 112},
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        text_config=text_config(vocabulary, model_type="mistral", head_dim=16),
        image_token_id=token_id(vocabulary, "<image>"),
    )
    processor = tf.Idefics2Processor(
        tf.Idefics2ImageProcessorPil(
            size={"shortest_edge": 42, "longest_edge": 112}, do_image_splitting=False
        ),
        vocabulary,
        image_seq_len=8,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


def idefics3() -> Built:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    vocabulary = tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles]
    )
    config = tf.Idefics3Config(
        vision_config=VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_id=token_id(vocabulary, "<image>"),
        scale_factor=2,
        pad_token_id=vocabulary.pad_token_id,
    )
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessorPil(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
        ),
        vocabulary,
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


def paligemma() -> Built:
    places = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    vocabulary = tokenizer(["<image>", *places], image_token="<image>")
    text = text_config(vocabulary, model_type="gemma", head_dim=16, num_key_value_heads=1)
    config = tf.PaliGemmaConfig(
        vision_config={**SIGLIP_VISION, "projection_dim": 64},
        text_config=text,
        image_token_index=token_id(vocabulary, "<image>"),
        projection_dim=64,
        hidden_size=64,
        vocab_size=text["vocab_size"],
    )
    image_processor = tf.SiglipImageProcessorPil(size={"height": 56, "width": 56})
    image_processor.image_seq_length = 16
    # Without a chat template, as on the hub.
    return model_of(config), tf.PaliGemmaProcessor(image_processor, vocabulary)


def gemma3(sliding_window: int = 32) -> Built:
    vocabulary = tokenizer(
        ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    config = tf.Gemma3Config(
        vision_config=SIGLIP_VISION,
        text_config=text_config(
            vocabulary,
            head_dim=16,
            sliding_window=sliding_window,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
        mm_tokens_per_image=4,
        image_token_index=token_id(vocabulary, "<image_soft_token>"),
        boi_token_index=token_id(vocabulary, "<start_of_image>"),
        eoi_token_index=token_id(vocabulary, "<end_of_image>"),
    )
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        vocabulary,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    return model_of(config), processor


def internvl() -> Built:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config=text_config(vocabulary, model_type="qwen2"),
        image_token_id=token_id(vocabulary, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = without_video(tf.InternVLProcessor)(
        image_processor=_tiles_of_56(),
        tokenizer=vocabulary,
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    return model_of(config), processor


def aya_vision() -> Built:
    tiles = ["TILE", "TILE_GLOBAL", *(f"TILE_{i}" for i in range(1, 13))]
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    vocabulary = tokenizer(["<image>", *marks, *tiles])
    config = tf.AyaVisionConfig(
        vision_config=SIGLIP_VISION,
        text_config=text_config(vocabulary, model_type="cohere2", head_dim=16, sliding_window=32),
        image_token_index=token_id(vocabulary, "<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    processor = tf.AyaVisionProcessor(
        _tiles_of_56(),
        vocabulary,
        patch_size=14,
        img_size=56,
        downsample_factor=2,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


def _tiles_of_56() -> Any:
    return tf.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )


FAMILIES = (
    Family(build=aya_vision, image_tokens=(12, 12, 24)),
    Family(build=gemma3, image_tokens=(4, 4, 8)),
    Family(build=glm4v, image_tokens=(6, 10, 24)),
    Family(build=idefics2, image_tokens=(8, 8, 16)),
    Family(build=idefics3, image_tokens=(20, 12, 40)),
    Family(build=internvl, image_tokens=(12, 12, 24)),
    Family(build=llava, image_tokens=(16, 16, 32)),
    Family(build=llava_next, image_tokens=(70, 56, 106)),
    Family(build=llava_onevision, image_tokens=(70, 56, 34)),
    Family(build=paligemma, image_tokens=(16, 16, 32), takes_text_alone=False),
    Family(build=qwen2_vl, image_tokens=(6, 10, 24)),
    Family(build=qwen2_5_vl, image_tokens=(6, 10, 24)),
    Family(build=qwen3_vl, image_tokens=(6, 10, 16)),
)

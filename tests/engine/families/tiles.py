"""Families that cut an image into tiles of one size."""

from __future__ import annotations

from typing import Any

import transformers as tf

from ..tiny import (
    SIGLIP_VISION,
    VISION,
    Built,
    chat_template,
    model_of,
    processor_of,
    text_config,
    token_id,
    tokenizer,
)
from .family import LINEAR, family
from .qwen import HYBRID_TEXT


@family(
    title="InternVL",
    model_class="InternVLForConditionalGeneration",
    image_tokens=(12, 12, 24),
)
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
    processor = processor_of(
        tf.InternVLProcessor,
        "InternVLVideoProcessor",
        image_processor=_tiles_of_56(),
        tokenizer=vocabulary,
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    return model_of(config), processor


@family(
    title="Aya Vision",
    model_class="AyaVisionForConditionalGeneration",
    image_tokens=(12, 12, 24),
)
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


@family(
    needs_torchvision_before=(5, 18),
    title="Ovis2",
    model_class="Ovis2ForConditionalGeneration",
    image_tokens=(20, 16, 24),
    is_cut=False,
)
def ovis2() -> Built:
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    vocabulary = tokenizer(["<IMG_ATOM>", *marks, "<image>"])
    text = text_config(vocabulary, model_type="qwen2")
    config = tf.Ovis2Config(
        vision_config={
            **VISION,
            "vocab_size": 64,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": len(marks),
        },
        text_config=text,
        image_token_id=token_id(vocabulary, "<IMG_ATOM>"),
        visual_indicator_token_ids=[token_id(vocabulary, mark) for mark in marks],
        vocab_size=text["vocab_size"],
        hidden_size=64,
        tie_word_embeddings=False,
    )
    image_processor = tf.Ovis2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = tf.Ovis2Processor(
        image_processor, vocabulary, image_seq_length=4, chat_template=chat_template("<image>")
    )
    return model_of(config), processor


@family(
    title="MiniCPM-V 4.6",
    model_class="MiniCPMV4_6ForConditionalGeneration",
    image_tokens=(4, 3, 16),
    why_not_slots=LINEAR,
    needs=("torchvision",),
)
def minicpmv4_6() -> Built:
    """Patches of all images behind one another, on the last dimension."""
    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.MiniCPMV4_6Config(
        vision_config={**VISION, "num_hidden_layers": 3, "image_size": 112},
        insert_layer_id=1,
        image_size=112,
        text_config=text_config(vocabulary, model_type="qwen3_5_text", **HYBRID_TEXT),
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
    )
    processor = processor_of(
        tf.MiniCPMV4_6Processor,
        "MiniCPMV4_6VideoProcessor",
        image_processor=tf.MiniCPMV4_6ImageProcessorPil(
            patch_size=14, scale_resolution=112, max_slice_nums=4
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|image_pad|>"),
    )
    return model_of(config), processor


@family(
    since=(5, 20),
    title="Molmo 2",
    model_class="Molmo2ForConditionalGeneration",
    image_tokens=(10, 10, 18),
    sees_ahead=True,
    needs=("torchvision",),
)
def molmo2() -> Built:
    """Each image token names the patches that it is made of, by their places in the batch."""
    named = {
        "image_start_token_id": "<im_start>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    added = ["<|image|>", "<|video|>", "<im_col>", "<im_low>", *named.values()]
    vocabulary = tokenizer(added, image_token="<|image|>", video_token="<|video|>")
    vision = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "image_size": [56, 56]}
    config = tf.Molmo2Config(
        vision_config=vision,
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 64,
            "text_hidden_size": 64,
        },
        text_config=text_config(
            vocabulary,
            # Special tokens have embeddings of their own, behind the others.
            vocab_size=len(vocabulary) - len(added),
            additional_vocab_size=len(added),
            head_dim=16,
        ),
        **{key: token_id(vocabulary, token) for key, token in named.items()},
    )
    processor = processor_of(
        tf.Molmo2Processor,
        "Molmo2VideoProcessor",
        image_processor=tf.Molmo2ImageProcessor(
            size={"height": 56, "width": 56}, patch_size=14, max_crops=2, overlap_margins=[1, 1]
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|image|>"),
    )
    return model_of(config), processor


def _tiles_of_56() -> Any:
    return tf.GotOcr2ImageProcessorPil(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
    )

"""Families that came with transformers 5.20 and later."""

from __future__ import annotations

from typing import Any

import transformers as tf

from ..tiny import (
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
    title="Granite Docling",
    model_class="GraniteDoclingForConditionalGeneration",
    image_tokens=(12, 12, 24),
    since=(5, 23),
)
def granite_docling() -> Built:
    """Tiles of a page; features of further layers of the encoder for layers of the decoder."""
    grid = range(1, 5)
    places = [f"<row_{row}_col_{column}>" for row in grid for column in grid]
    marks = ["<fake_token_around_image>", "<global-img>", "<image>"]
    vocabulary = tokenizer([*marks, *places], image_token="<image>")
    config = tf.GraniteDoclingConfig(
        vision_config={
            **VISION,
            "scale_factor": 2,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "use_fine_route": False,
        },
        text_config=text_config(
            vocabulary,
            embedding_multiplier=2.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=0.5,
        ),
        image_token_id=token_id(vocabulary, "<image>"),
        tie_word_embeddings=False,
    )
    processor = tf.GraniteDoclingProcessor(
        tf.GraniteDoclingImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4),
        vocabulary,
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="Unlimited-OCR",
    model_class="UnlimitedOcrForConditionalGeneration",
    image_tokens=(57, 61, 114),
    why_not_slots="it has layers of reference_sliding_attention",
    needs=("torchvision",),
    since=(5, 20),
)
def unlimited_ocr() -> Built:
    """Answers attend to the whole prompt, and to the last tokens of themselves."""
    vocabulary = tokenizer(["<image>", "<|grounding|>"], image_token="<image>")
    config = tf.UnlimitedOcrConfig(
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 4,
                "window_size": 8,
                "global_attn_indexes": [],
                "initializer_range": 0.02,
                "downsample_channels": [16, 32],
            },
            "encoder_config": {**VISION, "patch_size": 16, "image_size": 64},
        },
        text_config=text_config(
            vocabulary,
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=32,
            mlp_layer_types=["dense", "sparse"],
            sliding_window=4,
        ),
        image_token_id=token_id(vocabulary, "<image>"),
        tie_word_embeddings=False,
    )
    processor = tf.UnlimitedOcrProcessor(
        tf.UnlimitedOcrImageProcessor(
            size={"height": 64, "width": 64}, tile_size=64, max_patches=4
        ),
        vocabulary,
        patch_size=4,
        downsample_ratio=4,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="MiniCPM-OCR",
    model_class="MiniCPMOcrForConditionalGeneration",
    image_tokens=(15, 18, 66),
    why_not_slots=LINEAR,
    needs=("torchvision",),
    since=(5, 22),
)
def minicpm_ocr() -> Built:
    """MiniCPM-V 4.6 with four times as many tokens."""
    vocabulary = _minicpm_vocabulary()
    config = tf.MiniCPMOcrConfig(**_minicpm_settings(vocabulary))
    processor = processor_of(
        tf.MiniCPMOcrProcessor,
        "MiniCPMOcrVideoProcessor",
        image_processor=tf.MiniCPMOcrImageProcessor(
            patch_size=14, scale_resolution=112, max_slice_nums=4
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|image_pad|>"),
    )
    return model_of(config), processor


@family(
    title="MiniCPM-V 4.7",
    model_class="MiniCPMV4_7ForConditionalGeneration",
    image_tokens=(4, 3, 16),
    why_not_slots=LINEAR,
    needs=("torchvision",),
    since=(5, 20),
)
def minicpmv4_7() -> Built:
    """Rotary positions that lay the slices of an image side by side."""
    vocabulary = _minicpm_vocabulary()
    config = tf.MiniCPMV4_7Config(
        **_minicpm_settings(vocabulary),
        image_start_id=token_id(vocabulary, "<image>"),
        image_end_id=token_id(vocabulary, "</image>"),
        slice_start_id=token_id(vocabulary, "<slice>"),
        slice_end_id=token_id(vocabulary, "</slice>"),
        newline_id=vocabulary.encode("\n")[0],
    )
    processor = processor_of(
        tf.MiniCPMV4_7Processor,
        "MiniCPMV4_6VideoProcessor",
        image_processor=tf.MiniCPMV4_6ImageProcessorPil(
            patch_size=14, scale_resolution=112, max_slice_nums=4
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|image_pad|>"),
    )
    return model_of(config), processor


def _minicpm_vocabulary() -> Any:
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
    return tokenizer(list(named.values()), **named)


def _minicpm_settings(vocabulary: Any) -> dict[str, Any]:
    return {
        "vision_config": {**VISION, "num_hidden_layers": 3, "image_size": 112},
        "insert_layer_id": 1,
        "text_config": text_config(vocabulary, model_type="qwen3_5_text", **HYBRID_TEXT),
        "image_token_id": token_id(vocabulary, "<|image_pad|>"),
        "video_token_id": token_id(vocabulary, "<|video_pad|>"),
        "tie_word_embeddings": False,
    }


@family(
    title="LFM3-VL",
    model_class="Lfm3VlForConditionalGeneration",
    image_tokens=(6, 10, 16),
    why_not_slots="it has layers of conv",
    since=(5, 23),
)
def lfm3_vl() -> Built:
    """Convolutions in the encoder and in the decoder, where others have a sliding window."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = tokenizer(marks)
    config = tf.Lfm3VlConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        text_config=text_config(
            vocabulary,
            model_type="lfm3",
            num_hidden_layers=3,
            head_dim=16,
            sliding_window=16,
            layer_types=["conv", "full_attention", "sliding_attention"],
        ),
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        vision_start_token_id=token_id(vocabulary, "<|vision_start|>"),
        vision_end_token_id=token_id(vocabulary, "<|vision_end|>"),
        projector_hidden_size=64,
        tie_word_embeddings=False,
    )
    processor = processor_of(
        tf.Lfm3VlProcessor,
        "Qwen3VLVideoProcessor",
        image_processor=tf.Qwen2VLImageProcessorPil(
            patch_size=16, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model_of(config), processor

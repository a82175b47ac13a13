"""Families whose decoder is unlike the others': layers that share keys and values, experts."""

from __future__ import annotations

from typing import Any

import torch
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


def gemma4() -> Built:
    """Four layers, of which the last two take the keys and values of the first two."""
    return _gemma4(
        "Gemma4",
        vision=_GEMMA4_VISION,
        image_processor=_gemma4_images(tf.Gemma4ImageProcessorPil),
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
    )


def gemma4_moe() -> Built:
    """Experts; in layers with a sliding window, image tokens attend to those behind them."""
    return _gemma4(
        "Gemma4",
        vision=_GEMMA4_VISION,
        image_processor=_gemma4_images(tf.Gemma4ImageProcessorPil),
        hidden_size_per_layer_input=0,
        use_bidirectional_attention="vision",
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
    )


def gemma4_unified() -> Built:
    """Patches go into the decoder without a vision tower."""
    vision = {"patch_size": 4, "mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 128}
    image_processor = _gemma4_images(tf.Gemma4UnifiedImageProcessor)
    return _gemma4(
        "Gemma4Unified",
        vision=vision,
        image_processor=image_processor,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    )


_GEMMA4_VISION = {
    **VISION,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 128,
}


def _gemma4_images(processor_class: Any) -> Any:
    # It takes no fewer than 70 tokens an image.
    return processor_class(patch_size=4, max_soft_tokens=70)


def _gemma4(name: str, *, vision: dict[str, Any], image_processor: Any, **text: Any) -> Built:
    named = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    vocabulary = tokenizer([*named.values(), "<|video|>"], **named)
    settings = {
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        **text,
    }
    sizes = text_config(vocabulary, **settings)
    if "hidden_size_per_layer_input" in text:
        sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]
    config = getattr(tf, f"{name}Config")(
        vision_config=vision,
        text_config=sizes,
        image_token_id=token_id(vocabulary, "<|image|>"),
        video_token_id=token_id(vocabulary, "<|video|>"),
        audio_token_id=token_id(vocabulary, "<|audio|>"),
        boi_token_id=token_id(vocabulary, "<|image>"),
        eoi_token_id=token_id(vocabulary, "<image|>"),
    )
    processor = processor_of(
        getattr(tf, f"{name}Processor"),
        f"{name}VideoProcessor",
        feature_extractor=getattr(tf, f"{name}AudioFeatureExtractor")(),
        image_processor=image_processor,
        tokenizer=vocabulary,
        chat_template=chat_template("<|image|>"),
    )
    model = model_of(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("pos_embedding", "position_embedding_table")):
                weight.normal_()  # initialised to the same everywhere
    return model, processor

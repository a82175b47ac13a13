"""Families whose decoder is unlike the others': layers that share keys and values, experts."""

from __future__ import annotations

from typing import Any

import torch
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
from .family import family


@family(
    title="Gemma 4 E2B and E4B",
    model_class="Gemma4ForConditionalGeneration",
    image_tokens=(60, 60, 127),
    needs=("torchvision",),
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


@family(
    title="Gemma 4 26B and 31B",
    model_class="Gemma4ForConditionalGeneration",
    image_tokens=(60, 60, 127),
    sees_ahead=True,
    needs=("torchvision",),
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


@family(
    title="Gemma 4 12B",
    model_class="Gemma4UnifiedForConditionalGeneration",
    image_tokens=(60, 60, 127),
    sees_ahead=True,
    needs=("torchvision",),
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


@family(
    title="Command A Vision",
    model_class="Cohere2VisionForConditionalGeneration",
    image_tokens=(80, 64, 160),
    needs=("torchvision",),
)
def cohere2_vision() -> Built:
    named = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.Cohere2VisionConfig(
        vision_config={**SIGLIP_VISION, "image_size": 32, "patch_size": 4},
        text_config=text_config(
            vocabulary,
            model_type="cohere2",
            head_dim=16,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
        ),
        image_token_id=token_id(vocabulary, named["image_token"]),
        downsample_factor=2,
        alignment_intermediate_size=64,
    )
    processor = tf.Cohere2VisionProcessor(
        # A tile has as many tokens as a patch has pixels.
        tf.Cohere2VisionImageProcessor(
            size={"height": 32, "width": 32}, patch_size=4, max_patches=4
        ),
        vocabulary,
        chat_template=chat_template("<|IMG_PATCH|>"),
    )
    return model_of(config), processor


@family(
    title="LFM2-VL",
    model_class="Lfm2VlForConditionalGeneration",
    image_tokens=(76, 42, 156),
    why_not_slots="it has layers of conv",
    needs=("torchvision",),
)
def lfm2_vl() -> Built:
    """Some layers are convolutions over the last tokens: they keep a state besides the keys."""
    grid = range(1, 3)
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    places = [f"<|img_row_{row}_col_{column}|>" for row in grid for column in grid]
    vocabulary = tokenizer([*named.values(), *places], **named)
    config = tf.Lfm2VlConfig(
        vision_config={
            **SIGLIP_VISION,
            "model_type": "siglip2_vision_model",
            "patch_size": 4,
            "num_patches": 16,
        },
        text_config=text_config(
            vocabulary,
            model_type="lfm2",
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
        ),
        image_token_id=token_id(vocabulary, "<image>"),
        projector_hidden_size=64,
        downsample_factor=2,
    )
    processor = tf.Lfm2VlProcessor(
        tf.Lfm2VlImageProcessor(
            encoder_patch_size=4,
            tile_size=32,
            min_tiles=2,
            max_tiles=4,
            min_image_tokens=4,
            max_image_tokens=16,
        ),
        vocabulary,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="Aria",
    model_class="AriaForConditionalGeneration",
    image_tokens=(8, 8, 16),
)
def aria() -> Built:
    """Experts in every layer."""
    vocabulary = tokenizer(["<|img|>"], image_token="<|img|>")
    config = tf.AriaConfig(
        vision_config={
            **VISION,
            "model_type": "idefics3_vision",
            # Its processor makes images of this size, whatever size is set.
            "image_size": 980,
            "patch_size": 140,
        },
        text_config=text_config(
            vocabulary,
            model_type="aria_text",
            intermediate_size=32,
            moe_num_experts=4,
            moe_topk=2,
            moe_num_shared_experts=1,
        ),
        projector_patch_to_query_dict={49: 8},
        image_token_index=token_id(vocabulary, "<|img|>"),
    )
    processor = tf.AriaProcessor(
        tf.AriaImageProcessorPil(),
        vocabulary,
        size_conversion={980: 8},
        chat_template=chat_template("<|img|>"),
    )
    return model_of(config), processor


@family(
    title="Gemma 3n",
    model_class="Gemma3nForConditionalGeneration",
    image_tokens=(4, 4, 8),
    needs=("torchvision", "timm"),
)
def gemma3n() -> Built:
    """Two layers of each kind, of which the last ones take the keys and values of the first."""
    named = {
        "boi_token": "<start_of_image>",
        "boa_token": "<start_of_audio>",
        # From here on the vocabulary of images, and then that of audio.
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    ids = {name: token_id(vocabulary, token) for name, token in named.items()}
    config = tf.Gemma3nConfig(
        vision_config={
            "architecture": "test_efficientnet",
            "hidden_size": 256,
            "vocab_size": 2,
            "vocab_offset": ids["eoi_token"],
        },
        text_config=text_config(
            vocabulary,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            head_dim=16,
            sliding_window=32,
            vocab_size_per_layer_input=ids["eoi_token"],
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        ),
        audio_config={
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "vocab_size": 2,
            "vocab_offset": ids["eoa_token"],
        },
        vision_soft_tokens_per_image=4,
        **{f"{name}_id": number for name, number in ids.items()},
    )
    processor = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(),
        tf.SiglipImageProcessorPil(size={"height": 64, "width": 64}),
        vocabulary,
        chat_template=chat_template("<image_soft_token>"),
        image_seq_length=4,
    )
    return model_of(config), processor


@family(
    title="Perception LM",
    model_class="PerceptionLMForConditionalGeneration",
    image_tokens=(20, 12, 40),
    needs=("torchvision", "timm"),
)
def perception_lm() -> Built:
    vocabulary = tokenizer(
        ["<|image|>", "<|video|>"], image_token="<|image|>", video_token="<|video|>"
    )
    config = tf.PerceptionLMConfig(
        vision_config={
            "architecture": "vit_pe_lang_large_patch14_448",
            "do_pooling": True,
            "num_labels": 32,
            "model_args": {
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 4,
                "img_size": [56, 56],
                "ref_feat_shape": [4, 4],
                "global_pool": "",
            },
        },
        text_config=text_config(vocabulary, model_type="llama"),
        projector_pooling_ratio=2,
        image_token_id=token_id(vocabulary, "<|image|>"),
        video_token_id=token_id(vocabulary, "<|video|>"),
    )
    processor = processor_of(
        tf.PerceptionLMProcessor,
        "PerceptionLMVideoProcessor",
        image_processor=tf.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4),
        tokenizer=vocabulary,
        patch_size=14,
        pooling_ratio=2,
        chat_template=chat_template("<|image|>"),
    )
    return model_of(config), processor


@family(
    title="FastVLM",
    model_class="FastVlmForConditionalGeneration",
    image_tokens=(4, 4, 8),
    needs=("torchvision", "timm"),
)
def fast_vlm() -> Built:
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    config = tf.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 64,
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [8, 16, 32, 32, 32],
            },
        },
        text_config=text_config(vocabulary, model_type="qwen2"),
        image_token_index=token_id(vocabulary, "<image>"),
        image_seq_length=4,
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(
            size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}
        ),
        vocabulary,
        patch_size=64,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )
    model = model_of(config)
    with torch.no_grad():
        for name, weight in model.model.vision_tower.named_parameters():
            if name.endswith("gamma"):
                weight.fill_(0.5)  # as initialised, its blocks add next to nothing
            elif weight.dim() >= 2:
                torch.nn.init.kaiming_normal_(weight)
    return model, processor

"""Families that read documents: OCR, charts and forms."""

from __future__ import annotations

import torch
import transformers as tf

from ..tiny import (
    SIGLIP_VISION,
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


@family(
    title="LightOnOCR",
    model_class="LightOnOcrForConditionalGeneration",
    image_tokens=(6, 8, 16),
)
def lighton_ocr() -> Built:
    """Pixtral's encoder before Qwen3."""
    named = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>"}
    named["image_end_token"] = "<|vision_end|>"
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.LightOnOcrConfig(
        vision_config={**VISION, "model_type": "pixtral", "image_size": 112},
        text_config=text_config(vocabulary, model_type="qwen3", head_dim=16),
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        spatial_merge_size=2,
    )
    processor = tf.LightOnOcrProcessor(
        tf.PixtralImageProcessorPil(
            size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
        ),
        vocabulary,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=chat_template("<|image_pad|>"),
    )
    return model_of(config), processor


@family(
    title="GOT-OCR 2.0",
    model_class="GotOcr2ForConditionalGeneration",
    image_tokens=(256, 256, 512),
    takes_text_alone=False,
    has_pages=True,
    attention=None,
    since=(5, 23),
)
def got_ocr2() -> Built:
    """Each image is 256 tokens, whatever its size."""
    marks = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    vocabulary = tokenizer(marks)
    config = tf.GotOcr2Config(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 32,
            "image_size": 64,
            "patch_size": 1,
            "window_size": 8,
            "global_attn_indexes": [],
            "initializer_range": 0.02,
        },
        text_config=text_config(vocabulary, model_type="qwen2"),
        image_token_index=token_id(vocabulary, "<imgpad>"),
        image_seq_length=256,
        tie_word_embeddings=False,
    )
    processor = tf.GotOcr2Processor(
        tf.GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}),
        vocabulary,
        chat_template=chat_template("<img><imgpad></img>"),
    )
    model = model_of(config)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                weight.mul_(2.0)  # it would say the same few tokens
    return model, processor


@family(
    title="DeepSeek-OCR 2",
    model_class="DeepseekOcr2ForConditionalGeneration",
    image_tokens=(257, 545, 514),
    since=(5, 20),
)
def deepseek_ocr2() -> Built:
    """A global view of each image, and tiles of larger ones; experts in the decoder."""
    vocabulary = tokenizer(["<image>", "<|grounding|>"], image_token="<image>")
    config = tf.DeepseekOcr2Config(
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 192,
                "patch_size": 3,
                "window_size": 8,
                "global_attn_indexes": [],
                "initializer_range": 0.02,
                "downsample_channels": [16, 32],
            },
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        text_config=text_config(
            vocabulary,
            num_key_value_heads=4,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            moe_intermediate_size=32,
            mlp_layer_types=["dense", "sparse"],
        ),
        image_token_id=token_id(vocabulary, "<image>"),
    )
    processor = tf.DeepseekOcr2Processor(
        tf.DeepseekOcr2ImageProcessorPil(size={"height": 192, "width": 192}, tile_size=144),
        vocabulary,
        patch_size=3,
        downsample_ratio=4,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="HunyuanOCR",
    model_class="HunYuanVLForConditionalGeneration",
    image_tokens=(10, 17, 25),
    needs_torchvision_before=(5, 22),
)
def hunyuan_vl() -> Built:
    """Rotary positions on four axes: sequence, width, height and image."""
    named = {
        "image_token": "<|image_pad|>",
        "image_start_token": "<|vision_start|>",
        "image_end_token": "<|vision_end|>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.HunYuanVLConfig(
        vision_config={
            **VISION,
            "patch_size": 16,
            "out_hidden_size": 64,
            "max_image_size": 128,
            "min_image_size": 32,
        },
        text_config=text_config(
            vocabulary,
            head_dim=16,
            rope_parameters=rope([2, 2, 2, 2], rope_type="dynamic", alpha=1000.0, factor=1.0),
        ),
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        im_start_id=token_id(vocabulary, "<|vision_start|>"),
        im_end_id=token_id(vocabulary, "<|vision_end|>"),
    )
    processor = tf.HunYuanVLProcessor(
        tf.HunYuanVLImageProcessorPil(size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}),
        vocabulary,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model_of(config), processor


@family(
    title="Granite Vision 4",
    model_class="Granite4VisionForConditionalGeneration",
    image_tokens=(14, 16, 34),
)
def granite4_vision() -> Built:
    """Features of several layers of the encoder, each for a layer of the decoder."""
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    grids = [[56, 112], [112, 56], [112, 112]]
    config = tf.Granite4VisionConfig(
        vision_config={**SIGLIP_VISION, "hidden_size": 64},
        text_config=text_config(
            vocabulary,
            num_hidden_layers=6,
            embedding_multiplier=2.0,
            attention_multiplier=0.25,
            residual_multiplier=0.5,
            logits_scaling=0.5,
        ),
        qformer_config={
            "hidden_size": 64,
            "encoder_hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_token_index=token_id(vocabulary, "<image>"),
        image_grid_pinpoints=grids,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0], [0, 1]],
        spatial_vision_layer=-1,
        spatial_target_layers=[2, 3, 4, 5],
    )
    processor = tf.Granite4VisionProcessor(
        tf.LlavaNextImageProcessorPil(
            size={"height": 56, "width": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=grids,
        ),
        vocabulary,
        patch_size=14,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="VideoLLaMA 3",
    model_class="VideoLlama3ForConditionalGeneration",
    image_tokens=(24, 55, 72),
)
def video_llama_3() -> Built:
    """Its model computes the logits of every token."""
    vocabulary = tokenizer(["<|image_pad|>", "<|video_pad|>"])
    config = tf.VideoLlama3Config(
        vision_config={name: size for name, size in VISION.items() if name != "image_size"},
        text_config=text_config(vocabulary, model_type="qwen2"),
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
    )
    processor = processor_of(
        tf.VideoLlama3Processor,
        "VideoLlama3VideoProcessor",
        image_processor=tf.VideoLlama3ImageProcessorPil(
            patch_size=14,
            merge_size=1,
            size={"shortest_edge": 4 * 14 * 14, "longest_edge": 64 * 14 * 14},
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|image_pad|>"),
    )
    return model_of(config), processor


@family(
    title="EXAONE 4.5",
    model_class="Exaone4_5_ForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def exaone4_5() -> Built:
    """Layers of a sliding window, and layers of full attention without rotary positions."""
    vocabulary = tokenizer(["<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"])
    config = tf.Exaone4_5_Config(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        text_config=text_config(
            vocabulary,
            model_type="exaone4",
            head_dim=16,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
        ),
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
    )
    processor = processor_of(
        tf.Exaone4_5_Processor,
        "Qwen2VLVideoProcessor",
        image_processor=tf.Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<vision><|image_pad|></vision>"),
    )
    return model_of(config), processor

"""Families near to LLaVA, InternVL, DeepSeek-VL, GOT-OCR 2.0 and Gemma 3; images as tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from ..tiny import (
    CLIP_VISION,
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
    title="LLaVA-NeXT-Video",
    model_class="LlavaNextVideoForConditionalGeneration",
    image_tokens=(70, 56, 106),
    needs=("torchvision",),
)
def llava_next_video() -> Built:
    vocabulary = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    grids = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config = tf.LlavaNextVideoConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_index=token_id(vocabulary, "<image>"),
        video_token_index=token_id(vocabulary, "<video>"),
        image_grid_pinpoints=grids,
    )
    processor = processor_of(
        tf.LlavaNextVideoProcessor,
        "LlavaNextVideoVideoProcessor",
        image_processor=tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=grids,
        ),
        tokenizer=vocabulary,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="ViP-LLaVA",
    model_class="VipLlavaForConditionalGeneration",
    image_tokens=(16, 16, 32),
)
def vipllava() -> Built:
    """Features of several layers of the encoder, side by side."""
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    config = tf.VipLlavaConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_index=token_id(vocabulary, "<image>"),
        vision_feature_layers=[-2, 0],
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        vocabulary,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="Video-LLaVA",
    model_class="VideoLlavaForConditionalGeneration",
    image_tokens=(16, 16, 32),
    needs=("torchvision",),
    since=(5, 22),
)
def video_llava() -> Built:
    vocabulary = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    config = tf.VideoLlavaConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_index=token_id(vocabulary, "<image>"),
        video_token_index=token_id(vocabulary, "<video>"),
    )
    processor = processor_of(
        tf.VideoLlavaProcessor,
        "VideoLlavaVideoProcessor",
        image_processor=tf.VideoLlavaImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=vocabulary,
        patch_size=14,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="Qianfan-OCR",
    model_class="QianfanOCRForConditionalGeneration",
    image_tokens=(12, 12, 24),
)
def qianfan_ocr() -> Built:
    """InternVL's encoder and tiles before Qwen3."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.QianfanOCRConfig(
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config=text_config(vocabulary, model_type="qwen3", head_dim=16),
        image_token_id=token_id(vocabulary, "<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = tf.QianfanOCRProcessor(
        tf.GotOcr2ImageProcessorPil(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        vocabulary,
        image_seq_length=4,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="DeepSeek-VL 7B",
    model_class="DeepseekVLHybridForConditionalGeneration",
    image_tokens=(16, 16, 32),
)
def deepseek_vl_hybrid() -> Built:
    """Each image in two resolutions, for SigLIP and for SAM's encoder."""
    image = "<image_placeholder>"
    vocabulary = tokenizer([image], image_token=image)
    config = tf.DeepseekVLHybridConfig(
        vision_config=SIGLIP_VISION,
        high_res_vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 32,
            "image_size": 64,
            "patch_size": 4,
            "window_size": 8,
            "global_attn_indexes": [1],
        },
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_id=token_id(vocabulary, image),
        tie_word_embeddings=False,
    )
    processor = tf.DeepseekVLHybridProcessor(
        tf.DeepseekVLHybridImageProcessorPil(
            size={"height": 56, "width": 56},
            high_res_size={"height": 64, "width": 64},
            min_size=14,
        ),
        vocabulary,
        chat_template=chat_template(image),
        num_image_tokens=16,
    )
    return model_of(config), processor


_VQ_ENCODER: dict[str, Any] = {
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
}


@family(
    title="Chameleon",
    model_class="ChameleonForConditionalGeneration",
    image_tokens=(64, 64, 128),
    since=(5, 23),
)
def chameleon() -> Built:
    """Images become tokens of the vocabulary."""
    codes = [f"IMGIMG{''.join(chr(ord('A') + int(d)) for d in str(i))}Z" for i in range(32)]
    marks = ["<image>", "<racm3:break>", "<eoss>", "<reserved08706>"]
    vocabulary = tokenizer([*marks, *codes], image_token="<image>")
    vocabulary.sep_token = "<reserved08706>"
    config = tf.ChameleonConfig(
        **text_config(vocabulary),
        vq_config={**_VQ_ENCODER, "num_embeddings": len(codes), "resolution": 16},
        vocabulary_map=vocabulary.get_vocab(),
    )
    processor = tf.ChameleonProcessor(
        tf.ChameleonImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        vocabulary,
        image_seq_length=64,
    )
    return model_of(config), processor


@family(
    title="Emu3",
    model_class="Emu3ForConditionalGeneration",
    image_tokens=(60, 66, 112),
    is_alone=True,
)
def emu3() -> Built:
    """Images become tokens of the vocabulary, row by row."""
    codes = [f"<|visual token {i:06d}|>" for i in range(32)]
    named = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    vocabulary = tokenizer([*named.values(), "<|extra_200|>", *codes], **named)
    config = tf.Emu3Config(
        vq_config={
            **_VQ_ENCODER,
            "codebook_size": len(codes),
            "hidden_size": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "attn_resolutions": [],
        },
        text_config=text_config(vocabulary),
        vocabulary_map=vocabulary.get_vocab(),
    )
    processor = tf.Emu3Processor(
        tf.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64),
        vocabulary,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="PP-Chart2Table",
    model_class="GotOcr2ForConditionalGeneration",
    image_tokens=(256, 256, 512),
    takes_text_alone=False,
    attention=None,
)
def pp_chart2table() -> Built:
    """GOT-OCR 2.0's model with a processor of its own."""
    vocabulary = tokenizer(["<img>", "</img>", "<imgpad>"])
    config = tf.PPChart2TableConfig(
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
    processor = tf.PPChart2TableProcessor(
        tf.PPChart2TableImageProcessorPil(size={"height": 64, "width": 64}),
        vocabulary,
        chat_template=chat_template("<img>" + "<imgpad>" * 256 + "</img>"),
    )
    model = model_of(config)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                weight.mul_(2.0)  # it would say the same few tokens
    return model, processor


@family(
    title="T5Gemma 2",
    model_class="T5Gemma2ForConditionalGeneration",
    image_tokens=(4, 4, 8),
    answers_apart=True,
    why_not_slots="it is an encoder-decoder",
)
def t5gemma2() -> Built:
    """Gemma 3's image tokens in an encoder."""
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    ids = {f"{name}_index": token_id(vocabulary, token) for name, token in named.items()}
    text = text_config(
        vocabulary,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    )
    config = tf.T5Gemma2Config(
        encoder={
            "text_config": text,
            "vision_config": SIGLIP_VISION,
            "mm_tokens_per_image": 4,
            **ids,
        },
        decoder=text,
        image_token_index=ids["image_token_index"],
        tie_word_embeddings=False,
    )
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        vocabulary,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    return model_of(config), processor

"""Mixtures of experts, and families of documents, made like Qwen-VL and GLM-V."""

from __future__ import annotations

from itertools import chain

import torch
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
from .family import LINEAR, family
from .qwen import DEEPSTACK, GLM_TEXT, HYBRID_TEXT, QWEN3_VISION, glm_of, qwen_of

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_SIZE = {"shortest_edge": 4 * 28 * 28, "longest_edge": 128 * 28 * 28}


@family(
    title="Qwen3-VL MoE",
    model_class="Qwen3VLMoeForConditionalGeneration",
    image_tokens=(6, 10, 16),
)
def qwen3_vl_moe() -> Built:
    model, processor = qwen_of(
        tf.Qwen3VLMoeConfig,
        tf.Qwen3VLProcessor,
        {**QWEN3_VISION, **DEEPSTACK},
        video_processor="Qwen3VLVideoProcessor",
        head_dim=16,
        rope_parameters=rope([4, 2, 2], mrope_interleaved=True),
        **EXPERTS,
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                # Else the second and the third are often near a tie, and half precision decides.
                weight.mul_(4.0)
    return model, processor


@family(
    title="Qwen3.5 MoE",
    model_class="Qwen3_5MoeForConditionalGeneration",
    image_tokens=(6, 10, 16),
    why_not_slots=LINEAR,
)
def qwen3_5_moe() -> Built:
    """Some layers attend linearly; each has an expert for every token too."""
    return qwen_of(
        tf.Qwen3_5MoeConfig,
        tf.Qwen3VLProcessor,
        QWEN3_VISION,
        video_processor="Qwen3VLVideoProcessor",
        shared_expert_intermediate_size=32,
        **HYBRID_TEXT,
        **EXPERTS,
    )


@family(
    title="GLM-4.5V",
    model_class="Glm4vMoeForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def glm4v_moe() -> Built:
    """The first layer is dense; the others have an expert for every token too."""
    return _balanced(
        glm_of(
            tf.Glm4vMoeConfig,
            head_dim=32,
            n_routed_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            rope_parameters=rope([2, 3, 3], partial_rotary_factor=0.5),
        )
    )


@family(
    title="GLM-4.6V",
    model_class="Glm46VForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def glm46v() -> Built:
    return glm_of(tf.Glm46VConfig, processor="Glm46V", **GLM_TEXT)


def glmga() -> Built:
    """GLM-4.6V by another name, of which transformers has no processor of its own."""
    return glm_of(tf.GlmgaConfig, processor="Glm46V", **GLM_TEXT)


@family(
    title="GLM-OCR",
    model_class="GlmOcrForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def glm_ocr() -> Built:
    text = {"head_dim": 32, "rope_parameters": rope([4, 6, 6], partial_rotary_factor=1.0)}
    return glm_of(tf.GlmOcrConfig, processor="Glm46V", **text)


@family(
    title="PaddleOCR-VL",
    model_class="PaddleOCRVLForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def paddleocr_vl() -> Built:
    vocabulary = tokenizer(
        ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video_pad|>"],
        image_token="<|IMAGE_PLACEHOLDER|>",
    )
    config = tf.PaddleOCRVLConfig(
        text_config=text_config(vocabulary, head_dim=32, rope_parameters=rope([4, 6, 6])),
        vision_config=VISION,
        image_token_id=token_id(vocabulary, "<|IMAGE_PLACEHOLDER|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        vision_start_token_id=token_id(vocabulary, "<|IMAGE_START|>"),
        vision_end_token_id=token_id(vocabulary, "<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )
    processor = tf.PaddleOCRVLProcessor(
        tf.PaddleOCRVLImageProcessorPil(size=_SIZE),
        vocabulary,
        chat_template=chat_template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )
    return model_of(config), processor


@family(
    title="ERNIE-4.5-VL",
    model_class="Ernie4_5_VLMoeForConditionalGeneration",
    image_tokens=(6, 10, 24),
)
def ernie4_5_vl_moe() -> Built:
    """Tokens of images have experts of their own."""
    named = {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_start_token": "<|IMAGE_START|>",
        "image_end_token": "<|IMAGE_END|>",
        "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>",
        "video_end_token": "<|VIDEO_END|>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.Ernie4_5_VLMoeConfig(
        text_config=text_config(
            vocabulary,
            num_hidden_layers=3,
            moe_num_experts=6,
            moe_k=2,
            moe_num_shared_experts=1,
            moe_intermediate_size=[32, 16],
            rope_parameters=rope([3, 3, 2]),
        ),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 14,
        },
        **{f"{name}_id": token_id(vocabulary, token) for name, token in named.items()},
        tie_word_embeddings=False,
    )
    processor = processor_of(
        tf.Ernie4_5_VLMoeProcessor,
        "Ernie4_5_VLMoeVideoProcessor",
        video={"draw_on_frames": False},  # needs a font
        image_processor=tf.Ernie4_5_VLMoeImageProcessorPil(size=_SIZE),
        tokenizer=vocabulary,
        chat_template=chat_template("Picture: <|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )
    return _balanced((model_of(config), processor))


def _balanced(built: Built) -> Built:
    """With biases on the choice of experts, which training sets so that all have work."""
    model, processor = built
    with torch.no_grad():
        for name, value in chain(model.named_parameters(), model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                value.normal_(0, 0.2)
    return model, processor

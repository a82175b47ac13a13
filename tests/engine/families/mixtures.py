"""Mixtures of experts, and families of documents, made like Qwen-VL and GLM-V."""

from __future__ import annotations

from itertools import chain

import torch
import transformers as tf

from ..tiny import Built, rope
from .qwen import DEEPSTACK, GLM_TEXT, HYBRID_TEXT, QWEN3_VISION, glm_of, qwen_of

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen3_vl_moe() -> Built:
    return qwen_of(
        tf.Qwen3VLMoeConfig,
        tf.Qwen3VLProcessor,
        {**QWEN3_VISION, **DEEPSTACK},
        video_processor="Qwen3VLVideoProcessor",
        head_dim=16,
        rope_parameters=rope([4, 2, 2], mrope_interleaved=True),
        **EXPERTS,
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


def glm46v() -> Built:
    return glm_of(tf.Glm46VConfig, processor="Glm46V", **GLM_TEXT)


def glm_ocr() -> Built:
    text = {"head_dim": 32, "rope_parameters": rope([4, 6, 6], partial_rotary_factor=1.0)}
    return glm_of(tf.GlmOcrConfig, processor="Glm46V", **text)


def _balanced(built: Built) -> Built:
    """With biases on the choice of experts, which training sets so that all have work."""
    model, processor = built
    with torch.no_grad():
        for name, value in chain(model.named_parameters(), model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                value.normal_(0, 0.2)
    return model, processor

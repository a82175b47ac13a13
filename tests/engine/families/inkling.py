"""Inkling, whose layers are hybrids."""

from __future__ import annotations

from typing import Any

import transformers as tf

from ..tiny import (
    VISION,
    Built,
    chat_template,
    model_of,
    text_config,
    token_id,
    tokenizer,
)
from .family import HYBRID, family

_INKLING_TEXT: dict[str, Any] = {
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


@family(
    title="Inkling",
    model_class="InklingForConditionalGeneration",
    image_tokens=(6, 8, 16),
    why_not_slots=HYBRID,
    needs=("torchvision", "scipy"),
)
def inkling() -> Built:
    """Convolutions over the last tokens in each layer."""
    marks = ["<|unused_200054|>", "<|unused_200053|>", "<|content_image|>"]
    vocabulary = tokenizer([*marks, "<|content_audio_input|>"])
    config = tf.InklingConfig(
        vision_config={**VISION, "patch_size": 40},
        text_config=text_config(
            vocabulary, n_shared_experts=1, logits_mup_width_multiplier=1.0, **_INKLING_TEXT
        ),
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 4},
        image_token_id=token_id(vocabulary, "<|unused_200054|>"),
        audio_token_id=token_id(vocabulary, "<|unused_200053|>"),
        image_bos_token_id=token_id(vocabulary, "<|content_image|>"),
        audio_bos_token_id=token_id(vocabulary, "<|content_audio_input|>"),
    )
    processor = tf.InklingProcessor(
        tf.InklingFeatureExtractor(),
        tf.InklingImageProcessor(),
        vocabulary,
        chat_template=chat_template("<|content_image|><|unused_200054|>"),
    )
    return model_of(config), processor


@family(
    title="Inkling 2 Small",
    model_class="Inkling2ForConditionalGeneration",
    image_tokens=(6, 8, 16),
    attention=None,
    why_not_slots=HYBRID,
    needs=("torchvision",),
    since=(5, 23),
)
def inkling2() -> Built:
    return _inkling2(tf.Inkling2Config)


@family(
    title="Inkling 2 Mini",
    model_class="Inkling2LoopForConditionalGeneration",
    image_tokens=(6, 8, 16),
    attention=None,
    why_not_slots=HYBRID,
    needs=("torchvision",),
    since=(5, 24),
)
def inkling2_loop() -> Built:
    loop = {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2}
    return _inkling2(tf.Inkling2LoopConfig, loop_gate_rank=4, **loop)


def _inkling2(config_class: Any, **text: Any) -> Built:
    vocabulary = tokenizer(["<|unused_200054|>"])
    sizes = text_config(vocabulary, n_layers_per_attn_res_block=1, **_INKLING_TEXT, **text)
    config = config_class(
        vision_config={
            **VISION,
            "patch_size": 20,
            "posemb_grid_size": 8,
            "projection_hidden_dim": 32,
            "text_hidden_size": 64,
        },
        text_config={**sizes, "unpadded_vocab_size": sizes["vocab_size"]},
        image_token_id=token_id(vocabulary, "<|unused_200054|>"),
    )
    processor = tf.Inkling2Processor(
        tf.Inkling2ImageProcessor(),
        vocabulary,
        chat_template=chat_template("<|unused_200054|>"),
    )
    return model_of(config), processor

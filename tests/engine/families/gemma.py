"""PaliGemma and Gemma 3: image tokens attend to those behind them."""

from __future__ import annotations

import transformers as tf

from ..tiny import (
    SIGLIP_VISION,
    Built,
    chat_template,
    model_of,
    text_config,
    token_id,
    tokenizer,
)
from .family import family


@family(
    title="PaliGemma",
    model_class="PaliGemmaForConditionalGeneration",
    image_tokens=(16, 16, 32),
    takes_text_alone=False,
    sees_ahead=True,
)
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


@family(
    title="Gemma 3",
    model_class="Gemma3ForConditionalGeneration",
    image_tokens=(4, 4, 8),
    sees_ahead=True,
)
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

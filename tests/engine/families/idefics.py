"""Idefics and SmolVLM: a row's images, or tiles of images, on the second dimension."""

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
from .family import family


@family(
    title="Idefics2",
    model_class="Idefics2ForConditionalGeneration",
    image_tokens=(8, 8, 16),
    needs_torchvision_before=(5, 18),
)
def idefics2() -> Built:
    vocabulary = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    config = tf.Idefics2Config(
        vision_config={**VISION, "image_size": 112},
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        text_config=text_config(vocabulary, model_type="mistral", head_dim=16),
        image_token_id=token_id(vocabulary, "<image>"),
    )
    processor = tf.Idefics2Processor(
        tf.Idefics2ImageProcessorPil(
            size={"shortest_edge": 42, "longest_edge": 112}, do_image_splitting=False
        ),
        vocabulary,
        image_seq_len=8,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="Idefics3",
    model_class="Idefics3ForConditionalGeneration",
    image_tokens=(20, 12, 40),
    needs_torchvision_before=(5, 18),
)
def idefics3() -> Built:
    processor = tf.Idefics3Processor(
        tf.Idefics3ImageProcessorPil(**_TILES),
        tokenizer(_IDEFICS3_TOKENS),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return _idefics3_model(tf.Idefics3Config, processor.tokenizer), processor


@family(
    title="SmolVLM",
    model_class="SmolVLMForConditionalGeneration",
    image_tokens=(20, 12, 40),
    needs=("torchvision", "num2words"),
)
def smolvlm() -> Built:
    vocabulary = tokenizer(
        _IDEFICS3_TOKENS,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    processor = processor_of(
        tf.SmolVLMProcessor,
        "SmolVLMVideoProcessor",
        image_processor=tf.SmolVLMImageProcessorPil(**_TILES),
        tokenizer=vocabulary,
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return _idefics3_model(tf.SmolVLMConfig, vocabulary), processor


_TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
_IDEFICS3_TOKENS = [
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]


def _idefics3_model(config_class: Any, vocabulary: Any) -> Any:
    config = config_class(
        vision_config=VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_id=token_id(vocabulary, "<image>"),
        scale_factor=2,
        pad_token_id=vocabulary.pad_token_id,
    )
    return model_of(config)

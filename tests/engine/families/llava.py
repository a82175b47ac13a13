"""LLaVA and what came of it: CLIP or SigLIP, a projection, a decoder."""

from __future__ import annotations

from typing import Any

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
    title="LLaVA",
    model_class="LlavaForConditionalGeneration",
    image_tokens=(16, 16, 32),
)
def llava(**text: Any) -> Built:
    """LLaVA over a decoder of these settings."""
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    config = tf.LlavaConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, **{"model_type": "llama", **text}),
        image_token_index=token_id(vocabulary, "<image>"),
        image_seq_length=16,
    )
    processor = tf.LlavaProcessor(
        tf.LlavaImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        vocabulary,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="LLaVA-NeXT",
    model_class="LlavaNextForConditionalGeneration",
    image_tokens=(70, 56, 106),
)
def llava_next() -> Built:
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    grids = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config = tf.LlavaNextConfig(
        vision_config=CLIP_VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_index=token_id(vocabulary, "<image>"),
        image_seq_length=16,
        image_grid_pinpoints=grids,
    )
    processor = tf.LlavaNextProcessor(
        tf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
            image_grid_pinpoints=grids,
        ),
        vocabulary,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="LLaVA-OneVision",
    model_class="LlavaOnevisionForConditionalGeneration",
    image_tokens=(70, 56, 34),
)
def llava_onevision() -> Built:
    vocabulary = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    grids = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = tf.LlavaOnevisionConfig(
        vision_config=SIGLIP_VISION,
        text_config=text_config(vocabulary, model_type="qwen2"),
        image_token_index=token_id(vocabulary, "<image>"),
        video_token_index=token_id(vocabulary, "<video>"),
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_4",
    )
    processor = processor_of(
        tf.LlavaOnevisionProcessor,
        "LlavaOnevisionVideoProcessor",
        image_processor=tf.LlavaOnevisionImageProcessorPil(
            size={"height": 56, "width": 56}, image_grid_pinpoints=grids
        ),
        tokenizer=vocabulary,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor


@family(
    title="Pixtral",
    model_class="LlavaForConditionalGeneration",
    image_tokens=(35, 32, 72),
    needs=("torchvision",),
)
def pixtral() -> Built:
    """Pixtral in transformers: LLaVA over another vision tower, images of their own sizes."""
    vocabulary = tokenizer(PIXTRAL_TOKENS)
    config = tf.LlavaConfig(
        vision_config=PIXTRAL_VISION,
        text_config=text_config(vocabulary, model_type="mistral", head_dim=16, sliding_window=None),
        image_token_index=token_id(vocabulary, "[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return model_of(config), pixtral_processor(vocabulary, spatial_merge_size=1)


@family(
    title="Mistral Small 3",
    model_class="Mistral3ForConditionalGeneration",
    image_tokens=(12, 8, 20),
    needs=("torchvision",),
)
def mistral3() -> Built:
    vocabulary = tokenizer(PIXTRAL_TOKENS)
    config = tf.Mistral3Config(
        vision_config=PIXTRAL_VISION,
        text_config=text_config(vocabulary, model_type="mistral", head_dim=16, sliding_window=None),
        image_token_index=token_id(vocabulary, "[IMG]"),
        spatial_merge_size=2,
    )
    return model_of(config), pixtral_processor(vocabulary, spatial_merge_size=2)


PIXTRAL_TOKENS = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
PIXTRAL_VISION = {**VISION, "model_type": "pixtral", "image_size": 112}


def pixtral_processor(vocabulary: Any, *, spatial_merge_size: int) -> Any:
    return tf.PixtralProcessor(
        tf.PixtralImageProcessorPil(
            size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}
        ),
        vocabulary,
        patch_size=14,
        spatial_merge_size=spatial_merge_size,
        chat_template=chat_template("[IMG]"),
    )

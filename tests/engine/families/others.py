"""Families with an image processor and a layout of their own each."""

from __future__ import annotations

import torch
import transformers as tf

from ..tiny import (
    SIGLIP_VISION,
    VISION,
    Built,
    chat_template,
    model_of,
    text_config,
    token_id,
    tokenizer,
)
from .family import NO_FEATURES, family


@family(
    title="DeepSeek-VL",
    model_class="DeepseekVLForConditionalGeneration",
    image_tokens=(16, 16, 32),
)
def deepseek_vl() -> Built:
    image = "<image_placeholder>"
    vocabulary = tokenizer([image], image_token=image)
    config = tf.DeepseekVLConfig(
        vision_config=SIGLIP_VISION,
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_id=token_id(vocabulary, image),
        tie_word_embeddings=False,
    )
    processor = tf.DeepseekVLProcessor(
        tf.DeepseekVLImageProcessorPil(size={"height": 56, "width": 56}, min_size=14),
        vocabulary,
        chat_template=chat_template(image),
        num_image_tokens=16,
    )
    return model_of(config), processor


@family(
    title="Janus",
    model_class="JanusForConditionalGeneration",
    image_tokens=(16, 16, 32),
)
def janus() -> Built:
    named = {
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    config = tf.JanusConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "mlp_ratio": 2,
            "projection_dim": 64,
            "num_image_tokens": 16,
            "depth": 2,
        },
        # It also draws images; nothing here asks it to.
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": 4,
            "projection_dim": 64,
            "image_token_embed_dim": 64,
            "num_hidden_layers": 1,
        },
        text_config=text_config(vocabulary, model_type="llama"),
        image_token_id=token_id(vocabulary, "<image_placeholder>"),
        tie_word_embeddings=False,
    )
    processor = tf.JanusProcessor(
        tf.JanusImageProcessorPil(size={"height": 56, "width": 56}, min_size=14),
        vocabulary,
        chat_template=chat_template("<image_placeholder>"),
        num_image_tokens=16,
    )
    return model_of(config), processor


@family(
    title="Llama 3.2 Vision",
    model_class="MllamaForConditionalGeneration",
    image_tokens=(1, 1, 2),
    why_not_slots=NO_FEATURES,
    is_alone=True,
)
def mllama() -> Built:
    """Images are attended to in layers of their own."""
    vocabulary = tokenizer(["<|image|>"])
    config = tf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 64,
            "vision_output_dim": 64,
            "image_size": 56,
            "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
        text_config=text_config(
            vocabulary,
            # The image token is the last one, and has an embedding but no logit.
            vocab_size=len(vocabulary) - 1,
            num_hidden_layers=3,
            cross_attention_layers=[1],
        ),
        image_token_index=token_id(vocabulary, "<|image|>"),
    )
    processor = tf.MllamaProcessor(
        tf.MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=4),
        vocabulary,
        chat_template=chat_template("<|image|>"),
    )
    return model_of(config), processor


@family(
    title="BLIP-2",
    model_class="Blip2ForConditionalGeneration",
    image_tokens=(8, 8, 0),
    takes_text_alone=False,
    takes_several=False,
    why_not_slots="it takes exactly one image a row",
)
def blip_2() -> Built:
    vocabulary = tokenizer(["<image>"])
    config = tf.Blip2Config(
        vision_config=VISION,
        qformer_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(vocabulary),
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "word_embed_proj_dim": 64,
            "pad_token_id": vocabulary.pad_token_id,
            "bos_token_id": vocabulary.eos_token_id,
            "eos_token_id": vocabulary.eos_token_id,
        },
        num_query_tokens=8,
        image_token_index=token_id(vocabulary, "<image>"),
    )
    image_processor = tf.BlipImageProcessorPil(size={"height": 56, "width": 56})
    return model_of(config), tf.Blip2Processor(image_processor, vocabulary, num_query_tokens=8)


@family(
    title="Florence-2",
    model_class="Florence2ForConditionalGeneration",
    image_tokens=(50, 50, 0),
    takes_text_alone=False,
    takes_several=False,
    answers_apart=True,
    why_not_slots="it is an encoder-decoder",
)
def florence2() -> Built:
    vocabulary = tokenizer(["<image>"], image_token="<image>")
    config = tf.Florence2Config(
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [16, 32],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 7,
            "projection_dim": 64,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(vocabulary),
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 512,
            "pad_token_id": vocabulary.pad_token_id,
            "bos_token_id": vocabulary.bos_token_id,
            "eos_token_id": vocabulary.eos_token_id,
            "decoder_start_token_id": vocabulary.eos_token_id,
            "forced_eos_token_id": None,
        },
        image_token_id=token_id(vocabulary, "<image>"),
    )
    image_processor = tf.CLIPImageProcessorPil(
        size={"height": 56, "width": 56}, do_center_crop=False
    )
    image_processor.image_seq_length = 50
    model = model_of(config)
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name and "shared" not in name:
                weight.mul_(2.0)  # it would say the same few tokens
    return model, tf.Florence2Processor(image_processor, vocabulary)


@family(
    title="Phi-4-multimodal",
    model_class="Phi4MultimodalForCausalLM",
    image_tokens=(460, 417, 1039),
    why_not_slots=NO_FEATURES,
    needs=("torchvision",),
)
def phi4_multimodal() -> Built:
    vocabulary = tokenizer(
        ["<|image|>", "<|audio|>"], image_token="<|image|>", audio_token="<|audio|>"
    )
    config = tf.Phi4MultimodalConfig(
        **text_config(vocabulary, num_key_value_heads=2),
        # Its processor counts the tokens of crops of this size, whatever size is set.
        vision_config={
            **VISION,
            "image_size": 448,
            "crop_size": 448,
            "image_token_id": token_id(vocabulary, "<|image|>"),
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "input_size": 16,
            "audio_token_id": token_id(vocabulary, "<|audio|>"),
        },
    )
    processor = tf.Phi4MultimodalProcessor(
        tf.Phi4MultimodalImageProcessor(dynamic_hd=4),
        tf.Phi4MultimodalFeatureExtractor(),
        vocabulary,
        chat_template=chat_template("<|image|>"),
    )
    return model_of(config), processor

"""Families that take one image a row, and give it to the decoder in ways of their own."""

from __future__ import annotations

import torch
import transformers as tf

from ..tiny import VISION, Built, model_of, text_config, token_id, tokenizer
from .family import family


@family(
    title="InstructBLIP",
    model_class="InstructBlipForConditionalGeneration",
    image_tokens=(8, 8, 0),
    takes_text_alone=False,
    takes_several=False,
    why_not_slots="it takes exactly one image a row",
)
def instructblip() -> Built:
    """BLIP-2 whose queries also read the prompt, with a tokenizer of their own."""
    vocabulary = tokenizer(["<image>"])
    config = tf.InstructBlipConfig(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={
            "vocab_size": (len(vocabulary) + 7) // 8 * 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
        },
        text_config=text_config(vocabulary, model_type="llama"),
        num_query_tokens=8,
        image_token_index=token_id(vocabulary, "<image>"),
    )
    processor = tf.InstructBlipProcessor(
        tf.BlipImageProcessorPil(size={"height": 56, "width": 56}),
        vocabulary,
        tokenizer(["<image>"]),
        num_query_tokens=8,
    )
    model = model_of(config)
    with torch.no_grad():
        model.query_tokens.normal_()  # initialised to zero
    return model, processor


@family(
    title="Kosmos-2",
    model_class="Kosmos2ForConditionalGeneration",
    image_tokens=(0, 0, 0),
    takes_text_alone=False,
    takes_several=False,
    why_not_slots="it takes exactly one image a row",
    is_alone=True,
)
def kosmos2() -> Built:
    """Marks of places in the vocabulary; a mask says which tokens are of the image."""
    vocabulary = tokenizer(["<unk>", *(f"<image_{i}>" for i in range(64))])
    vocabulary.unk_token = "<unk>"
    processor = tf.Kosmos2Processor(
        tf.CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False),
        vocabulary,
        num_patch_index_tokens=16,
    )
    config = tf.Kosmos2Config(
        vision_config=VISION,
        text_config={
            "vocab_size": (len(vocabulary) + 7) // 8 * 8,
            "embed_dim": 64,
            "layers": 2,
            "ffn_dim": 128,
            "attention_heads": 4,
            "max_position_embeddings": 512,
            "pad_token_id": vocabulary.pad_token_id,
            "bos_token_id": vocabulary.bos_token_id,
            "eos_token_id": vocabulary.eos_token_id,
        },
        latent_query_num=64,
        tie_word_embeddings=False,
    )
    model = model_of(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Or the answer would not depend on the image: its features are of length one, and all
            # queries would read the same of them.
            if name.endswith(("q_proj.weight", "k_proj.weight")) and name.startswith("image_to"):
                weight.mul_(0.1)
            elif name.startswith("image_to"):
                weight.mul_(0.6)
            elif "embed_tokens" in name or ".model.layers" in name:
                weight.mul_(5.0)
    return model, processor


@family(
    title="Donut",
    model_class="VisionEncoderDecoderModel",
    image_tokens=(0, 0, 0),
    takes_text_alone=False,
    takes_several=False,
    attention=None,
    why_not_slots="it is an encoder-decoder",
    is_alone=True,
)
def donut() -> Built:
    """An encoder-decoder whose prompt is the beginning of what the decoder writes."""
    vocabulary = tokenizer(["<s_docvqa>", "<s_question>", "</s_question>", "<s_answer>"])
    ids = {
        "pad_token_id": vocabulary.pad_token_id,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "decoder_start_token_id": vocabulary.bos_token_id,
    }
    config = tf.VisionEncoderDecoderConfig(
        encoder={
            "model_type": "donut-swin",
            "image_size": [64, 64],
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        decoder={
            "model_type": "mbart",
            "vocab_size": len(vocabulary),
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 128,
            "is_decoder": True,
            "add_cross_attention": True,
            "forced_eos_token_id": None,
            **ids,
        },
        **ids,
    )
    image_processor = tf.DonutImageProcessorPil(size={"height": 64, "width": 64})
    return model_of(config), tf.DonutProcessor(image_processor, vocabulary)

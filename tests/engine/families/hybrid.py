"""Families whose layers choose among keys, attend linearly or convolve, or keep other states."""

from __future__ import annotations

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
from .family import INDEXED, INDEXED_AND_LINEAR, family
from .llava import PIXTRAL_TOKENS, PIXTRAL_VISION, pixtral_processor
from .mixtures import EXPERTS
from .qwen import HYBRID_TEXT, QWEN3_VISION, qwen_of

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
"""Latent keys and values, and experts."""
_INDEX = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 48}


@family(
    title="Mistral Small 4",
    model_class="Mistral3ForConditionalGeneration",
    image_tokens=(12, 8, 20),
    needs=("torchvision",),
)
def mistral_small4() -> Built:
    """Mistral 3 over a decoder with latent keys and values."""
    vocabulary = tokenizer(PIXTRAL_TOKENS)
    config = tf.Mistral3Config(
        vision_config=PIXTRAL_VISION,
        text_config=text_config(vocabulary, model_type="mistral4", **LATENT),
        image_token_index=token_id(vocabulary, "[IMG]"),
        spatial_merge_size=2,
    )
    return model_of(config), pixtral_processor(vocabulary, spatial_merge_size=2)


@family(
    title="Mistral Large 4",
    model_class="MistralLarge4ForConditionalGeneration",
    image_tokens=(12, 8, 20),
    needs=("torchvision",),
    why_not_slots=INDEXED,
    since=(5, 22),
)
def mistral_large4() -> Built:
    vocabulary = tokenizer(PIXTRAL_TOKENS)
    config = tf.MistralLarge4Config(
        vision_config=PIXTRAL_VISION,
        text_config=text_config(
            vocabulary, indexer_types=["full", "shared"], no_rope_layers=[1, 0], **LATENT, **_INDEX
        ),
        image_token_index=token_id(vocabulary, "[IMG]"),
        spatial_merge_size=2,
    )
    return model_of(config), pixtral_processor(vocabulary, spatial_merge_size=2)


@family(
    title="Hy4",
    model_class="HYV4VLForConditionalGeneration",
    image_tokens=(8, 15, 30),
    attention=None,
    why_not_slots=INDEXED,
    since=(5, 24),
)
def hy_v4_vl() -> Built:
    vocabulary = tokenizer(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    config = tf.HYV4VLConfig(
        text_config=text_config(
            vocabulary,
            indexer_types=["full", "shared"],
            hc_mult=2,
            rope_parameters=rope([2, 1, 1]),
            **LATENT,
            **_INDEX,
        ),
        vision_config={**VISION, "out_hidden_size": 64},
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
    )
    processor = processor_of(
        tf.HYV4VLProcessor,
        "HYV4VLVideoProcessor",
        image_processor=tf.HYV4VLImageProcessorPil(
            patch_size=14, size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model_of(config), processor


@family(
    title="GLM-5.3-Flash",
    model_class="Glm5NextForConditionalGeneration",
    image_tokens=(12, 18, 24),
    why_not_slots=INDEXED_AND_LINEAR,
    since=(5, 18),
)
def glm5_next() -> Built:
    tokens = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    vocabulary = tokenizer(list(tokens.values()))
    text = {**LATENT, **_INDEX, "qk_rope_head_dim": 0}
    config = tf.Glm5NextConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "image_size": 56,
            "out_hidden_size": 64,
            "intermediate_size": 64,
            "projection_intermediate_size": 64,
        },
        text_config=text_config(
            vocabulary,
            layer_types=["linear_attention", "indexed_attention"],
            indexer_types=["full", "full"],
            mlp_layer_types=["dense", "sparse"],
            index_kpool=4,
            linear_head_dim=16,
            linear_num_heads=4,
            hc_mult=2,
            **text,
        ),
        **{key: token_id(vocabulary, token) for key, token in tokens.items()},
    )
    processor = processor_of(
        tf.Glm5NextProcessor,
        "Glm5NextVideoProcessor",
        image_processor=tf.Glm5NextImageProcessorPil(min_image_tokens=4, max_image_tokens=64),
        tokenizer=vocabulary,
        chat_template=chat_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return model_of(config), processor


@family(
    title="Qwen4-Exp",
    model_class="Qwen4ExpForConditionalGeneration",
    image_tokens=(6, 10, 16),
    why_not_slots=INDEXED_AND_LINEAR,
    since=(5, 18),
)
def qwen4_exp() -> Built:
    return qwen_of(
        tf.Qwen4ExpConfig,
        tf.Qwen3VLProcessor,
        QWEN3_VISION,
        video_processor="Qwen3VLVideoProcessor",
        **{**HYBRID_TEXT, "layer_types": ["linear_attention", "indexed_attention"]},
        **EXPERTS,
        shared_expert_intermediate_size=24,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=16,
        indexer_compress_ratio=4,
        ple_layer_ids=[1],
        ple_embed_dim=16,
        heads_per_ngram=2,
        ngram_vocab_size_base=500,
        split_ngram_parts=1,
    )


@family(
    title="dots3 note",
    model_class="Dots3NoteForConditionalGeneration",
    image_tokens=(6, 10, 24),
    why_not_slots=INDEXED,
    needs=("torchvision",),
    since=(5, 23),
)
def dots3_note() -> Built:
    vocabulary = tokenizer(["<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>", "<|img|>"])
    text = {**LATENT, **_INDEX}
    config = tf.Dots3NoteConfig(
        text_config=text_config(
            vocabulary,
            head_dim=24,
            sliding_window=32,
            layer_types=["indexed_attention", "sliding_attention"],
            shared_experts_intermediate_size=24,
            swa_num_attention_heads=2,
            swa_num_key_value_heads=2,
            swa_q_lora_rank=24,
            swa_kv_lora_rank=24,
            swa_head_dim=24,
            swa_qk_nope_head_dim=16,
            swa_v_head_dim=16,
            **text,
        ),
        vision_config={
            **VISION,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
        },
        audio_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 64,
        },
        image_token_id=token_id(vocabulary, "<|imgpad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        audio_token_id=token_id(vocabulary, "<|audio_comp_pad|>"),
    )
    processor = processor_of(
        tf.Dots3NoteProcessor,
        "Qwen2VLVideoProcessor",
        image_processor=tf.Qwen2VLImageProcessorPil(
            temporal_patch_size=1,
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28},
        ),
        feature_extractor=tf.Dots3NoteFeatureExtractor(),
        tokenizer=vocabulary,
        chat_template=chat_template("<|img|><|imgpad|>"),
    )
    return model_of(config), processor


@family(
    title="Apertus 1.5",
    model_class="Apertus1p5ForConditionalGeneration",
    image_tokens=(54, 55, 127),
    attention=None,
    needs=("torchvision",),
    since=(5, 24),
)
def apertus1p5() -> Built:
    """Images become tokens of a codebook."""
    named = {
        "image_token": "<|image|>",
        "audio_token": "<|audio|>",
        "boi_token": "<|img_start|>",
        "eoi_token": "<|img_end|>",
        "image_wrapper_token": "<|img_token_start|>",
        "eol_token": "<|img_end_of_row|>",
        "boa_token": "<|audio_start|>",
        "eoa_token": "<|audio_end|>",
    }
    vocabulary = tokenizer(list(named.values()), **named)
    first = (len(vocabulary) + 7) // 8 * 8
    config = tf.Apertus1p5Config(
        vision_config={
            "codebook_size": 64,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        text_config={**text_config(vocabulary), "vocab_size": first + 128},
        audio_config={"model_type": "wavtokenizer_encoder", "codebook_size": 64},
        image_token_id=token_id(vocabulary, "<|image|>"),
        audio_token_id=token_id(vocabulary, "<|audio|>"),
        image_token_offset=first,
        audio_token_offset=first + 64,
    )
    processor = tf.Apertus1p5Processor(
        tf.Apertus1p5ImageProcessor(
            spatial_factor=4, size={"min_pixels": 16 * 16, "max_pixels": 32 * 32}
        ),
        tf.WavTokenizerFeatureExtractor(),
        vocabulary,
        chat_template=chat_template("<|image|>"),
    )
    return model_of(config), processor


@family(
    title="Nemotron 3 Nano Omni",
    model_class="NemotronH_Omni_Reasoning_V3",
    image_tokens=(15, 12, 24),
    why_not_slots="it has layers of linear_attention, moe",
    needs=("torchvision",),
    since=(5, 23),
)
def nemotron_h_omni() -> Built:
    """Layers of Mamba, experts and attention."""
    marks = ["<image>", "<video>", "<so_embedding>", "<so_start>", "<so_end>", "<img>", "</img>"]
    vocabulary = tokenizer(marks)
    config = tf.NemotronH_Omni_Reasoning_V3_Config(
        vision_config={
            "model_type": "radio",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "video_temporal_patch_size": 2,
        },
        text_config=text_config(
            vocabulary,
            model_type="nemotron_h",
            layers_block_type=["mamba", "attention", "moe"],
            num_hidden_layers=3,
            head_dim=16,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=2,
            chunk_size=16,
            n_routed_experts=4,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
        ),
        audio_config=None,
        projector_hidden_size=64,
        vision_hidden_size=32,
        image_token_id=token_id(vocabulary, "<image>"),
        video_token_id=token_id(vocabulary, "<video>"),
        audio_token_id=token_id(vocabulary, "<so_embedding>"),
    )
    processor = processor_of(
        tf.NemotronH_Omni_Reasoning_V3Processor,
        "NemotronH_Omni_Reasoning_V3VideoProcessor",
        image_processor=tf.NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=8, min_num_patches=16, max_num_patches=64
        ),
        tokenizer=vocabulary,
        feature_extractor=tf.ParakeetFeatureExtractor(),
        chat_template=chat_template("<image>"),
    )
    return model_of(config), processor

"""Families of large models: experts, latent keys and values, sound beside images."""

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
from .family import family
from .hybrid import LATENT
from .omni import WINDOWED_VISION
from .qwen import DEEPSTACK, QWEN3_VISION


@family(
    title="HyperCLOVA X SEED Think",
    model_class="HyperCLOVAXVisionV2ForConditionalGeneration",
    image_tokens=(6, 10, 24),
    since=(5, 18),
)
def hyperclovax_vision_v2() -> Built:
    vocabulary = tokenizer(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    config = tf.HyperCLOVAXVisionV2Config(
        text_config=text_config(vocabulary, model_type="hyperclovax"),
        vision_config={**WINDOWED_VISION, "model_type": "qwen2_5_vl_vision"},
        image_token_id=token_id(vocabulary, "<|image_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        tie_word_embeddings=False,
    )
    processor = processor_of(
        tf.HyperCLOVAXVisionV2Processor,
        "Qwen2VLVideoProcessor",
        image_processor=tf.Qwen2VLImageProcessorPil(
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return model_of(config), processor


@family(
    title="North Micro Vision",
    model_class="CohereCompassForConditionalGeneration",
    image_tokens=(6, 10, 16),
)
def cohere_compass() -> Built:
    marks = ["<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"]
    vocabulary = tokenizer(marks)
    turns = rope([4, 2, 2], mrope_interleaved=True)
    config = tf.CohereCompassConfig(
        text_config=text_config(
            vocabulary,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"sliding_attention": turns, "full_attention": None},
        ),
        vision_config={**QWEN3_VISION, **DEEPSTACK},
        image_token_id=token_id(vocabulary, "<|IMAGE_PAD|>"),
        video_token_id=token_id(vocabulary, "<|VIDEO_PAD|>"),
        vision_start_token_id=token_id(vocabulary, "<|VISION_START|>"),
        vision_end_token_id=token_id(vocabulary, "<|VISION_END|>"),
    )
    processor = processor_of(
        tf.CohereCompassProcessor,
        "CohereCompassVideoProcessor",
        image_processor=tf.CohereCompassImageProcessorPil(
            patch_size=16, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
    )
    return model_of(config), processor


_MUSE_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
    "layer_types": ["window_attention", "full_attention"],
}


_MUSE_MARKS = [
    *("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"),
    *("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"),
]


@family(
    title="Muse Glimmer",
    model_class="MuseGlimmerForConditionalGeneration",
    image_tokens=(6, 18, 13),
    needs=("torchvision",),
)
def muse_glimmer() -> Built:
    """Layers with a sliding window have rotary positions, the others none."""
    vocabulary = tokenizer(_MUSE_MARKS)
    config = tf.MuseGlimmerConfig(
        vision_config=_MUSE_VISION,
        text_config=text_config(
            vocabulary,
            head_dim=16,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
        ),
        out_hidden_size=128,
        projector_hidden_size=64,
        image_token_id=token_id(vocabulary, "<|patch|>"),
        video_token_id=token_id(vocabulary, "<|video|>"),
    )
    processor = processor_of(
        tf.MuseGlimmerProcessor,
        "MuseGlimmerVideoProcessor",
        image_processor=tf.MuseGlimmerImageProcessor(max_image_tokens=32),
        tokenizer=vocabulary,
        chat_template=chat_template("<|patch|>"),
    )
    return model_of(config), processor


@family(
    title="Muse Spark",
    model_class="MuseSparkForConditionalGeneration",
    image_tokens=(6, 18, 13),
    needs=("torchvision",),
    since=(5, 20),
)
def muse_spark() -> Built:
    """The same with experts, and sound."""
    sounds = ["<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"]
    vocabulary = tokenizer([*_MUSE_MARKS, *sounds])
    config = tf.MuseSparkConfig(
        vision_config=_MUSE_VISION,
        text_config=text_config(
            vocabulary,
            head_dim=16,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention"],
            num_local_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            moe_hidden_size=32,
        ),
        audio_config={
            "hidden_sizes": [4, 4, 8, 8],
            "depths": [1, 1, 1, 1],
            "out_hidden_size": 64,
        },
        out_hidden_size=128,
        projector_hidden_size=64,
        image_token_id=token_id(vocabulary, "<|patch|>"),
        video_token_id=token_id(vocabulary, "<|video|>"),
        audio_token_id=token_id(vocabulary, "<|audio|>"),
    )
    processor = processor_of(
        tf.MuseSparkProcessor,
        "MuseGlimmerVideoProcessor",
        image_processor=tf.MuseGlimmerImageProcessor(max_image_tokens=32),
        feature_extractor=tf.MuseSparkFeatureExtractor(),
        tokenizer=vocabulary,
        chat_template=chat_template("<|patch|>"),
    )
    return model_of(config), processor


@family(
    title="Step 3.7 Flash",
    model_class="Step3p7ForConditionalGeneration",
    image_tokens=(4, 10, 14),
    needs=("torchvision",),
)
def step3p7() -> Built:
    """Tiles beside the image; experts; more heads in layers with a sliding window."""
    marks = ["<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>"]
    vocabulary = tokenizer([*marks, "<im_start>", "<im_end>"])
    config = tf.Step3p7Config(
        vision_config={
            **VISION,
            "mlp_ratio": 2.0,
            "image_size": 112,
            "max_position_embeddings": 64,
        },
        text_config=text_config(
            vocabulary,
            num_hidden_layers=3,
            head_dim=16,
            num_sliding_attention_heads=6,
            sliding_window=32,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            n_routed_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            share_expert_dim=24,
        ),
        image_token_id=token_id(vocabulary, "<im_patch>"),
    )
    processor = tf.Step3p7Processor(
        tf.Step3p7ImageProcessor(size={"height": 112, "width": 112}, patch_size=56),
        vocabulary,
        chat_template=chat_template("<im_patch>"),
    )
    return model_of(config), processor


@family(
    title="MiniMax M3",
    model_class="MiniMaxM3SparseForConditionalGeneration",
    image_tokens=(6, 10, 24),
    why_not_slots="it has layers of minimax_m3_sparse",
    is_alone=True,
    needs=("torchvision",),
)
def minimax_m3_vl() -> Built:
    """The second layer attends to the blocks of keys that it chooses."""
    marks = ["image", "video", "start of image", "end of image"]
    vocabulary = tokenizer([f"]<]{mark}[>[" for mark in marks])
    config = tf.MiniMaxM3VLConfig(
        vision_config={**VISION, "image_size": 112},
        text_config=text_config(
            vocabulary,
            head_dim=16,
            rotary_dim=8,
            num_local_experts=6,
            num_experts_per_tok=2,
            intermediate_size=24,
            dense_intermediate_size=64,
            shared_intermediate_size=24,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["full_attention", "minimax_m3_sparse"],
            index_n_heads=2,
            index_head_dim=16,
            index_block_size=4,
            index_topk_blocks=3,
        ),
        projector_hidden_size=64,
        image_token_index=token_id(vocabulary, "]<]image[>["),
        video_token_index=token_id(vocabulary, "]<]video[>["),
    )
    processor = processor_of(
        tf.MiniMaxM3VLProcessor,
        "MiniMaxM3VLVideoProcessor",
        image_processor=tf.MiniMaxM3VLImageProcessor(
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("]<]image[>["),
    )
    return model_of(config), processor


@family(
    title="Kimi K2.5",
    model_class="Kimi_K25ForConditionalGeneration",
    image_tokens=(12, 8, 20),
    needs=("torchvision",),
)
def kimi_k25() -> Built:
    """One small vector a token is cached, of which each head makes its key and value."""
    marks = ["<|media_pad|>", "<|video_pad|>", "<|media_start|>", "<|media_end|>"]
    vocabulary = tokenizer(marks, image_token="<|media_pad|>", video_token="<|video_pad|>")
    config = tf.Kimi_K25Config(
        vision_config={**VISION, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config=text_config(
            vocabulary,
            model_type="deepseek_v3",
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            **LATENT,
        ),
        projection_hidden_size=32,
        image_token_id=token_id(vocabulary, "<|media_pad|>"),
        video_token_id=token_id(vocabulary, "<|video_pad|>"),
        vision_start_token_id=token_id(vocabulary, "<|media_start|>"),
        vision_end_token_id=token_id(vocabulary, "<|media_end|>"),
        tie_word_embeddings=False,
    )
    processor = processor_of(
        tf.Kimi_K25Processor,
        "Kimi_K25VideoProcessor",
        image_processor=tf.Kimi_K25ImageProcessor(
            size={"max_height": 8, "max_width": 8}, max_patches=64
        ),
        tokenizer=vocabulary,
        chat_template=chat_template("<|media_start|><|media_pad|><|media_end|>"),
    )
    return model_of(config), processor


@family(
    title="Llama 4",
    model_class="Llama4ForConditionalGeneration",
    image_tokens=(20, 16, 24),
    why_not_slots="it has layers of chunked_attention",
    needs=("torchvision",),
)
def llama4() -> Built:
    """Three layers attend within chunks, the fourth to all."""
    marks = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    vocabulary = tokenizer([*marks, "<|tile_x_separator|>", "<|tile_y_separator|>"])
    config = tf.Llama4Config(
        vision_config={
            **VISION,
            "intermediate_size": 128,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        text_config=text_config(
            vocabulary,
            head_dim=16,
            intermediate_size=24,
            intermediate_size_mlp=64,
            attention_chunk_size=24,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
            num_local_experts=4,
            interleave_moe_layer_step=2,
        ),
        image_token_index=token_id(vocabulary, "<|patch|>"),
        boi_token_index=token_id(vocabulary, "<|image_start|>"),
        eoi_token_index=token_id(vocabulary, "<|image_end|>"),
    )
    processor = tf.Llama4Processor(
        tf.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        vocabulary,
        chat_template=chat_template("<|image|>"),
    )
    return model_of(config), processor

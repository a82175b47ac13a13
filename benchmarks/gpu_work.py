"""What `gpu.py` computes: Qwen2.5-VL's shapes with random weights, and rows for them."""

from __future__ import annotations

import io
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH, MERGE, TEMPORAL = 14, 2, 2
SENTENCE = "a cat sits on the mat while seven red boats cross the cold lake at dawn"
WORDS = SENTENCE.split()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model of Qwen2.5-VL's kind."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    is_tied: bool
    rope: tuple[int, int, int] = (16, 24, 24)
    vision_depth: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_heads: int = 16
    vision_full: tuple[int, ...] = (7, 15, 23, 31)
    window: int = 112
    sides: tuple[int, int] = (448, 1024)
    answers: tuple[int, int] = (16, 256)


SHAPES = {
    "3b": Shape(
        hidden=2048,
        intermediate=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        vocabulary=151936,
        is_tied=True,
    ),
    "7b": Shape(
        hidden=3584,
        intermediate=18944,
        layers=28,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        is_tied=False,
    ),
    "tiny": Shape(
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        vocabulary=512,
        is_tied=True,
        rope=(2, 3, 3),
        vision_depth=2,
        vision_hidden=32,
        vision_intermediate=64,
        vision_heads=4,
        vision_full=(1,),
        window=56,
        sides=(56, 140),
        answers=(2, 12),
    ),
}


def make_processor(shape: Shape) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([SENTENCE] * 8, trainer)
    core.add_special_tokens(list(SPECIAL))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    image_processor = transformers.Qwen2VLImageProcessor(size=size)
    try:
        video_processor = transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2_5_VLProcessor(
            image_processor, tokenizer, video_processor, chat_template=TEMPLATE
        )
    except ImportError:

        class WithoutVideo(transformers.Qwen2_5_VLProcessor):  # type: ignore[misc,name-defined]
            @classmethod
            def get_attributes(cls) -> list[str]:
                names = transformers.Qwen2_5_VLProcessor.get_attributes()
                return [name for name in names if name != "video_processor"]

        WithoutVideo.__name__ = "Qwen2_5_VLProcessor"
        return WithoutVideo(image_processor, tokenizer, chat_template=TEMPLATE)


def make_config(shape: Shape, tokenizer: Any) -> Any:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": list(shape.rope),
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": shape.is_tied,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(shape.vision_full),
            "window_size": shape.window,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.is_tied,
    )


def make_model(shape: Shape, folder: Path, device: str, dtype: torch.dtype) -> Any:
    """A model of random weights on the device, and its repository without weights in a folder."""
    processor = make_processor(shape)
    config = make_config(shape, processor.tokenizer)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    vocabulary = processor.tokenizer
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id
    )
    return model.eval()


def make_picture(seed: int, sides: tuple[int, int]) -> bytes:
    draw = np.random.default_rng(seed)
    width, height = (int(side) for side in draw.integers(sides[0], sides[1] + 1, 2))
    coarse = draw.integers(0, 255, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = draw.normal(0, 6, (height, width, 1))
    pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=88)
    return out.getvalue()


def make_work(shape: Shape, num_rows: int, path: Path) -> list[dict[str, Any]]:
    draw = random.Random(7)
    with ProcessPoolExecutor() as pool:
        pictures = list(
            pool.map(make_picture, range(num_rows), [shape.sides] * num_rows, chunksize=16)
        )
    rows = [
        {
            "image": {"bytes": picture, "path": f"{i}.jpg"},
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(8, 45))),
            "max_new_tokens": draw.randint(*shape.answers),
        }
        for i, picture in enumerate(pictures)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)
    return rows

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Idefics3Processor

from batchvlm.demo import questions
from batchvlm.demo.model import (
    IMAGE,
    NUM_IMAGE_TOKENS,
    PAD,
    SPECIAL_TOKENS,
    build_model,
    build_tokenizer,
)


def test_special_tokens_come_first(processor: Idefics3Processor) -> None:
    tokenizer: Any = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.pad_token == PAD
    assert tokenizer.pad_token_id == 0


def test_the_tokenizer_is_lossless_and_knows_the_templates() -> None:
    tokenizer: Any = build_tokenizer()
    for text in ("Où est l'étoile? ☆\n\tend", *questions.corpus(3)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    answer = max(questions.corpus(50), key=len)
    assert len(tokenizer(answer)["input_ids"]) < len(answer) / 3


def test_an_image_of_any_size_becomes_36_tokens(processor: Idefics3Processor) -> None:
    call: Any = processor
    for size in ((40, 40), (300, 200), (96, 210)):
        conversation = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.new("RGB", size, (90, 30, 200))},
                    {"type": "text", "text": "What do you see?"},
                ],
            }
        ]
        inputs = call.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_tensors="pt"
        )
        image_id = call.tokenizer.convert_tokens_to_ids(IMAGE)
        assert (inputs["input_ids"] == image_id).sum() == NUM_IMAGE_TOKENS
        assert inputs["pixel_values"].shape == (1, 1, 3, 96, 96)


def test_the_seed_decides_the_first_weights(processor: Idefics3Processor) -> None:
    first, again, other = (build_model(processor, seed=seed) for seed in (0, 0, 1))
    weights = first.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in again.state_dict().items())
    assert any(not torch.equal(w, weights[name]) for name, w in other.state_dict().items())


def test_first_activations_are_neither_tiny_nor_huge(processor: Idefics3Processor) -> None:
    model: Any = build_model(processor, seed=0)
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 1, 3, 96, 96))).float()
    with torch.inference_mode():
        features = torch.stack(list(model.get_image_features(pixels).pooler_output))
        logits = model(input_ids=torch.arange(6, 200)[None]).logits
    assert 0.2 < features.std() < 5
    assert 0.2 < logits.std() < 5
    assert model.num_parameters() < 4_000_000  # two bytes each must stay below 8 MB

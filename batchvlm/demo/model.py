"""The demo model before training: tokenizer, processor, network and initial weights.

It is an Idefics3 of 1.6 million parameters, so that the demo runs the same code of transformers as
a model a thousand times its size.
"""

import math
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from batchvlm.demo import questions

IMAGE_SIDE: Final = 96
PATCH_SIDE: Final = 8
SCALE_FACTOR: Final = 2
NUM_IMAGE_TOKENS: Final = (IMAGE_SIDE // PATCH_SIDE // SCALE_FACTOR) ** 2
HIDDEN_SIZE: Final = 128
NUM_LAYERS: Final = 4
NUM_HEADS: Final = 4
NUM_KEY_VALUE_HEADS: Final = 2
MAX_POSITIONS: Final = 2048

PAD: Final = "<pad>"
START: Final = "<|im_start|>"
END: Final = "<end_of_utterance>"
FAKE: Final = "<fake_token_around_image>"
IMAGE: Final = "<image>"
GLOBAL: Final = "<global-img>"
# First in the vocabulary, so that the padding id is 0, as transformers expects.
SPECIAL_TOKENS: Final = (PAD, START, END, FAKE, IMAGE, GLOBAL)

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(max_vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on generated questions; the result is deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(questions.corpus(), trainer)
    fast_tokenizer: Any = PreTrainedTokenizerFast  # its constructor has no types
    wrapped: PreTrainedTokenizerFast = fast_tokenizer(
        tokenizer_object=tokenizer,
        # A decoder continues from the last column, so padding must not be there.
        padding_side="left",
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    return wrapped


def build_processor() -> Idefics3Processor:
    """Build the processor: any image becomes 96 x 96 pixels and 36 image tokens.

    It uses the PIL image processor, which needs no torchvision.
    """
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": IMAGE_SIDE},
        max_image_size={"longest_edge": IMAGE_SIDE},
        do_image_splitting=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Idefics3Processor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        image_seq_len=NUM_IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Idefics3Processor, *, seed: int) -> Idefics3ForConditionalGeneration:
    """Build the network with seeded initial weights, in float32."""
    tokenizer: Any = processor.tokenizer
    pad_id, start_id, end_id = tokenizer.convert_tokens_to_ids([PAD, START, END])
    settings: dict[str, Any] = {
        "vision_config": {
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": HIDDEN_SIZE * 3,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": NUM_HEADS,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH_SIDE,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": math.ceil(len(tokenizer) / 8) * 8,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": HIDDEN_SIZE * 3,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": NUM_HEADS,
            "num_key_value_heads": NUM_KEY_VALUE_HEADS,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "bos_token_id": start_id,
            "eos_token_id": end_id,
            "pad_token_id": pad_id,
        },
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "scale_factor": SCALE_FACTOR,
        "pad_token_id": pad_id,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(Idefics3Config(**settings))
    generation_config: Any = model.generation_config
    generation_config.bos_token_id = start_id
    generation_config.eos_token_id = end_id
    generation_config.pad_token_id = pad_id
    _initialize(model, seed)
    return model


@torch.no_grad()
def _initialize(model: nn.Module, seed: int) -> None:
    """Draw weights at a scale that keeps the variance of activations; the library's is too small.

    Output weights of residual branches are scaled down by the square root of their number.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_outputs = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.normal_(0, 0.05, generator=generator)
        elif "position_embedding" in name:
            weight.copy_(0.5 * _sin_cos_positions(IMAGE_SIDE // PATCH_SIDE, HIDDEN_SIZE))
        elif weight.dim() >= 2:
            std = 1 / math.sqrt(weight[0].numel())
            if name.endswith(residual_outputs):
                std /= math.sqrt(2 * NUM_LAYERS)
            weight.normal_(0, std, generator=generator)
        elif name.endswith("bias"):
            weight.zero_()


def _sin_cos_positions(side: int, size: int) -> Tensor:
    """Return sine-cosine embeddings of a square grid in row-major order, [side^2, size]."""
    quarter = size // 4
    frequencies = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies[None]
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, size)

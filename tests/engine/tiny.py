"""What tiny random models are made of: a tokenizer, a chat template, small configs, a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from batchvlm.model.loading import has_torchvision

Built = tuple[Any, Any]
"""Model and processor."""

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "describe the image in one word",
    "what is this? a cat or a dog",
    "compare these two images and explain the difference in detail",
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
CLIP_VISION = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP_VISION = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}


def tokenizer(specials: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with special tokens.

    Args:
        specials: tokens that stand for images, tiles and turns.
        named: attributes by which the processor finds some of them, such as `image_token`.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each line several times: a merge needs a pair that occurs twice.
    core.train_from_iterator(CORPUS * 8, trainer)
    core.add_special_tokens([PAD, BOS, EOS, *specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=dict(named),
    )


def chat_template(image_slot: str) -> str:
    """A chat template in which each image becomes `image_slot`."""
    return (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + image_slot + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )


def text_config(vocabulary: PreTrainedTokenizerFast, **settings: Any) -> dict[str, Any]:
    """A small decoder over a tokenizer's vocabulary."""
    return {
        # Models on the hub round up too, so that some ids belong to no token.
        "vocab_size": (len(vocabulary) + 7) // 8 * 8,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
        **settings,
    }


def token_id(vocabulary: PreTrainedTokenizerFast, token: str) -> int:
    """The id of one special token."""
    return int(vocabulary.convert_tokens_to_ids(token))


def processor_of(
    processor_class: type[ProcessorMixin],
    video_processor: str,
    *,
    video: Mapping[str, Any] | None = None,
    **parts: Any,
) -> ProcessorMixin:
    """A processor with its video processor, named by its class, where torchvision is here.

    Args:
        video: settings of the video processor.
        parts: the processor's other parts.
    """
    if has_torchvision():
        made = getattr(transformers, video_processor)(**(video or {}))
        return processor_class(video_processor=made, **parts)

    class WithoutVideo(processor_class):  # type: ignore[valid-type,misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            names = processor_class.get_attributes()
            return [name for name in names if name != "video_processor"]

        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            # ERNIE's own saves a font with which it writes on videos.
            return ProcessorMixin.save_pretrained(self, *args, **kwargs)

    WithoutVideo.__name__ = processor_class.__name__
    return WithoutVideo(**parts)


def model_of(config: Any) -> PreTrainedModel:
    """A model of random weights, always the same, whose answers depend on its images."""
    torch.manual_seed(0)
    model = transformers.AutoModelForMultimodalLM.from_config(config)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = [end.weight for end in ends if end is not None]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # As initialised, attention is near uniform and a layer adds next to nothing to a
            # token: the answer would be that token again and again, whatever the image.
            if weight.dim() >= 2 and not any(weight is e for e in embeddings):
                weight.mul_(10.0)
            if name.endswith("mm_input_projection_weight"):
                weight.normal_(0, 0.3)  # Gemma 3 initialises it to zero
            if "gate" in name and weight.dim() <= 1:
                weight.fill_(0.5)  # as does Mllama
    return model


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> Path:
    """Write model and processor as a repository on the hub holds them."""
    vocabulary: PreTrainedTokenizerFast = processor.tokenizer
    model.generation_config.update(
        eos_token_id=vocabulary.eos_token_id, pad_token_id=vocabulary.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rope(sections: Sequence[int], **settings: Any) -> Mapping[str, Any]:
    """Rotary positions in time, height and width, as Qwen-VL and GLM-4V have them."""
    return {
        "rope_type": "default",
        "mrope_section": list(sections),
        "rope_theta": 10_000.0,
        **settings,
    }

"""Chooses and creates the engine of a model."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import transformers

from batchvlm.config import EngineName, GenerationConfig, Guided, JobConfig, TaskName
from batchvlm.constraints.constraints import Constraints
from batchvlm.engine.choices import Choices
from batchvlm.engine.forward.allocator import keep_freed_memory
from batchvlm.engine.forward.replacements import tune
from batchvlm.engine.generate import ONE_IMAGE, GenerateEngine, eos_ids
from batchvlm.engine.parallel import Run, Team, ToFollowers, ToLeader, follow
from batchvlm.engine.protocol import Engine
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.engine.stops import SpokenTokens
from batchvlm.errors import ModelError
from batchvlm.forms.forms import has_form, run_choices, run_form
from batchvlm.model.loading import explained, load_model, load_processor
from batchvlm.model.quantization import refuses_inference_mode

log = logging.getLogger(__name__)

_VERIFIED = frozenset(
    {
        "apertus1p5",
        "aria",
        "aya_vision",
        "chameleon",
        "cohere2_vision",
        "cohere_compass",
        "cosmos3_edge",
        "cosmos3_omni",
        "deepseek_ocr2",
        "deepseek_vl",
        "deepseek_vl_hybrid",
        "emu3",
        "ernie4_5_vl_moe",
        "exaone4_5",
        "fast_vlm",
        "gemma3",
        "gemma3n",
        "gemma4",
        "gemma4_unified",
        "glm46v",
        "glm4v",
        "glm4v_moe",
        "glm_ocr",
        "glmga",
        "got_ocr2",
        "granite4_vision",
        "granite_docling",
        "hunyuan_vl",
        "hyperclovax_vision_v2",
        "idefics2",
        "idefics3",
        "internvl",
        "janus",
        "kimi_k25",
        "lighton_ocr",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "molmo2",
        "muse_glimmer",
        "muse_spark",
        "ovis2",
        "paddleocr_vl",
        "paligemma",
        "perception_lm",
        "pp_chart2table",
        "qianfan_ocr",
        "qwen2_5_omni_thinker",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_omni_moe_thinker",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
        "step3p7",
        "video_llama_3",
        "video_llava",
        "vipllava",
    }
)
"""Model types whose slot engine outputs were verified against `generate()`."""


def select_engine(cfg: JobConfig, *, device: str, followers: ToFollowers | None = None) -> Engine:
    """Load the model and create its engine; see `choose_engine`."""
    # The processor first: its errors show before the weights are loaded.
    processor = load_processor(cfg.model)
    if processor.chat_template is None:
        log.info("the model has no chat template: a prompt is its text alone, without roles")
    tokenizer = processor.tokenizer
    if cfg.model.tp_plan is None:
        return choose_engine(load_model(cfg.model, device=device), tokenizer, cfg)
    if followers is None:
        raise ModelError(
            "model.tp_plan divides the model among the processes of a launch; there is no launch",
            hint="leave model.tp_plan out here, or set model.device_map=auto",
        )
    team = Team(followers, device=device)
    with explained(cfg.model, "model"), team.loading(cfg):
        model = load_model(cfg.model, device=device)
    return choose_engine(model, tokenizer, cfg, team=team)


def follow_leader(leader: ToLeader, *, device: str) -> None:
    """Load this process's shard and run the leader's batches; see `parallel.follow`."""

    def load(cfg: JobConfig) -> Run:
        tokenizer = load_processor(cfg.model).tokenizer
        model = load_model(cfg.model, device=device)
        return GenerateEngine(model, tokenizer, cfg.batching).generate

    follow(leader, device=device, load=load)


def choose_engine(
    model: Any, tokenizer: Any, cfg: JobConfig, *, team: Team | None = None
) -> Engine:
    """Create the engine of a loaded model.

    Args:
        model: a transformers model on its final device.
        tokenizer: the tokenizer that decodes completions.
        cfg: the job; `engine=auto` uses slots if the model supports them.
        team: the other processes of a tensor-parallel replica; None without.

    Raises:
        ModelError: the requested engine cannot run the model.
    """
    name, reason = name_engine(model, cfg)
    if unused := _unused_defaults(model.generation_config, cfg.generation):
        log.info(
            "generation_config.json of the model sets %s, which is not used: generation.* decides",
            ", ".join(unused),
        )
    if model.device.type == "cpu":
        keep_freed_memory()
    if team is None:
        tune(model)
    choices = open_choices(cfg, model, tokenizer)
    constraints = None if choices else open_constraints(cfg, model, tokenizer)
    if name is EngineName.generate:
        if reason:
            log.info("%s runs by generate(): %s", type(model).__name__, reason)
        # Each part of the model casts its inputs to its own dtype.
        pixel_dtype = torch.float32 if isinstance(cfg.model.dtype, dict) else None
        return GenerateEngine(
            model,
            tokenizer,
            cfg.batching,
            constraints=constraints,
            pixel_dtype=pixel_dtype,
            choices=choices,
            keeps_special_tokens=not cfg.generation.skip_special_tokens,
            team=team,
        )
    return SlotEngine(
        model,
        tokenizer if cfg.generation.skip_special_tokens else SpokenTokens(tokenizer),
        cfg.batching,
        cfg.engine,
        eos_ids=eos_ids(model, tokenizer),
        suppress_ids=tuple(model.generation_config.suppress_tokens or ()),
        constraints=constraints,
        choices=choices,
    )


_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_ABSENT = {"no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1, "typical_p": 1}
"""Settings that generation.* does not have, with the values that have no effect."""


def _unused_defaults(found: Any, asked: GenerationConfig) -> list[str]:
    """Return the model's defaults of decoding that differ from the run's settings, as `key=value`.

    transformers' pipelines and vLLM's server apply them.
    """
    plain = type(found)()
    ours = {
        "do_sample": asked.temperature > 0,
        **{name: getattr(asked, name) for name in _SAMPLING},
    }
    return [
        f"{name}={value}"
        for name, own in (ours | _ABSENT).items()
        if (value := getattr(found, name, None)) not in (getattr(plain, name, None), own)
    ]


def name_engine(
    model: Any, cfg: JobConfig, *, device: torch.device | None = None
) -> tuple[EngineName, str]:
    """Return the engine's name, and why `auto` did not choose slots, or "".

    Args:
        model: may be on the meta device.
        device: the device it will run on; None: its current one.

    Raises:
        ModelError: the requested engine cannot run the model.
    """
    is_asked_for = cfg.engine.name is EngineName.slots
    reason = why_not_slots(model, is_asked_for=is_asked_for, device=device)
    if cfg.model.attn_implementation not in (None, "sdpa"):
        reason = f"model.attn_implementation={cfg.model.attn_implementation} is asked for"
    if cfg.model.device_map is not None:
        reason = "model.device_map is asked for"
    if cfg.model.tp_plan is not None:
        reason = "model.tp_plan is asked for"
    if isinstance(cfg.model.dtype, dict):
        reason = "model.dtype is given by part"
    match cfg.engine.name:
        case EngineName.slots if reason:
            raise ModelError(
                f"engine=slots cannot run {type(model).__name__}: {reason}",
                hint="engine=auto or engine=generate runs it by transformers' generate()",
            )
        case EngineName.generate:
            return EngineName.generate, ""
        case EngineName.auto if reason:
            return EngineName.generate, reason
    return EngineName.slots, ""


def open_choices(cfg: JobConfig, model: Any, tokenizer: Any) -> Choices | None:
    """Return the choices to score; None if the task decodes answers."""
    if not cfg.task.scores:
        return None
    return Choices(tokenizer, run_choices(cfg.task.output), eos_ids=eos_ids(model, tokenizer))


def open_constraints(cfg: JobConfig, model: Any, tokenizer: Any) -> Constraints | None:
    """Return the constraints for the task's output form; None if it has none or guiding is off."""
    output = cfg.task.output
    is_asked_for = bool(output.json_schema_column)
    if cfg.task.name is TaskName.extract:
        is_asked_for |= has_form(output)
    if not is_asked_for or output.guided is Guided.off:
        return None
    head = model.get_output_embeddings()
    num_ids = head.weight.shape[0] if head is not None else len(tokenizer)
    return Constraints(
        tokenizer,
        num_ids=num_ids,
        eos_ids=eos_ids(model, tokenizer),
        device=model.device,
        form=run_form(output),
        is_strict=output.guided is Guided.strict,
    )


def why_not_slots(
    model: Any, *, is_asked_for: bool = False, device: torch.device | None = None
) -> str:
    """Return why a model cannot run over slots, in a few words; empty if it can.

    Args:
        model: may be on the meta device.
        is_asked_for: ignore reasons that the canary checks.
        device: the device it will run on; None: its current one.
    """
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config.model_type in ONE_IMAGE:
        return "it takes exactly one image a row"
    encode = getattr(model.base_model, "get_image_features", None)
    if encode is None:
        return "it gives no image features of its own"
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        # No family has it before transformers 5.18.
        return f"it takes no image features from outside in transformers {transformers.__version__}"
    if "pixel_values" not in inspect.signature(encode).parameters:
        # Video-LLaVA before transformers 5.22.
        return f"its encoder takes no pixel_values in transformers {transformers.__version__}"
    if refuses_inference_mode(model):
        return "Quanto's int4 weights do not run in inference mode"
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(other))}"
    never = ("begin_suppress_tokens", "bad_words_ids")
    if named := [name for name in never if getattr(model.generation_config, name, None)]:
        return f"its repository sets {' and '.join(named)}"
    is_quantized = getattr(config, "quantization_config", None) is not None
    if not is_asked_for and is_quantized and (device or model.device).type == "cuda":
        return "quantized weights were tried over slots on a CPU alone; engine=slots tries it"
    if not is_asked_for and config.model_type not in _VERIFIED:
        return f"model type {config.model_type} was not tried over slots; engine=slots tries it"
    return ""

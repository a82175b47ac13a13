"""Loads a processor and a model from a Hub name or a folder, by transformers.

A torchvision that is installed but fails to import is dealt with here, other faults of what is
loaded in workarounds.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from batchvlm.config import ImageBackend, ModelConfig
from batchvlm.errors import BatchvlmError, ModelError
from batchvlm.model.adapters import apply_adapter
from batchvlm.model.chat_template import check_prompt_tokens, check_variables, default_template
from batchvlm.model.kinds import check_answers, from_auto_class, reads_prompts
from batchvlm.model.quantization import (
    check_installed,
    check_quantized,
    modules_to_skip,
    quantization_config,
)
from batchvlm.model.workarounds import patch_model, patch_processor, without_video
from batchvlm.words import first_line, num_bytes

log = logging.getLogger(__name__)

_WRONG_PLANS = frozenset({"glm5_next", "inkling_mm_model", "step3p7"})
"""Types of which transformers divides weights wrongly: Step 3.7 answers otherwise, others raise. So
with embeddings by layer: Gemma 3n answers otherwise, Gemma 4 raises."""

for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    # transformers imports these if installed; each process would log their unsupported kernels.
    logging.getLogger(_name).setLevel(logging.ERROR)


@cache
def has_torchvision() -> bool:
    """Whether torchvision is installed and imports. If it does not import, it is hidden.

    transformers only checks that it is installed, so a torchvision built for another torch (a CUDA
    build beside a CPU torch) would break every processor. Call before transformers is imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore] # noqa: F401
    except Exception as error:
        log.warning("torchvision is installed and does not import (%s); using PIL instead", error)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # With None, find_spec and import behave as if it were not installed.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return False
    return True


def resolve_backend(backend: ImageBackend) -> ImageBackend:
    """Resolve `auto` to torchvision if it works, else to PIL.

    Raises:
        ModelError: the setting is torchvision, which is not installed or does not import.
    """
    if backend is ImageBackend.auto:
        return ImageBackend.torchvision if has_torchvision() else ImageBackend.pil
    if backend is ImageBackend.torchvision and not has_torchvision():
        raise ModelError(
            "model.image_backend=torchvision: torchvision is not installed or does not import",
            hint="install the torchvision that belongs to your torch, or set "
            "model.image_backend=pil",
        )
    return backend


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """A model's limits on prompts, from its config."""

    max_positions: int | None
    """Context length: tokens of prompt and completion together. None if the config has none."""
    image_token_id: int | None
    patch_size: int | None
    """Side of a vision patch in pixels; None if the config has no single number."""
    is_encoder_decoder: bool = False
    """Whether prompt and completion are counted separately against `max_positions`."""


def load_limits(cfg: ModelConfig) -> ModelLimits:
    """Read a model's limits from its config, without loading weights."""
    with explained(cfg, "config"):
        config = _read_config(cfg)
    text = config.get_text_config(decoder=True)
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    places = (config, "image_token_id"), (config, "image_token_index"), (vision, "image_token_id")
    named = (getattr(place, name, None) for place, name in places)
    token_id = next((i for i in named if i is not None), None)
    positions = getattr(text, "max_position_embeddings", None)
    return ModelLimits(
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        image_token_id=token_id,
        patch_size=patch if isinstance(patch, int) else None,
        is_encoder_decoder=reads_prompts(config),
    )


def _read_config(cfg: ModelConfig) -> Any:
    """Read a model's config; of one that also speaks (Qwen-Omni), that of the part that writes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(cfg.path, **_hub_kwargs(cfg))
    return getattr(config, "thinker_config", config)


def load_processor(cfg: ModelConfig) -> Any:
    """Load the processor (image processor, tokenizer, chat template) of a model.

    Returns:
        A transformers `ProcessorMixin` that pads on the left and has at most one chat template.

    Raises:
        ModelError: the model does not exist, does not answer prompts, or its processor cannot be
            loaded here.
        ConfigError: the template does not have a variable of `chat_template_kwargs`, or the
            tokenizer a token of `prompt_tokens`.
    """
    backend = resolve_backend(cfg.image_backend)
    from transformers import AutoProcessor, PreTrainedConfig

    with contextlib.suppress(OSError):  # without a config, what follows says what is missing
        found, _ = PreTrainedConfig.get_config_dict(cfg.path, revision=cfg.revision or "main")
        check_answers(found.get("model_type", ""))
    with explained(cfg, "processor"), without_video(has_torchvision()):
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            cfg.path, backend=backend.value, **_hub_kwargs(cfg), **cfg.processor_kwargs
        )
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"model.path={cfg.path} has only a tokenizer, no image processor")
    # A decoder-only model continues from the last column, so padding must not be there.
    tokenizer.padding_side = "left"
    patch_processor(processor)
    processor.chat_template = default_template(processor)
    check_variables(processor.chat_template, cfg.chat_template_kwargs)
    check_prompt_tokens(processor, cfg.prompt_tokens)
    return processor


def load_model(cfg: ModelConfig, *, device: str) -> Any:
    """Load a model onto a device, in eval mode.

    Raises:
        ModelError: the model does not exist, or cannot be loaded with these settings.
    """
    has_torchvision()
    import torch
    from transformers.utils import logging as hub_logging

    from batchvlm.model.dtypes import cast_parts, part_dtypes, widest

    if not sys.stderr.isatty():
        hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if cfg.quantization is not None:
        check_installed(cfg.quantization)
    kwargs: dict[str, Any] = dict(_hub_kwargs(cfg))
    dtypes: dict[str, torch.dtype] | None = None
    if cfg.attn_implementation is not None:
        kwargs["attn_implementation"] = cfg.attn_implementation
    skip: list[str] = []
    with explained(cfg, "model"):
        config = _read_config(cfg)
        if config.model_type.endswith("_thinker"):
            kwargs["config"] = config
        if isinstance(cfg.dtype, dict):
            dtypes = part_dtypes(cfg.dtype, config)
            # Loaded in the widest dtype, so that no part loses precision before it is cast.
            kwargs["dtype"] = widest(dtypes)
        else:
            kwargs["dtype"] = cfg.dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        if cfg.quantization is not None:
            skeleton = load_skeleton(cfg)
            skip = modules_to_skip(skeleton, cfg.quantization_skip)
            compute = kwargs["dtype"] if cfg.dtype != "auto" else skeleton.dtype
            kwargs["quantization_config"] = quantization_config(
                cfg.quantization, skip, dtype=compute
            )
        if cfg.device_map is not None:
            kwargs |= spread(cfg, device)
        elif cfg.quantization is not None:
            # Weights are quantized while they load, and some kinds cannot be moved afterwards.
            kwargs["device_map"] = {"": device}
        if cfg.tp_plan is not None:
            from transformers.distributed.configuration_utils import DistributedConfig

            _check_divisible(cfg)
            kwargs["distributed_config"] = DistributedConfig(
                tp_size=cfg.gpus_per_replica, tp_plan="auto"
            )
        model, info = from_auto_class(
            lambda auto: auto.from_pretrained(cfg.path, output_loading_info=True, **kwargs),
            has_remote_code=cfg.trust_remote_code,
        )
        _check_whole(model, sorted(info["missing_keys"]), cfg)
        if (
            cfg.gpus_per_replica is not None
            and "disk" in getattr(model, "hf_device_map", {}).values()
        ):
            raise _too_large(cfg)
        if cfg.quantization is not None:
            check_quantized(model, skip)
        if dtypes is not None:
            cast_parts(model, dtypes)
        if not {"device_map", "distributed_config"} & set(kwargs):
            model = model.to(device)
        if cfg.adapter is not None:
            apply_adapter(model, cfg)
        patch_model(model)
        return model.eval()


def spread(cfg: ModelConfig, device: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that place a model on several GPUs.

    Args:
        cfg: this process uses `gpus_per_replica` GPUs; None: all.
        device: the first of them.

    Raises:
        ModelError: a mapping names a GPU outside the replica, or its free memory does not suffice.
    """
    import torch

    first, size = torch.device(device).index, cfg.gpus_per_replica
    if size is None or first is None:
        return {"device_map": cfg.device_map}
    if isinstance(cfg.device_map, dict):
        places = {
            module: _global_device(where, first, size) for module, where in cfg.device_map.items()
        }
        return {"device_map": places}
    # Querying the free memory of a GPU allocates memory on it, so other replicas' GPUs are not
    # queried. Host memory is left out, because each replica would count on all of it.
    room = {gpu: torch.accelerator.get_memory_info(gpu)[0] for gpu in range(first, first + size)}
    if cfg.quantization is None:
        needed = sum(p.numel() * p.element_size() for p in load_skeleton(cfg).parameters())
        if needed > sum(room.values()):
            raise _too_large(
                cfg, f"{num_bytes(needed)} of weights, {num_bytes(sum(room.values()))} free"
            )
    return {"device_map": cfg.device_map, "max_memory": room}


def _too_large(cfg: ModelConfig, why: str = "layers are too large for what is free") -> ModelError:
    return ModelError(
        f"model.path={cfg.path} does not fit into the {cfg.gpus_per_replica} GPUs of a replica: "
        f"{why}",
        hint="raise model.gpus_per_replica and start fewer processes, or see model.quantization",
    )


def _global_device(where: Any, first: int, size: int) -> Any:
    """Translate a device of `model.device_map`, which counts from the replica's first GPU."""
    kind, _, number = str(where).partition(":")
    number = kind if kind.isdecimal() else number
    if not number.isdecimal():
        return where
    if int(number) >= size:
        raise ModelError(
            f"model.device_map names GPU {number}, and a replica has {size} "
            "(model.gpus_per_replica), counted from 0"
        )
    return first + int(number)


def _check_divisible(cfg: ModelConfig) -> None:
    """Refuse a model that cannot be divided among the processes of a replica.

    Raises:
        ModelError: transformers has no plan for it, or its number of heads is not divisible.
    """
    model, size = load_skeleton(cfg), cfg.gpus_per_replica or 1
    if not model.tp_plan:
        raise ModelError(
            f"model.tp_plan: transformers has no plan that divides {type(model).__name__}",
            hint="model.device_map=auto spreads it layer by layer",
        )
    text = model.config.get_text_config(decoder=True)
    has_embeddings_by_layer = bool(getattr(text, "hidden_size_per_layer_input", None))
    if has_embeddings_by_layer or model.config.model_type in _WRONG_PLANS:
        raise ModelError(
            f"model.tp_plan: the plan of transformers is wrong for {type(model).__name__}"
            + (" with embeddings by layer" if has_embeddings_by_layer else ""),
            hint="model.device_map=auto spreads it layer by layer",
        )
    # Where layers differ, transformers refuses to read a single number.
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    for layer, name in product(layers, ("num_attention_heads", "num_key_value_heads")):
        count = getattr(layer, name, None)
        if isinstance(count, int) and count % size:
            raise ModelError(
                f"model.tp_plan: {size} processes cannot divide the {name}={count} of "
                f"model.path={cfg.path}",
                hint="set model.gpus_per_replica to a divisor, or model.device_map=auto",
            )


def _check_whole(model: Any, missing: Sequence[str], cfg: ModelConfig) -> None:
    """Refuse a model whose language model has randomly initialized weights.

    transformers initializes missing weights at random. Checkpoints often lack weights of the vision
    tower that no answer needs, so those only cause a warning.

    Raises:
        ModelError: weights of the language model are missing.
    """
    if not missing:
        return
    vital = {id(model.get_output_embeddings()), id(model.get_decoder())} - {id(None), id(model)}
    inside = tuple(f"{path}." for path, m in model.named_modules() if id(m) in vital)
    lacking = [name for name in missing if name.startswith(inside)]
    if lacking:
        raise ModelError(
            f"model.path={cfg.path} lacks {len(lacking)} weights of the language model, "
            f"such as {lacking[0]}",
            hint="the download may be incomplete, or the repository may hold another model",
        )
    log.warning(
        "%s lacks %d weights, which are initialized at random, such as %s",
        cfg.path,
        len(missing),
        missing[0],
    )


def load_skeleton(cfg: ModelConfig) -> Any:
    """Create the model on the meta device: its class, shapes and dtypes, without weights.

    Raises:
        ModelError: the errors of `load_model` that follow from the config.
    """
    has_torchvision()
    import torch

    from batchvlm.model.dtypes import cast_parts, part_dtypes, saved_dtype, widest

    with explained(cfg, "config"):
        config = _read_config(cfg)
        dtypes = part_dtypes(cfg.dtype, config) if isinstance(cfg.dtype, dict) else None
        if dtypes is not None:
            dtype = widest(dtypes)
        else:
            dtype = saved_dtype(config) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        kwargs = {"trust_remote_code": cfg.trust_remote_code, "dtype": dtype}
        with torch.device("meta"):
            model = from_auto_class(
                lambda auto: auto.from_config(config, **kwargs),
                has_remote_code=cfg.trust_remote_code,
            )
        if dtypes is not None:
            cast_parts(model, dtypes)
        return model


def _hub_kwargs(cfg: ModelConfig) -> dict[str, Any]:
    return {"revision": cfg.revision or "main", "trust_remote_code": cfg.trust_remote_code}


@contextlib.contextmanager
def explained(cfg: ModelConfig, part: str) -> Iterator[None]:
    """Turn any exception into a `ModelError` of one line that names the model and `part`."""
    try:
        yield
    except BatchvlmError:
        raise
    # Libraries raise their own types: safetensors' error derives directly from Exception.
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, KeyError | AttributeError):
            reason = f"{type(error).__name__}: {reason}"
        if "trust_remote_code" in str(error) and not cfg.trust_remote_code:
            raise ModelError(
                f"model.path={cfg.path} needs Python code that comes with its repository",
                hint="model.trust_remote_code=true runs that code with all your rights, in every "
                "process of the job: read it first, and pin model.revision to what you read",
            ) from error
        hint = ""
        if isinstance(error, OSError):
            hint = "check model.path and model.revision"
        elif cfg.tp_plan is not None and "ignore_mismatched_sizes" in reason:
            reason = "transformers divides some of its weights wrongly"
            hint = "model.device_map=auto spreads it layer by layer"
        elif part == "processor" and not has_torchvision():
            hint = "some processors need torchvision, which is not installed or does not import"
        raise ModelError(
            f"cannot load the {part} of model.path={cfg.path}: {reason}", hint=hint
        ) from error

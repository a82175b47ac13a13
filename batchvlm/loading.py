"""Hub name or folder -> processor and model, as transformers loads them.

The one place that knows how loading breaks: a torchvision that is installed and does not import,
processors that insist on a video processor, model code from a stranger's repository.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from batchvlm.adapters import apply_adapter
from batchvlm.config import ImageBackend, ModelConfig
from batchvlm.errors import BatchvlmError, ModelError
from batchvlm.quantization import (
    check_installed,
    check_quantized,
    modules_to_skip,
    quantization_config,
)
from batchvlm.words import num_bytes

log = logging.getLogger(__name__)


for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    # transformers imports them where they are installed, and they tell programmers, in every
    # process, which of their kernels are not for this machine.
    logging.getLogger(_name).setLevel(logging.ERROR)


@cache
def has_torchvision() -> bool:
    """Whether torchvision is installed and imports; one that does not is hidden.

    transformers judges by presence alone, so a torchvision built for another torch (a CUDA build
    beside a CPU torch) would take every processor down with it. Call before transformers loads.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # type: ignore[import-not-found,unused-ignore] # noqa: F401
    except Exception as error:
        log.warning("torchvision is installed and does not import (%s); using PIL instead", error)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # None makes both find_spec and import answer as if it were not installed.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return False
    return True


def resolve_backend(backend: ImageBackend) -> ImageBackend:
    """Decide between torchvision and PIL where the setting leaves it open.

    Raises:
        ModelError: torchvision is asked for and does not work here.
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
    """What a model's config says about the prompts it can take."""

    max_positions: int | None
    """Tokens of prompt and answer together; None where the config does not say."""
    image_token_id: int | None
    patch_size: int | None
    """Pixels a side of a vision patch, where one number says it."""
    is_encoder_decoder: bool = False
    """Whether prompt and answer have positions of their own each."""


def load_limits(cfg: ModelConfig) -> ModelLimits:
    """Read a model's limits from its config, without its weights."""
    from transformers import AutoConfig

    with explained(cfg, "config"):
        config = AutoConfig.from_pretrained(cfg.path, **_hub_kwargs(cfg))
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
        is_encoder_decoder=bool(config.is_encoder_decoder),
    )


def load_processor(cfg: ModelConfig) -> Any:
    """Load the processor (image processor, tokenizer, chat template) of a model.

    Returns:
        A transformers `ProcessorMixin`, padding on the left, with one chat template at most.

    Raises:
        ModelError: there is no such model, or its processor needs something that is not here.
    """
    backend = resolve_backend(cfg.image_backend)
    from transformers import AutoProcessor

    with explained(cfg, "processor"), _video_apart():
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            cfg.path, backend=backend.value, **_hub_kwargs(cfg), **cfg.processor_kwargs
        )
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"model.path={cfg.path} has a tokenizer alone, no image processor")
    # A decoder-only model continues from the last column, so padding must not be there.
    tokenizer.padding_side = "left"
    processor.chat_template = _default_template(processor)
    return processor


def _default_template(processor: Any) -> str | None:
    """The chat template that is rendered where none is named; None where there is none at all."""
    found: Any = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(found, dict) and "default" not in found:
        raise ModelError(
            f"the model has chat templates named {', '.join(sorted(found))} and none as default",
            hint="give the text of one by model.processor_kwargs.chat_template",
        )
    template: str | None = found["default"] if isinstance(found, dict) else found
    return template


def load_model(cfg: ModelConfig, *, device: str) -> Any:
    """Load a model's weights onto a device, ready to answer.

    Raises:
        ModelError: there is no such model, its class is unknown, or its code is not trusted.
    """
    has_torchvision()
    import torch
    from transformers import AutoConfig
    from transformers.utils import logging as hub_logging

    from batchvlm.dtypes import cast_parts, part_dtypes, widest

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
        if isinstance(cfg.dtype, dict):
            config = AutoConfig.from_pretrained(cfg.path, **_hub_kwargs(cfg))
            dtypes = part_dtypes(cfg.dtype, config)
            # No part may lose what it is to keep.
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
            # Quantized on the way in; some cannot be moved afterwards.
            kwargs["device_map"] = {"": device}
        if cfg.tp_plan is not None:
            from transformers.distributed.configuration_utils import DistributedConfig

            _check_divisible(cfg)
            kwargs["distributed_config"] = DistributedConfig(
                tp_size=cfg.gpus_per_replica, tp_plan="auto"
            )
        model, info = _by_class(
            cfg, lambda auto: auto.from_pretrained(cfg.path, output_loading_info=True, **kwargs)
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
        return model.eval()


def spread(cfg: ModelConfig, device: str) -> dict[str, Any]:
    """Where `from_pretrained` puts a model that one GPU does not hold.

    Args:
        cfg: `gpus_per_replica` of them are this process's; None: all.
        device: the first of them.

    Raises:
        ModelError: a mapping names one that is not among them, or they have too little memory.
    """
    import torch

    first, size = torch.device(device).index, cfg.gpus_per_replica
    if size is None or first is None:
        return {"device_map": cfg.device_map}
    if isinstance(cfg.device_map, dict):
        places = {module: _place(where, first, size) for module, where in cfg.device_map.items()}
        return {"device_map": places}
    # Of others' GPUs not even the free memory is asked for, which would take some of it. Not the
    # host's either: each replica would count on all of it.
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


def _place(where: Any, first: int, size: int) -> Any:
    """A device of a mapping, which counts the GPUs of its own replica from 0."""
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
    """Refuse a model that does not divide among the processes of a replica.

    Raises:
        ModelError: transformers does not know how to divide it, or not by so many.
    """
    model, size = load_skeleton(cfg), cfg.gpus_per_replica or 1
    if not model.tp_plan:
        raise ModelError(
            f"model.tp_plan: transformers has no plan that divides {type(model).__name__}",
            hint="model.device_map=auto spreads it layer by layer",
        )
    text = model.config.get_text_config(decoder=True)
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(text, name, None)
        if isinstance(count, int) and count % size:
            raise ModelError(
                f"model.tp_plan: {size} processes cannot divide the {name}={count} of "
                f"model.path={cfg.path}",
                hint="set model.gpus_per_replica to a divisor, or model.device_map=auto",
            )


def _check_whole(model: Any, missing: Sequence[str], cfg: ModelConfig) -> None:
    """Refuse a model that would speak with weights drawn at random.

    transformers draws what a checkpoint lacks and says so in a report for programmers. Of the
    vision part, something that no answer needs is often missing.

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
            f"model.path={cfg.path}: {len(lacking)} weights of the language model are not in it, "
            f"such as {lacking[0]}",
            hint="the download may be cut short, or the repository be another model's",
        )
    log.warning(
        "%d weights of %s are not in it and drawn at random, such as %s",
        len(missing),
        cfg.path,
        missing[0],
    )


def _by_class(cfg: ModelConfig, make: Callable[[Any], Any]) -> Any:
    """Make a model with the first of transformers' auto classes that knows its kind.

    Raises:
        ValueError: none does.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    autos: list[Any] = [AutoModelForImageTextToText, AutoModelForMultimodalLM]
    if cfg.trust_remote_code:
        # Code of a repository's own names itself by these, too.
        autos += [AutoModelForCausalLM, AutoModel]
    for auto in autos:
        try:
            return make(auto)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            unknown = error
    raise unknown


def load_skeleton(cfg: ModelConfig) -> Any:
    """A model of the right class and shapes without weights: on the device `meta`.

    Raises:
        ModelError: as `load_model`, as far as the config tells.
    """
    has_torchvision()
    import torch
    from transformers import AutoConfig

    from batchvlm.dtypes import cast_parts, part_dtypes, saved_dtype, widest

    with explained(cfg, "config"):
        config = AutoConfig.from_pretrained(cfg.path, **_hub_kwargs(cfg))
        dtypes = part_dtypes(cfg.dtype, config) if isinstance(cfg.dtype, dict) else None
        if dtypes is not None:
            dtype = widest(dtypes)
        else:
            dtype = saved_dtype(config) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
        kwargs = {"trust_remote_code": cfg.trust_remote_code, "dtype": dtype}
        with torch.device("meta"):
            model = _by_class(cfg, lambda auto: auto.from_config(config, **kwargs))
        if dtypes is not None:
            cast_parts(model, dtypes)
        return model


def _hub_kwargs(cfg: ModelConfig) -> dict[str, Any]:
    return {"revision": cfg.revision or "main", "trust_remote_code": cfg.trust_remote_code}


@contextlib.contextmanager
def explained(cfg: ModelConfig, part: str) -> Iterator[None]:
    """Turn whatever loading raises into one line that names the model."""
    try:
        yield
    except BatchvlmError:
        raise
    # The libraries' own kinds among them: safetensors' derives from nothing but Exception.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
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
        elif part == "processor" and not has_torchvision():
            hint = "some processors need torchvision, which is not installed or does not import"
        raise ModelError(
            f"cannot load the {part} of model.path={cfg.path}: {reason[:300]}", hint=hint
        ) from error


@contextlib.contextmanager
def _video_apart() -> Iterator[None]:
    """Keep what concerns images alone from breaking on video processors."""
    if has_torchvision():
        from transformers.video_processing_utils import BaseVideoProcessor

        # transformers 5.17 and 5.18 hand the image backend on to them, who raise.
        with _replaced(BaseVideoProcessor, "from_dict") as from_dict:

            def without_backend(cls: type, values: Any, /, **kwargs: Any) -> Any:
                kwargs.pop("backend", None)
                return from_dict(cls, values, **kwargs)

            setattr(BaseVideoProcessor, "from_dict", classmethod(without_backend))  # noqa: B010
            yield
        return
    from transformers import ProcessorMixin

    # They exist for torchvision alone, and processors of Qwen-VL's kind refuse to load without
    # theirs. No row here is a video, so leave it out where it could not be loaded.
    with _replaced(ProcessorMixin, "get_attributes") as get_attributes:

        def without_video(cls: type) -> list[str]:
            return [name for name in get_attributes(cls) if name != "video_processor"]

        setattr(ProcessorMixin, "get_attributes", classmethod(without_video))  # noqa: B010
        yield


@contextlib.contextmanager
def _replaced(owner: type, name: str) -> Iterator[Any]:
    """Give a class method's function, and set the class method back at the end."""
    original = inspect.getattr_static(owner, name)
    try:
        yield original.__func__
    finally:
        setattr(owner, name, original)

"""Weights in fewer bits: which library, and exactly which modules.

The libraries leave out the modules that they are told to by name, and say nothing where a name
matches none: "vision_tower" leaves nothing out where the module is `model.vision_tower`. Here names
are resolved against the model before its weights are read, and the outcome is looked at afterwards.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from batchvlm.config import Quantization
from batchvlm.errors import ModelError

_NEEDS = {
    "quanto": ("optimum.quanto", "quanto"),
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
}
"""The module of each library, and the extra that installs it."""


_BYTES = {Quantization.quanto_int4: 0.53, Quantization.bnb_nf4: 0.5625}
"""Of a weight, with its share of what scales it; all other kinds take one."""


def check_installed(kind: Quantization) -> None:
    """Refuse a quantization whose library is not here.

    Raises:
        ModelError: names the extra that brings it.
    """
    module, extra = _NEEDS[kind.value.split("_")[0]]
    try:
        is_here = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        is_here = False
    if not is_here:
        raise ModelError(
            f"model.quantization={kind.value} needs {module}, which is not installed",
            hint=f"pip install 'batchvlm[{extra}]'",
        )


def modules_to_skip(skeleton: Any, names: Sequence[str] | None) -> list[str]:
    """Full paths of the modules whose weights stay as they are.

    Args:
        skeleton: the model, its weights not needed.
        names: full paths or their last parts; None: all linear layers but those of the language
            model's layers, so that images and logits are as exact as ever.

    Raises:
        ModelError: a name matches no module.
    """
    paths = [path for path, _ in skeleton.named_modules() if path]
    if names is None:
        decoder = skeleton.get_decoder()
        (inside,) = [path for path, module in skeleton.named_modules() if module is decoder] or [""]
        is_inside = f"{inside}." if inside else ""
        head = skeleton.get_output_embeddings()
        return [
            path
            for path, module in skeleton.named_modules()
            if _has_matrix(module) and (module is head or not path.startswith(is_inside))
        ]
    skipped = []
    for name in names:
        found = [path for path in paths if path == name or path.endswith(f".{name}")]
        if not found:
            raise ModelError(
                f"model.quantization_skip names {name!r}, which is no module of this model",
                hint=f"its modules begin with {', '.join(_upper(paths))}",
            )
        skipped += found
    return skipped


def quantization_config(kind: Quantization, skip: Sequence[str], *, dtype: Any) -> Any:
    """What transformers needs to quantize a model while it loads.

    Args:
        kind: how.
        skip: full paths of modules to leave as they are.
        dtype: torch dtype in which nf4 computes.
    """
    import transformers

    bits_and_bytes: Any = transformers.BitsAndBytesConfig  # whose methods have no types
    skip = list(skip)
    match kind:
        case Quantization.quanto_int8 | Quantization.quanto_int4 | Quantization.quanto_float8:
            weights = kind.value.removeprefix("quanto_")
            return transformers.QuantoConfig(weights=weights, modules_to_not_convert=skip)
        case Quantization.bnb_int8:
            return bits_and_bytes(load_in_8bit=True, llm_int8_skip_modules=skip)
        case Quantization.bnb_nf4:
            return bits_and_bytes(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=skip,
            )
    from torchao import quantization as ao

    match kind:
        case Quantization.torchao_int8:
            how: Any = ao.Int8WeightOnlyConfig()
        case Quantization.torchao_int8_dynamic:
            how = ao.Int8DynamicActivationInt8WeightConfig()
        case Quantization.torchao_float8:
            how = ao.Float8WeightOnlyConfig()
    return transformers.TorchAoConfig(how, modules_to_not_convert=skip)


def quantized_bytes(skeleton: Any, kind: Quantization, skip: Sequence[str]) -> int:
    """Memory that the weights of a model will take.

    Args:
        skeleton: the model in the dtypes of what stays as it is.
        skip: full paths of the modules that do.
    """
    below = tuple(f"{path}." for path in skip)
    size_bytes = float(sum(p.numel() * p.element_size() for p in skeleton.parameters()))
    for path, module in skeleton.named_modules():
        if _has_matrix(module) and path not in skip and not path.startswith(below):
            weight = module.weight
            size_bytes += weight.numel() * (_BYTES.get(kind, 1) - weight.element_size())
    return round(size_bytes)


def check_quantized(model: Any, skip: Sequence[str]) -> None:
    """See that what was to be quantized is, and nothing else.

    Args:
        model: as it was loaded.
        skip: full paths of the modules that were to stay as they are.

    Raises:
        ModelError: nothing was quantized, or a module that was to stay as it is.
    """
    quantized = [path for path, module in model.named_modules() if is_quantized(module)]
    if not quantized:
        raise ModelError("model.quantization quantized nothing: no linear layer is left for it")
    below = tuple(f"{path}." for path in skip)
    for path in quantized:
        if path in skip or path.startswith(below):
            raise ModelError(
                f"model.quantization quantized {path}, which it was to leave as it is",
                hint="another model.quantization may heed it",
            )


def is_quantized(module: Any) -> bool:
    """Whether a module is a linear layer with weights in fewer bits."""
    import torch

    weight = getattr(module, "weight", None)
    if weight is None or not _has_matrix(module):
        return False
    # A class of the library's own (bitsandbytes, Quanto), or a tensor of its own (torchao).
    is_own = type(module) is not torch.nn.Linear and "Linear" in type(module).__name__
    return is_own or type(weight.data) not in (torch.Tensor, torch.nn.Parameter)


def refuses_inference_mode(model: Any) -> bool:
    """Whether its weights cannot be used under `torch.inference_mode`: those of Quanto int4."""
    config = getattr(model.config, "quantization_config", None)
    return getattr(config, "weights", None) == "int4"


def _has_matrix(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def _upper(paths: Sequence[str]) -> list[str]:
    return sorted({".".join(path.split(".")[:2]) for path in paths})[:8]

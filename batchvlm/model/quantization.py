"""Weight quantization: the library for each kind, and exactly which modules it quantizes.

The libraries skip modules by name, and ignore a name that matches no module: "vision_tower" skips
nothing if the module is `model.vision_tower`. Here names are resolved against the model before its
weights are loaded, and the result is checked afterwards.
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
"""Prefix of a kind -> the library's module, and the extra that installs it."""


_BYTES = {Quantization.quanto_int4: 0.53, Quantization.bnb_nf4: 0.5625}
"""Bytes per weight, scales included; all other kinds take 1."""


def check_installed(kind: Quantization) -> None:
    """Refuse a quantization whose library is not installed.

    Raises:
        ModelError: names the extra that installs it.
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
    """Return the full paths of the modules that are not quantized.

    Args:
        skeleton: the model, which may be on the meta device.
        names: full paths or their last parts. None skips the output head and all linear layers
            outside the decoder, so that image embeddings and logits keep their precision.

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
    """Return the `quantization_config` argument of `from_pretrained`.

    Args:
        kind: library and format.
        skip: full paths of the modules that are not quantized.
        dtype: torch dtype in which nf4 computes.
    """
    import transformers

    bits_and_bytes: Any = transformers.BitsAndBytesConfig  # its methods are untyped
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
    """Estimate the bytes of a quantized model's weights.

    Args:
        skeleton: the model before quantization, with the dtypes of its unquantized weights.
        skip: full paths of the modules that are not quantized.
    """
    below = tuple(f"{path}." for path in skip)
    size_bytes = float(sum(p.numel() * p.element_size() for p in skeleton.parameters()))
    for path, module in skeleton.named_modules():
        if _has_matrix(module) and path not in skip and not path.startswith(below):
            weight = module.weight
            size_bytes += weight.numel() * (_BYTES.get(kind, 1) - weight.element_size())
    return round(size_bytes)


def check_quantized(model: Any, skip: Sequence[str]) -> None:
    """Check that some module was quantized, and none of those to skip.

    Args:
        model: the loaded model.
        skip: full paths of the modules that must not be quantized.

    Raises:
        ModelError: nothing was quantized, or a module in `skip` was.
    """
    quantized = [path for path, module in model.named_modules() if is_quantized(module)]
    if not quantized:
        raise ModelError("model.quantization quantized nothing: no linear layer is left for it")
    below = tuple(f"{path}." for path in skip)
    for path in quantized:
        if path in skip or path.startswith(below):
            raise ModelError(
                f"model.quantization quantized {path}, which must stay unquantized",
                hint="another model.quantization may respect it",
            )


def is_quantized(module: Any) -> bool:
    """Whether a module is a linear layer with quantized weights."""
    import torch

    weight = getattr(module, "weight", None)
    if weight is None or not _has_matrix(module):
        return False
    # bitsandbytes and Quanto use their own Linear class, torchao its own tensor class.
    is_own = type(module) is not torch.nn.Linear and "Linear" in type(module).__name__
    return is_own or type(weight.data) not in (torch.Tensor, torch.nn.Parameter)


def refuses_inference_mode(model: Any) -> bool:
    """Whether the weights do not work under `torch.inference_mode`, as those of Quanto int4."""
    config = getattr(model.config, "quantization_config", None)
    return getattr(config, "weights", None) == "int4"


def _has_matrix(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def _upper(paths: Sequence[str]) -> list[str]:
    return sorted({".".join(path.split(".")[:2]) for path in paths})[:8]

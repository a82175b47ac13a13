"""PEFT adapters such as LoRA: loaded with the model, and merged into unquantized weights."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from batchvlm.config import ModelConfig
from batchvlm.errors import ModelError
from batchvlm.model.quantization import is_quantized
from batchvlm.words import first_line

log = logging.getLogger(__name__)

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAGNITUDE = ".lora_magnitude_vector"


def pin_adapter(cfg: ModelConfig) -> ModelConfig:
    """Resolve the adapter's revision to a commit; a local folder has none.

    Raises:
        ModelError: the adapter does not exist.
    """
    if cfg.adapter is None:
        return cfg
    if os.path.isdir(cfg.adapter):
        folder = os.path.join(cfg.adapter, cfg.adapter_subfolder or "")
        for names in ((_CONFIG,), _WEIGHTS):
            if not any(os.path.isfile(os.path.join(folder, name)) for name in names):
                raise ModelError(f"model.adapter={cfg.adapter} holds no {names[0]}")
        return cfg
    if os.path.exists(cfg.adapter) or cfg.adapter.startswith((".", "~", os.sep)):
        raise ModelError(f"model.adapter={cfg.adapter}: no such folder")
    from huggingface_hub import hf_hub_download

    with _explained(cfg):
        path = hf_hub_download(
            cfg.adapter, _CONFIG, subfolder=cfg.adapter_subfolder, revision=cfg.adapter_revision
        )
    # The cache keeps .../snapshots/COMMIT/...
    parts = path.split(os.sep)
    return replace(cfg, adapter_revision=parts[parts.index("snapshots") + 1])


def apply_adapter(model: Any, cfg: ModelConfig) -> None:
    """Load the adapter into the model, and merge it into the layers that are not quantized.

    A merged adapter costs no time in decoding; quantization would round a merged one away.

    Raises:
        ModelError: PEFT is not installed, or the adapter is incomplete or for another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"model.adapter={cfg.adapter} needs peft, which is not installed",
            hint="pip install 'batchvlm[peft]'",
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    with _explained(cfg):
        # A weight of another shape is reported and then refused like a missing one.
        found = model.load_adapter(**_read(cfg), ignore_mismatched_sizes=True)
    _check_whole(found, cfg)
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ModelError(f"model.adapter={cfg.adapter} fits no module of model.path={cfg.path}")
    for path, layer in layers:
        if is_quantized(layer.get_base_layer()):
            continue
        layer.merge(safe_merge=True)  # type: ignore[operator,unused-ignore]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())


def _read(cfg: ModelConfig) -> dict[str, Any]:
    """Return an adapter's config and weights as arguments of `load_adapter`."""
    import peft

    assert cfg.adapter is not None
    named = {"revision": cfg.adapter_revision, "subfolder": cfg.adapter_subfolder}
    where: dict[str, Any] = {key: value for key, value in named.items() if value}
    weights = peft.load_peft_weights(cfg.adapter, device="cpu", **where)
    # DoRA's magnitudes: transformers expects another name than the one PEFT saves.
    names = {name: f"{name}.weight" for name in weights if name.endswith(_MAGNITUDE)}
    return {
        "peft_config": peft.PeftConfig.from_pretrained(cfg.adapter, **where),
        "adapter_state_dict": {names.get(name, name): weights[name] for name in weights},
    }


def _check_whole(found: Any, cfg: ModelConfig) -> None:
    """Refuse an adapter that lacks weights, which would be initialized at random.

    Args:
        found: the loading info that `load_adapter` returns.

    Raises:
        ModelError: weights are missing or have another shape.
    """
    misshaped = (name for name, *_ in found.mismatched_keys)
    if missing := sorted({*found.missing_keys, *misshaped}):
        raise ModelError(
            f"model.adapter={cfg.adapter} lacks {len(missing)} weights for model.path={cfg.path}, "
            f"such as {missing[0]}",
            hint="it may be incomplete, or for another model",
        )
    if spare := sorted(found.unexpected_keys):
        log.warning(
            "model.adapter=%s has %d weights that %s does not use, such as %s",
            *(cfg.adapter, len(spare), cfg.path, spare[0]),
        )


@contextlib.contextmanager
def _explained(cfg: ModelConfig) -> Iterator[None]:
    """Turn any exception into a `ModelError` of one line that names the adapter."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"cannot load model.adapter={cfg.adapter}: {first_line(error)}",
            hint="check model.adapter, model.adapter_revision and model.adapter_subfolder",
        ) from error

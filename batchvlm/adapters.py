"""PEFT adapters (LoRA and its kind): loaded with the model, merged into it where that is exact."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Any

from batchvlm.config import ModelConfig
from batchvlm.errors import ModelError

_CONFIG = "adapter_config.json"


def pin_adapter(cfg: ModelConfig) -> ModelConfig:
    """The same adapter by the commit that its branch or tag points to now; a folder as it is.

    Raises:
        ModelError: there is no such adapter.
    """
    if cfg.adapter is None:
        return cfg
    if os.path.isdir(cfg.adapter):
        if not os.path.isfile(os.path.join(cfg.adapter, cfg.adapter_subfolder or "", _CONFIG)):
            raise ModelError(f"model.adapter={cfg.adapter} holds no {_CONFIG}")
        return cfg
    if os.path.exists(cfg.adapter) or cfg.adapter.startswith((".", "~", os.sep)):
        raise ModelError(f"model.adapter={cfg.adapter}: no such folder")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            cfg.adapter, _CONFIG, subfolder=cfg.adapter_subfolder, revision=cfg.adapter_revision
        )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"cannot load model.adapter={cfg.adapter}: {reason[:300]}",
            hint="check model.adapter, model.adapter_revision and model.adapter_subfolder",
        ) from error
    # The cache keeps .../snapshots/COMMIT/...
    parts = path.split(os.sep)
    return replace(cfg, adapter_revision=parts[parts.index("snapshots") + 1])


def apply_adapter(model: Any, cfg: ModelConfig) -> None:
    """Load the adapter into the model; into weights that are not quantized it is merged.

    Merged, it costs nothing at any token; into few bits it would be rounded away.

    Raises:
        ModelError: PEFT is not installed, or the adapter is another model's.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            f"model.adapter={cfg.adapter} needs peft, which is not installed",
            hint="pip install 'batchvlm[peft]'",
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    where = {"revision": cfg.adapter_revision, "subfolder": cfg.adapter_subfolder}
    model.load_adapter(
        cfg.adapter, adapter_kwargs={key: value for key, value in where.items() if value}
    )
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    if not layers:
        raise ModelError(f"model.adapter={cfg.adapter} fits no module of model.path={cfg.path}")
    if cfg.quantization is not None:
        return
    for path, layer in layers:
        layer.merge(safe_merge=True)  # type: ignore[operator,unused-ignore]
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.get_base_layer())
    model._hf_peft_config_loaded = False

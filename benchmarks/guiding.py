"""An engine that holds answers to their forms, for the benchmarks of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from batchvlm import demo
from batchvlm.config import BatchingConfig, EngineConfig, ModelConfig
from batchvlm.constraints.constraints import Constraints
from batchvlm.engine.forward.replacements import tune
from batchvlm.engine.generate import eos_ids
from batchvlm.engine.slots.engine import SlotEngine
from batchvlm.model.loading import load_model, load_processor
from batchvlm.records import Form


def load(folder: Path | None, *, dtype: str, device: str = "cpu") -> tuple[Any, Any, str]:
    """A tuned model, its tokenizer and its name; without a folder the demo's."""
    cfg = ModelConfig(path=str(folder or demo.MODEL_DIR), dtype=dtype)
    model = load_model(cfg, device=device)
    tune(model)
    return model, load_processor(cfg).tokenizer, folder.name if folder else "the demo's model"


def open_engine(model: Any, tokenizer: Any, *, form: Form | None, num_slots: int) -> SlotEngine:
    """The engine over so many slots; without a form each row has its own."""
    ends = eos_ids(model, tokenizer)
    device: torch.device = model.device
    constraints = Constraints(
        tokenizer,
        num_ids=model.get_output_embeddings().weight.shape[0],
        eos_ids=ends,
        device=device,
        form=form,
    )
    cfg = EngineConfig(canary=False, max_slots=num_slots)
    return SlotEngine(
        model, tokenizer, BatchingConfig(), cfg, eos_ids=ends, constraints=constraints
    )

"""Samples -> completions. Knows models and devices; knows no file, no dataset and no task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchvlm.config import EngineName, JobConfig
from batchvlm.engine.protocol import Engine, SampleStream

if TYPE_CHECKING:
    from batchvlm.engine.parallel import ToFollowers

__all__ = ["Engine", "SampleStream", "open_engine"]


def open_engine(cfg: JobConfig, *, device: str, followers: ToFollowers | None = None) -> Engine:
    """Load the model and choose the engine that it allows.

    Args:
        followers: the processes that hold the other parts of the model (`model.tp_plan`).

    Raises:
        ModelError: the model cannot be loaded, or the engine that was asked for cannot run it.
        EndpointError: the server that is to answer is not there.
    """
    if cfg.engine.name is EngineName.endpoint:
        from batchvlm.engine.endpoint import EndpointEngine

        return EndpointEngine.open(cfg)
    # torch takes seconds to import, and a job is checked without it.
    from batchvlm.engine.select import select_engine

    return select_engine(cfg, device=device, followers=followers)

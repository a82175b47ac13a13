"""Samples -> completions. Depends on models and devices, not on files, datasets or tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchvlm.config import EngineName, JobConfig
from batchvlm.engine.protocol import Engine, SampleStream

if TYPE_CHECKING:
    from batchvlm.engine.parallel import ToFollowers

__all__ = ["Engine", "SampleStream", "open_engine"]


def open_engine(cfg: JobConfig, *, device: str, followers: ToFollowers | None = None) -> Engine:
    """Load the model and open the engine that fits it and the settings.

    Args:
        followers: the processes that hold the other parts of the model (`model.tp_plan`).

    Raises:
        ModelError: the model cannot be loaded, or the requested engine cannot run it.
        EndpointError: the server cannot be reached.
    """
    if cfg.engine.name is EngineName.endpoint:
        from batchvlm.engine.endpoint import EndpointEngine

        return EndpointEngine.open(cfg)
    # torch takes seconds to import, and checking a job does not need it.
    from batchvlm.engine.select import select_engine

    return select_engine(cfg, device=device, followers=followers)

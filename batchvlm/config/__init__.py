"""Every setting, its type, its default and what it means.

Hydra composes `conf/` over these classes, so a mistyped key or a wrong type is rejected before
anything is loaded. `checks.py` checks what types cannot express: ranges and combinations.
Each setting is documented once, in the docstring under its field.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from batchvlm.config.choices import (
    EngineName,
    Guided,
    ImageBackend,
    ImageFormat,
    Instructions,
    OnMismatch,
    Quantization,
    ResponseFormat,
    SourceKind,
    TaskName,
)
from batchvlm.config.engine import (
    BatchingConfig,
    EndpointConfig,
    EngineConfig,
    ModelConfig,
    sent_as,
)
from batchvlm.config.run import (
    OutputConfig,
    RetryConfig,
    RuntimeConfig,
    TrackingConfig,
)
from batchvlm.config.task import (
    GENERATION_LIMITS,
    ColumnsConfig,
    DataConfig,
    GenerationColumnsConfig,
    GenerationConfig,
    TaskConfig,
    TaskOutputConfig,
)

__all__ = [
    "GENERATION_LIMITS",
    "BatchingConfig",
    "ColumnsConfig",
    "DataConfig",
    "EndpointConfig",
    "EngineConfig",
    "EngineName",
    "GenerationColumnsConfig",
    "GenerationConfig",
    "Guided",
    "ImageBackend",
    "ImageFormat",
    "Instructions",
    "JobConfig",
    "ModelConfig",
    "OnMismatch",
    "OutputConfig",
    "Quantization",
    "ResponseFormat",
    "RetryConfig",
    "RuntimeConfig",
    "SourceKind",
    "TaskConfig",
    "TaskName",
    "TaskOutputConfig",
    "TrackingConfig",
    "sent_as",
]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A whole job."""

    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

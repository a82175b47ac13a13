"""What answers, and how much of it at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from batchvlm.config.choices import (
    EngineName,
    ImageBackend,
    ImageFormat,
    Quantization,
    ResponseFormat,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model answers (`model=demo|hub`, or a preset such as `qwen2_5_vl`)."""

    path: str = MISSING
    """Hub name or local folder."""
    name: str | None = None
    """The model's name in the output; null: `path`, or the last part of a folder's."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: Any = "auto"
    """`auto` (as saved), `float32`, `bfloat16` or `float16`; or one for each part, by the names of
    the model's sub-configs: `{vision_config: float32, text_config: bfloat16, rest: auto}`, where
    `rest` is what is not named. Such a model runs by `generate()`."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; null: transformers' choice. With any but `sdpa`,
    `engine=auto` takes `generate()`."""
    device_map: Any = None
    """For a model larger than one GPU: `auto`, `balanced`, `sequential`, or a mapping of modules to
    devices, as accelerate takes it. One process holds the model, and runs it by `generate()`."""
    tp_plan: str | None = None
    """For a model larger than one GPU: `auto` divides every layer among the processes of a launch,
    one a GPU, which then work at the same time (tensor parallelism). Runs by `generate()`."""
    gpus_per_replica: int | None = None
    """In a launch of several processes. device_map: GPUs over which each spreads its model; null:
    its share of the machine's. tp_plan: processes, one a GPU, that hold one model together; null:
    all of a machine."""
    quantization: Quantization | None = None
    """`quanto_int8|int4|float8`, `bnb_int8|nf4`, `torchao_int8|int8_dynamic|float8`; the extras
    `quanto`, `bitsandbytes` and `torchao` bring the libraries."""
    quantization_skip: list[str] | None = None
    """Modules to leave as they are, by full path or its last part; null: all but the language
    model's layers."""
    adapter: str | None = None
    """A PEFT adapter (LoRA) for the model: hub name or local folder; the extra `peft`."""
    adapter_revision: str | None = None
    """Its commit, tag or branch on the hub."""
    adapter_subfolder: str | None = None
    """The folder within its repository."""
    image_backend: ImageBackend = ImageBackend.auto
    """`auto`: torchvision where it works, else pil. Answers can depend on it."""
    max_image_pixels: int = 2_408_448
    """A larger image is shrunk to this many pixels before the processor sees it (1568 x 1536)."""
    max_prompt_tokens: int | None = None
    """Longest prompt, image tokens included; null: what the model's positions leave."""
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the processor when it is loaded, such as `min_pixels`, or the text of a
    `chat_template`: of a repository without one, a prompt is its text alone."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model's repository, with all your rights."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """The OpenAI-compatible server that answers where `engine=endpoint`."""

    url: str | None = None
    """Its address, such as `http://node7:8000/v1`; without a path, `/v1` is added."""
    model: str | None = None
    """The model's name there; null: `model.path`."""
    token_env: str = "BATCHVLM_ENDPOINT_TOKEN"
    """The environment variable that holds the token, where the server wants one. A token is no
    setting: settings are written into the output folder."""
    max_concurrency: int = 32
    """Requests under way at once."""
    timeout_s: float = 600.0
    """One request may take this long, in seconds."""
    max_attempts: int = 4
    """A row on which a server that answers others fails so often is an error row."""
    patience_s: float = 900.0
    """A server that answers nothing for so long, in seconds, ends the run with exit code 75."""
    image_format: ImageFormat = ImageFormat.png
    """`png`: the pixels that a local run would see; `jpeg` (quality 95): a fifth of the bytes, and
    a fifteenth of the workers' time."""
    response_format: ResponseFormat = ResponseFormat.json_schema
    """How the form of answers is sent. `json_schema`: as OpenAI has it, for schemas alone; `tgi`:
    TGI's `response_format`, which takes schemas, choices and patterns; `vllm`: vLLM's
    `structured_outputs`, which takes grammars too; `vllm_guided`: the same as `guided_*`, before
    vLLM 0.12; `none`: not at all, answers are only validated. A form that it has no word for is
    refused."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Sent along with every request, for what only this server has: `top_k`, `min_p`,
    `chat_template_kwargs`, ..."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs the model (`engine=auto|slots|generate|endpoint`)."""

    name: EngineName = EngineName.auto
    """`slots`: continuous batching of our own; `generate`: transformers' `generate()`; `auto`:
    slots for the families that allow it; `endpoint`: a server."""
    device: str = "auto"
    """`auto` (this rank's GPU where there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    memory_fraction: float = 0.9
    """slots: share of the memory that is free beside the weights which may be used. From 0.01 to
    1."""
    max_slots: int | None = None
    """slots: rows decoded at once; null: as memory allows, 64 at most on a CPU, 512 on a GPU."""
    max_prefill_tokens: int | None = None
    """slots: prompt tokens in one forward; null: 1,024 on a CPU, 16,384 on a GPU."""
    cpu_streams: int | None = None
    """slots: forwards of prompts, of images and of parts of a step that go on at once on a CPU,
    each with its share of the threads; null: one for each thread, 8 at most, and 1 for models that
    keep state (quantized ones, rotary positions that change with length); 1: never two."""
    share_images: bool = True
    """slots: rows of a window that show the same image share its encoding, and the computing of
    the beginning that their prompts have in common."""
    compile: bool | None = None
    """slots: fuse the small kernels of a model's layers by torch.compile, which takes up to a
    minute; null: on a GPU in half precision, once the engine has worked for a minute; false leaves
    out triton's kernel for decoding there too, which is tried at the start."""
    cuda_graphs: bool = True
    """slots: on a GPU, play the kernels of a decode step back as one; off only to measure."""
    canary: bool = True
    """slots: before the first row, compare two rows with the model's own forward."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def sent_as(engine: EngineConfig) -> ImageFormat | None:
    """How images are sent to a server; None where the model runs here."""
    return engine.endpoint.image_format if engine.name is EngineName.endpoint else None


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How samples become batches. Changes speed and memory, never an answer's meaning."""

    max_batch_tokens: int = 16_384
    """engine=generate: rows times (longest prompt + longest possible answer) in a batch; a longer
    row goes alone."""
    max_batch_size: int = 64
    """engine=generate: rows in a batch at most."""
    sort_window: int = 512
    """Samples gathered and sorted by length before the engine takes them up."""
    max_window_bytes: int = 1 << 30
    """A window also ends when its samples hold this many bytes."""

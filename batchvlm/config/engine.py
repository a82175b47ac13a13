"""The model, the engine and batching."""

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
    """The model that answers (`model=demo|hub`, or a preset such as `qwen2_5_vl`)."""

    path: str = MISSING
    """Name on the Hugging Face Hub, or a local folder."""
    name: str | None = None
    """Name of the model in the output; null: `path`, or the last component if it is a folder."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    dtype: Any = "auto"
    """`auto` (as saved), `float32`, `bfloat16` or `float16`. A mapping sets the dtype of each part,
    by the names of the model's sub-configs: `{vision_config: float32, text_config: bfloat16, rest:
    auto}`, where `rest` is all other parts. With a mapping, the model runs with `generate()`."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; null: the default of transformers. With a value
    other than `sdpa`, `engine=auto` uses `generate()`."""
    device_map: Any = None
    """For a model larger than one GPU: `auto`, `balanced`, `balanced_low_0`, `sequential`, or a
    mapping of modules to devices, as in accelerate. One process holds the model and runs it with
    `generate()`."""
    tp_plan: str | None = None
    """For a model larger than one GPU: `auto` splits every layer over the processes of a launch,
    one process a GPU (tensor parallelism). Runs with `generate()`."""
    gpus_per_replica: int | None = None
    """In a launch of several processes. With device_map: GPUs over which each process spreads its
    model; null: an equal share of the machine's GPUs. With tp_plan: processes, one a GPU, that hold
    one model together; null: all of a machine."""
    quantization: Quantization | None = None
    """Quantization of the weights: `quanto_int8|int4|float8`, `bnb_int8|nf4`,
    `torchao_int8|int8_dynamic|float8`. Install the extra `quanto`, `bitsandbytes` or `torchao`."""
    quantization_skip: list[str] | None = None
    """Modules not to quantize, by full path or its last component; null: all except the language
    model's layers."""
    adapter: str | None = None
    """A PEFT adapter (LoRA) for the model: name on the Hub or local folder. Install the extra
    `peft`."""
    adapter_revision: str | None = None
    """Commit, tag or branch of the adapter on the Hub."""
    adapter_subfolder: str | None = None
    """Folder of the adapter within its repository."""
    image_backend: ImageBackend = ImageBackend.auto
    """`auto`: torchvision if it is installed and imports, else pil. Answers can depend on it."""
    max_image_pixels: int = 2_408_448
    """A larger image is downscaled to this many pixels before preprocessing. The default is 1568 x
    1536."""
    max_prompt_tokens: int | None = None
    """Maximum length of a prompt, including image tokens; null: what fits into the model's
    context."""
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for loading the processor, such as `min_pixels`, or `chat_template`: its text. If a
    repository has no template, a prompt is its text and image tokens."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the model's chat template, such as `enable_thinking: false` for a model that
    otherwise reasons before it answers. One that the template does not name is rejected."""
    prompt_tokens: list[str] = field(default_factory=list)
    """Special tokens that the text of prompts may spell, such as `<|grounding|>` for DeepSeek-OCR.
    All others stay text. One that the tokenizer does not have is rejected, as are image tokens."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository, with all permissions of your user."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """The OpenAI-compatible server that answers with `engine=endpoint`."""

    url: str | None = None
    """URL of the server, such as `http://node7:8000/v1`. Without a path, `/v1` is added."""
    model: str | None = None
    """Name of the model on the server; null: `model.path`."""
    token_env: str = "BATCHVLM_ENDPOINT_TOKEN"
    """Environment variable with the token, if the server needs one. Settings are written into the
    output folder, so the token is not one."""
    max_concurrency: int = 32
    """Maximum number of concurrent requests."""
    timeout_s: float = 600.0
    """Timeout of one request, in seconds."""
    max_attempts: int = 4
    """A row becomes an error after this many failed requests while the server answers other
    rows."""
    patience_s: float = 900.0
    """If the server answers nothing for this many seconds, the run ends with exit code 75."""
    image_format: ImageFormat = ImageFormat.png
    """`png`: the same pixels as in a local run. `jpeg` (quality 95): a fifth of the bytes and a
    fifteenth of the workers' time."""
    response_format: ResponseFormat = ResponseFormat.json_schema
    """How the form of answers is sent. `json_schema`: OpenAI's `response_format`, for schemas only.
    `tgi`: TGI's `response_format`, for schemas, choices and patterns. `vllm`: vLLM's
    `structured_outputs`, also for grammars. `vllm_guided`: the same forms in vLLM's older
    fields `guided_*`, before 0.12. `none`: not sent, answers are only validated. A form that the
    field cannot express is rejected."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Extra fields of every request, for options of this server: `top_k`, `min_p`,
    `chat_template_kwargs`, ..."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The engine that runs the model (`engine=auto|slots|generate|endpoint`)."""

    name: EngineName = EngineName.auto
    """`slots`: batchvlm's continuous batching. `generate`: transformers' `generate()`. `auto`:
    slots for the model families that support it, else `generate`. `endpoint`: a server."""
    device: str = "auto"
    """`auto` (the GPU of this rank, if there is one), `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`."""
    memory_fraction: float = 0.9
    """slots: share of the memory left beside the weights that may be used; 60% of it is for keys
    and values. From 0.01 to 1."""
    max_slots: int | None = None
    """slots: maximum number of rows decoded at once; null: 64 on a CPU, 512 on a GPU. Memory may
    allow fewer."""
    max_prefill_tokens: int | None = None
    """slots: maximum number of prompt tokens in one forward; null: 1,024 on a CPU, 16,384 on a
    GPU."""
    cpu_streams: int | None = None
    """slots: number of concurrent forwards (of prompts, images and parts of a step) on a CPU; the
    threads are divided among them. null: one for each thread, at most 8; 1 with `engine.compile`
    and for models that keep state (quantized, or rotary positions that change with length)."""
    share_images: bool = True
    """slots: rows of a window with the same image share its encoding and the prefill of the prefix
    that their prompts have in common."""
    compile: bool | None = None
    """slots: fuse small kernels of the model's layers with torch.compile, which takes up to a
    minute. null: on a GPU in half precision, after the engine has worked for a minute. false also
    disables the Triton kernel for decoding, which is otherwise tried at the start."""
    cuda_graphs: bool = True
    """slots: on a GPU, replay decode steps as CUDA graphs. Disable it only for measurements."""
    canary: bool = True
    """slots: before the first answer, compare two rows with the model's own forward."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def sent_as(engine: EngineConfig) -> ImageFormat | None:
    """How images are sent to a server; None where the model runs here."""
    return engine.endpoint.image_format if engine.name is EngineName.endpoint else None


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How samples are batched. Changes speed and memory, not the meaning of answers."""

    max_batch_tokens: int = 16_384
    """engine=generate: maximum of rows times (longest prompt + longest possible answer) in a batch.
    A longer row is a batch by itself."""
    max_batch_size: int = 64
    """engine=generate: maximum number of rows in a batch."""
    sort_window: int = 512
    """Samples sorted by length together. slots: a window begins with those that are ready, and
    later ones join it until it has this many."""
    max_window_bytes: int = 1 << 30
    """A window also ends when its samples reach this many bytes."""

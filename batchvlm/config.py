"""Every setting, its type, its default and what it means.

Hydra composes `conf/` over these classes, so a mistyped key or a wrong type is refused before
anything is loaded. What a type cannot say (ranges, combinations) is checked in `settings.py`.
A setting is documented once: in the docstring under its field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING


class SourceKind(StrEnum):
    """Where records come from."""

    parquet = "parquet"
    hf = "hf"
    folder = "folder"
    jsonl = "jsonl"
    openai = "openai"
    webdataset = "webdataset"


class TaskName(StrEnum):
    """What is made of an answer."""

    caption = "caption"
    vqa = "vqa"
    extract = "extract"
    dialog = "dialog"


class EngineName(StrEnum):
    """What turns batches into completions."""

    auto = "auto"
    slots = "slots"
    generate = "generate"
    endpoint = "endpoint"


class Quantization(StrEnum):
    """How weights are made smaller, by which library."""

    quanto_int8 = "quanto_int8"
    quanto_int4 = "quanto_int4"
    quanto_float8 = "quanto_float8"
    bnb_int8 = "bnb_int8"
    bnb_nf4 = "bnb_nf4"
    torchao_int8 = "torchao_int8"
    torchao_int8_dynamic = "torchao_int8_dynamic"
    torchao_float8 = "torchao_float8"


class ImageFormat(StrEnum):
    """How an image travels to a server."""

    png = "png"
    jpeg = "jpeg"


class ResponseFormat(StrEnum):
    """How a server is told the JSON schema of an answer."""

    json_schema = "json_schema"
    tgi = "tgi"
    none = "none"


class OnMismatch(StrEnum):
    """What happens where the output folder holds the answers to another question."""

    error = "error"
    new_folder = "new_folder"
    overwrite = "overwrite"


class Guided(StrEnum):
    """How far answers are held to the form that is asked for while they are decoded."""

    auto = "auto"
    strict = "strict"
    off = "off"


class Instructions(StrEnum):
    """Whether the prompt says which form the answer must have."""

    auto = "auto"
    off = "off"


class ImageBackend(StrEnum):
    """Which library resizes and normalises images in the model's processor."""

    auto = "auto"
    pil = "pil"
    torchvision = "torchvision"


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Which columns of the input hold what."""

    id: str | None = None
    """Column with the row's own key; null: `source_file:row`."""
    image: Any = None
    """Column with the image or a list of images, or a list of such columns; null: no column holds
    images. With `task.prompt` each must hold one at least; messages say how many they show."""
    messages: str | None = None
    """Column with chat messages; replaces `task.prompt`."""
    turns: str | None = None
    """task=dialog: column with a list of what the user says, turn after turn: each a text, a list
    of parts, or a message; a system message may come first."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the rows come from (`data=parquet|hf|folder|jsonl|openai|webdataset|demo`)."""

    name: str = "data"
    """Word for this input in the default output folder."""
    source: SourceKind = MISSING
    path: str = MISSING
    """Parquet, jsonl, openai, webdataset: a file, folder, glob or fsspec URL. hf: a hub name, a
    folder of data files or a `save_to_disk` folder. folder: a folder of images."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    subset: str | None = None
    """hf: the dataset's configuration name."""
    split: str = "train"
    """hf: the split, or a slice of one such as `train[:100]`."""
    revision: str | None = None
    """hf: commit, tag or branch of the dataset repository."""
    streaming: bool = False
    """hf: read without downloading the whole dataset first."""
    image_root: str | None = None
    """The only folder that image paths in rows may point into; null: the input's own folder."""
    allow_remote: bool = False
    """Fetch images whose address is on the public web (http, https), or allowed by name."""
    allow_hosts: list[str] = field(default_factory=list)
    """allow_remote: hosts that may have private addresses (`images.intra`, `10.0.0.5`), and places
    of object stores or other file systems of fsspec (`s3://bucket/folder`, `hf://datasets/a/b`),
    read with this machine's credentials."""
    fetch_timeout_s: float = 20.0
    """allow_remote: seconds for one attempt at an image."""
    fetch_attempts: int = 4
    """allow_remote: attempts at an image while its server is unreachable, slow or overloaded."""
    fetch_concurrency: int = 64
    """allow_remote: images fetched at the same time; at most half of them from one host."""
    max_rows: int | None = None
    """Take only the first rows of the input; null: all."""
    max_image_bytes: int = 1 << 28
    """An image of more bytes is refused; its file is not read further than that."""
    max_source_pixels: int = 178_956_970
    """An image whose header claims more pixels is refused undecoded (Pillow's own limit). Decoding
    takes up to 28 bytes of memory a pixel, by format."""


@dataclass(frozen=True, kw_only=True)
class TaskOutputConfig:
    """The form an answer must have: one of the first six, or the row's own."""

    json_schema: Any = None
    """A JSON schema: path of a file, the schema itself, or `any` for any object. A `$ref` may lead
    to files beside it."""
    pydantic: str | None = None
    """`module:Class`: a Pydantic model, dataclass or typed dict; its module runs as code."""
    choice: list[str] | None = None
    """The answers to choose from."""
    regex: str | None = None
    """A pattern that the whole answer must match."""
    grammar: str | None = None
    """A context-free grammar in Lark's notation, or the path of a file with one."""
    type: str | None = None
    """A named type: `integer`, `number`, `boolean`, `date`, `time`, `datetime`, `email`, `uuid4`,
    `ipv4`, `hex_color`, ..., as in `outlines.types`."""
    json_schema_column: str | None = None
    """Column with each row's own JSON schema; a null there falls back to the above. With other
    tasks than extract, an answer to a row that brings one is read as JSON, any other as text."""
    choice_column: str | None = None
    """Column with each row's own choices, a list of strings; a null there falls back likewise."""
    guided: Guided = Guided.auto
    """`auto`: tokens that lead out of the form are never chosen, as far as a grammar can say what
    is asked for, and `constraint` tells how far that was; `strict`: a form that cannot be enforced
    to the letter is refused; `off`: answers are only validated."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked and what is made of the answer (`task=caption|vqa|extract|dialog`)."""

    name: TaskName = MISSING
    prompt: str = MISSING
    """Jinja2 template over the row's columns; an unknown name is refused, a null is a row error."""
    system: str | None = None
    """System prompt, a template like `prompt`."""
    markdown_images: bool = False
    """Take `![](X)` in a prompt or a user's message for an image, as TGI does: X is an address, a
    path or a `data:` URI, allowed or not as in any other place."""
    output: TaskOutputConfig = field(default_factory=TaskOutputConfig)
    instructions: Instructions = Instructions.off
    """`auto`: where a JSON schema is asked for, the prompt ends with it, in a compact form; models
    answer better when they see it. Messages of the rows' own stay as they are."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model answers (`model=demo|hub`, or a preset such as `qwen2_5_vl`)."""

    path: str = MISSING
    """Hub name or local folder."""
    name: str | None = None
    """The model's name in the output; null: `path`, or the last part of a folder's."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    dtype: str = "auto"
    """`auto` (as saved), `float32`, `bfloat16` or `float16`."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; null: transformers' choice. With any but `sdpa`,
    `engine=auto` takes `generate()`."""
    device_map: Any = None
    """For a model larger than one GPU: `auto`, `balanced`, `sequential`, or a mapping of modules to
    devices, as accelerate takes it. Runs by `generate()`, in a launch of one process."""
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
    """Passed to the processor when it is loaded, such as `min_pixels`."""
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
    """How an extract task's schema is sent: `json_schema` as OpenAI has it, `tgi` as older TGI
    wants it, `none` for a server that refuses both."""
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
    """slots: share of the memory that is free beside the weights which may be used."""
    max_slots: int | None = None
    """slots: rows decoded at once; null: as memory allows, 64 at most on a CPU, 256 on a GPU."""
    max_prefill_tokens: int | None = None
    """slots: prompt tokens in one forward; null: 1,024 on a CPU, 16,384 on a GPU."""
    share_images: bool = True
    """slots: rows of a window that show the same image share its encoding, and the computing of
    the beginning that their prompts have in common."""
    compile: bool | None = None
    """slots: fuse the small kernels of a model's layers by torch.compile, which takes up to a
    minute; null: on a GPU in half precision, once the engine has worked for a minute."""
    cuda_graphs: bool = True
    """slots: on a GPU, play the kernels of a decode step back as one; off only to measure."""
    canary: bool = True
    """slots: before the first row, compare two rows with the model's own forward."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def sent_as(engine: EngineConfig) -> ImageFormat | None:
    """How images are sent to a server; None where the model runs here."""
    return engine.endpoint.image_format if engine.name is EngineName.endpoint else None


@dataclass(frozen=True, kw_only=True)
class GenerationColumnsConfig:
    """Columns that override a generation setting row by row; a null keeps the run's setting."""

    max_new_tokens: str | None = None
    min_new_tokens: str | None = None
    temperature: str | None = None
    top_k: str | None = None
    top_p: str | None = None
    min_p: str | None = None
    repetition_penalty: str | None = None
    frequency_penalty: str | None = None
    presence_penalty: str | None = None
    seed: str | None = None
    stop: str | None = None
    ignore_eos: str | None = None
    stop_on_repetition: str | None = None
    logprobs: str | None = None
    """Naming it adds the column `logprobs`, null in rows that do not ask."""
    num_return_sequences: str | None = None
    """Naming it adds the columns of several answers."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is decoded."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    """No end of sequence and no stop string before this many tokens."""
    temperature: float = 0.0
    """0 is greedy; above, tokens are drawn."""
    top_k: int = 0
    """Draw among the k likeliest; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest that together reach this probability."""
    min_p: float = 0.0
    """Draw among those at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already in the prompt or answer become less likely."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that the answer has it already."""
    presence_penalty: float = 0.0
    """Taken off a token's logit once the answer has it."""
    seed: int = 0
    """Each row draws from a generator of its own, seeded by this and the row's position."""
    stop: list[str] = field(default_factory=list)
    """Strings that end an answer; they are cut off it."""
    ignore_eos: bool = False
    """Go on to `max_new_tokens` whatever the model says; for benchmarks."""
    stop_on_repetition: bool = True
    """End an answer that does nothing but repeat itself: its last 512 tokens, and at least 16
    rounds, are one cycle of up to 64 tokens. Never where `ignore_eos` is set."""
    logprobs: bool = False
    """Add the column `logprobs`: the log-probability of each token of the answer, as the model
    gave it (temperature 1, no cuts, no penalty)."""
    num_return_sequences: int = 1
    """Answers to each row. Above 1, the columns `generated_texts` and `finish_reasons` hold them
    all and `completion_tokens` counts them all; else columns speak of the first, which is the same
    as with 1."""
    columns: GenerationColumnsConfig = field(default_factory=GenerationColumnsConfig)


GENERATION_LIMITS: Mapping[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1 << 20),
    "min_new_tokens": (0, 1 << 20),
    "temperature": (0, 100),
    "top_k": (0, 1 << 31),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (0, (1 << 63) - 1),
    "num_return_sequences": (1, 1024),
}
"""Lowest and highest value of each number above, for the run and for a row's own column alike."""


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


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where and how results are written."""

    dir: str = "outputs/${data.name}-${task.name}"
    """Folder of the output; run the same command again to finish an interrupted job."""
    rows_per_shard: int = 4096
    """Most rows of one part; fixed once an output folder exists."""
    flush_every_s: float = 30.0
    """Finished rows of an unfinished shard reach the disk at least this often, in seconds."""
    flush_every_rows: int | None = None
    """... and whenever this many rows of one shard are waiting; null: by the clock alone."""
    on_mismatch: OnMismatch = OnMismatch.error
    """Where `dir` holds the answers to another question: `error` refuses, `new_folder` writes to
    `dir-FINGERPRINT` beside it, `overwrite` gives up the old answers once the model has loaded."""
    keep_columns: list[str] = field(default_factory=list)
    """Input columns copied to the output unchanged."""
    token_ids: bool = False
    """Add the column `token_ids` with each answer's token ids."""


@dataclass(frozen=True, kw_only=True)
class RetryConfig:
    """Which rows with an error are computed again (`retry=none|transient`)."""

    errors: list[str] = field(default_factory=list)
    """Error types; their rows in finished parts and segments are answered anew and superseded."""
    invalid_json: int = 0
    """Times that a row whose answer has not the form asked for is answered again in the same run:
    with twice the tokens where it was cut, else with another seed and a temperature of 0.5 at
    least. Their images are kept meanwhile, `batching.max_window_bytes` of them at most."""
    max_attempts: int = 3
    """A row that was tried this often is left as it is."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the work is spread. Changes speed, never an answer."""

    num_tasks: int = 1
    """Slices of the whole job, such as SLURM array elements."""
    task_id: int = 0
    """Which slice this process computes: shards with `index % num_tasks == task_id`."""
    num_workers: int | None = None
    """Processes that prepare samples; 0: in this process; null: by the number of cores."""
    num_threads: int | None = None
    """Compute threads of the engine on a CPU; null: torch's choice."""
    sample_timeout_s: float = 60.0
    """Preparing one row may take this long, in seconds; needs `num_workers` above 0."""
    log_every_s: float = 10.0
    """Seconds between progress lines where stderr is no terminal."""
    log_json: bool = False
    """Write each log line as a JSON object, progress with its numbers; no bar is drawn."""
    max_error_rate: float | None = None
    """A share of failed rows above this ends the run, exit code 3; null: never."""
    max_error_rate_after: int = 100
    """Rows that must be done or with the engine before `max_error_rate` is looked at."""
    stall_timeout_s: float | None = 1800.0
    """Without a finished row for so long, in seconds, the run prints where every thread is, brings
    finished rows to disk and exits with 75; null: wait forever."""
    grace_s: float = 30.0
    """From a signal to the exit, in seconds, whatever the model is doing then."""
    walltime_margin_s: float = 90.0
    """With less of the SLURM job's time left, in seconds, or less than a quarter of it, no further
    row is begun; the run ends with 75 when those at the engine are answered. 0: never by itself."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the counts of a running job also go. Each process is a run of its own there."""

    trackers: list[str] = field(default_factory=list)
    """`tensorboard`, `wandb`: through accelerate's trackers; each needs its package."""
    project: str = "batchvlm"
    """wandb: the project."""
    dir: str | None = None
    """Folder for what trackers write; null: `_batchvlm/tracking` in the output folder."""
    prometheus_file: str | None = None
    """File in the Prometheus text format, for node_exporter's textfile collector (`*.prom`). Of a
    job of several processes, each adds its task and rank to the name."""
    every_s: float = 10.0
    """Seconds between two sets of counts."""


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

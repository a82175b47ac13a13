"""The input, the task and how answers are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from batchvlm.config.choices import Guided, Instructions, SourceKind, TaskName


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Columns of the input."""

    id: str | None = None
    """Column with the key of each row; null: `source_file:row`."""
    image: Any = None
    """Column with an image or a list of images, or a list of such columns; null: no column has
    images. With `task.prompt`, every row needs at least one image in each column; with messages, as
    many as they show."""
    image_optional: bool = False
    """With `task.prompt`: a null, empty text or empty list in an image column is no image, and not
    an error. The row is answered from its other images, or from its text alone."""
    messages: str | None = None
    """Column with chat messages, used instead of `task.prompt`: with `role` and `content`, or with
    `from` and `value`, as LLaVA and ShareGPT have them."""
    turns: str | None = None
    """task=dialog: column with a list of user turns. Each turn is a text, a list of parts, or a
    message; the first may be a system message. Answers among them are left out."""
    chat_template_kwargs: str | None = None
    """Column with each row's variables of the chat template, such as `{"enable_thinking": false}`,
    as an object or JSON text. They override those of `model.chat_template_kwargs`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The input (`data=parquet|hf|folder|jsonl|openai|webdataset|demo`)."""

    name: str = "data"
    """Name of this input in the default output folder."""
    source: SourceKind = MISSING
    path: str = MISSING
    """parquet, jsonl, openai, webdataset: a file, folder, glob or fsspec URL. hf: a dataset on the
    Hub, a data file (CSV, JSON, Arrow, ...), a folder of these, or a `save_to_disk` folder. folder:
    a folder of images. parquet: subfolders named `key=value` become columns."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    subset: str | None = None
    """hf: configuration name of the dataset."""
    split: str = "train"
    """hf: split, or a slice of one such as `train[:100]`."""
    revision: str | None = None
    """hf: commit, tag or branch of the dataset repository."""
    streaming: bool = False
    """hf: read the dataset without downloading all of it first."""
    image_root: str | None = None
    """The only folder that image paths in rows may point into; null: the folder of the input."""
    allow_remote: bool = False
    """Fetch images by URL from the public web (http, https) and from `allow_hosts`. Both settings
    and `image_root` are part of the fingerprint."""
    allow_hosts: list[str] = field(default_factory=list)
    """allow_remote: hosts that may have private addresses (`images.intra`, `10.0.0.5`), and
    locations in object stores or other fsspec file systems (`s3://bucket/folder`,
    `hf://datasets/a/b`), which are read with the credentials of this machine."""
    fetch_timeout_s: float = 20.0
    """allow_remote: timeout of one attempt to fetch an image, in seconds."""
    fetch_attempts: int = 4
    """allow_remote: attempts per image if its server is unreachable, slow or overloaded."""
    fetch_concurrency: int = 64
    """allow_remote: maximum number of concurrent fetches; at most half of them from one host."""
    max_rows: int | None = None
    """Use only the first rows of the input; null: all rows."""
    max_image_bytes: int = 1 << 28
    """An image with more bytes is a row error. No more than this is read."""
    max_source_pixels: int = 178_956_970
    """An image whose header claims more pixels is a row error (default: Pillow's limit). Decoding
    takes up to 28 bytes a pixel, depending on the format."""


@dataclass(frozen=True, kw_only=True)
class TaskOutputConfig:
    """The form of answers: one of the first six settings, or a form from a column."""

    json_schema: Any = None
    """A JSON schema: the path of a file, the schema itself, or `any` for any object. A `$ref` may
    name other files, relative to it."""
    pydantic: str | None = None
    """`module:Class`: a Pydantic model, dataclass or typed dict (before Python 3.12, that of
    `typing_extensions`). Its module is imported and runs as code; answers are validated by the
    class's JSON schema alone."""
    choice: list[Any] | None = None
    """List of possible answers."""
    regex: str | None = None
    """A pattern that the whole answer must match."""
    grammar: str | None = None
    """A context-free grammar in Lark notation, or the path of a file with one."""
    type: str | None = None
    """A named type: `integer`, `number`, `boolean`, `date`, `time`, `datetime`, `email`, `uuid4`,
    `ipv4`, `hex_color`, ..., as in `outlines.types`."""
    json_schema_column: str | None = None
    """Column with a JSON schema for each row; a null falls back to the settings above. With other
    tasks than extract, only answers to rows with a schema are parsed as JSON."""
    choice_column: str | None = None
    """Column with a list of choices for each row, or JSON text of it; a null falls back to the
    settings above."""
    guided: Guided = Guided.auto
    """`auto`: decoding never chooses tokens that violate the form, as far as a grammar can express
    it; the column `constraint` records how far. `strict`: a row whose form cannot be enforced
    exactly is an error. `off`: answers are only validated."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The prompt and how answers are processed (`task=caption|vqa|extract|dialog`)."""

    name: TaskName = MISSING
    prompt: str = MISSING
    """Jinja2 template over the columns of the row. An unknown name is rejected before the run; a
    null is a row error."""
    system: str | None = None
    """System prompt, a template like `task.prompt`."""
    answer_prefix: str | None = None
    """Text with which each answer begins, a template like `task.prompt`: the model continues it.
    `generated_text`, `parsed` and grammars begin behind it. Without effect in a row where it is
    empty, or whose messages end with an assistant's message to continue."""
    continue_final_message: bool = False
    """Continue the assistant's message with which chat messages of a column end, instead of
    refusing the row. A message with `prefix: true` is always continued."""
    markdown_images: bool = False
    """Read `![](X)` in a prompt or a user's message as an image, as in TGI. X is a URL, a path or a
    `data:` URI; the same access rules apply as in image columns."""
    output: TaskOutputConfig = field(default_factory=TaskOutputConfig)
    scores: bool = False
    """Score each choice instead of decoding; the answer is the likeliest one. The column `scores`
    lists all choices in order, each with the log-probability of its tokens and the end of sequence,
    and its probability among the row's choices."""
    instructions: Instructions = Instructions.off
    """`auto`: if there is a JSON schema, append it to the prompt in a compact form. Chat messages
    from a column are not changed."""


@dataclass(frozen=True, kw_only=True)
class GenerationColumnsConfig:
    """Columns that override a generation setting for each row; a null keeps the setting of the
    run."""

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
    """Setting it adds the column `logprobs`, which is null in rows that do not request it."""
    num_return_sequences: str | None = None
    """Setting it adds the columns `generated_texts` and `finish_reasons`."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is decoded."""

    max_new_tokens: int = 256
    """Maximum number of tokens of an answer."""
    min_new_tokens: int = 0
    """The answer cannot end, by end of sequence or stop string, before this many tokens."""
    temperature: float = 0.0
    """0: greedy decoding; above 0: tokens are sampled."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: all tokens."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Draw among tokens whose probability is at least this fraction of the highest one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are already in the prompt or the answer become less likely."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time that it is in the answer."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token once if it is in the answer."""
    seed: int = 0
    """Each row has its own random generator, seeded by this number and the position of the row."""
    stop: list[Any] = field(default_factory=list)
    """Strings that end an answer. They are removed from it."""
    skip_special_tokens: bool = True
    """Omit special tokens from the text of an answer. `false` keeps all but those for its end and
    padding, for models that mark places with them, such as Qwen2-VL's `<|box_start|>`. Florence-2's
    are always kept."""
    ignore_eos: bool = False
    """Ignore the end of sequence and generate `max_new_tokens` tokens. For benchmarks."""
    stop_on_repetition: bool = True
    """End an answer that only repeats itself: a cycle of up to 64 tokens makes up its last 512
    tokens and at least 16 periods. Has no effect with `ignore_eos`."""
    logprobs: bool = False
    """Add the column `logprobs`: the log-probability of each token of the answer, before
    temperature, top-k, top-p, min-p and penalties are applied."""
    num_return_sequences: int = 1
    """Number of answers for each row. Above 1, `generated_texts`, `finish_reasons` and
    `completion_tokens` cover all answers; other columns describe the first, which is the same as
    with 1."""
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
"""Lowest and highest value of each number above, for settings and for columns."""

"""What is read, what is asked of it, and how answers are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from batchvlm.config.choices import Guided, Instructions, SourceKind, TaskName


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
    data file (CSV, JSON, Arrow, ...), a folder of these or a `save_to_disk` folder. folder: a
    folder of images. Parquet: folders named `key=value` below it are columns."""
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
    """Fetch images whose address is on the public web (http, https), or allowed by name. What may
    be reached is a part of the question: with other values here, in `allow_hosts` or in
    `image_root`, an output folder is refused."""
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
    choice: list[Any] | None = None
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
    scores: bool = False
    """With choices: score each of them in place of decoding an answer. The answer is the likeliest,
    and the column `scores` holds all, in their order: the log-probability of a choice's tokens and
    of the end behind them, and its probability among the row's choices."""
    instructions: Instructions = Instructions.off
    """`auto`: where a JSON schema is asked for, the prompt ends with it, in a compact form; models
    answer better when they see it. Messages of the rows' own stay as they are."""


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
    stop: list[Any] = field(default_factory=list)
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

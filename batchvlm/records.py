"""What flows from stage to stage, in the order in which it is made.

    Shard -> Record -> Prompt -> Sample -> Batch -> Completion -> Result

A row is known by its position in the whole input (`row_index`) everywhere, never by its place in a
list. A row that fails carries a `Failure` from the stage where it failed straight to the writer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy.typing as npt

from batchvlm.errors import ErrorType

Array = npt.NDArray[Any]


def size_of_value(value: Any) -> int:
    """Bytes that a cell's Python value holds, roughly: text and binary count, numbers do not."""
    match value:
        case str() | bytes():
            return len(value)
        case dict():
            return sum(size_of_value(item) for item in value.values())
        case list() | tuple():
            return sum(size_of_value(item) for item in value)
    # Arrow values know.
    return int(getattr(value, "nbytes", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of the input, as its metadata tells it."""

    name: str
    """Path relative to the input's root; becomes the column `source_file`."""
    num_rows: int
    row_groups: tuple[int, ...]
    """Rows of each piece that reads as a whole (Parquet row groups); sums to `num_rows`."""
    identity: str
    """Changes when the content does: a digest of the metadata, never of a modification time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A contiguous range of rows of one input file: the unit of work and of output."""

    index: int
    """Place in the plan; names the part."""
    source_file: str
    first_row: int
    """First row within `source_file`."""
    num_rows: int
    first_row_index: int
    """Position of the first row in the whole input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a row has no answer."""

    error_type: ErrorType
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One input row: the columns that the job needs, images still undecoded."""

    row: int
    """Offset in the shard."""
    row_index: int
    """Position in the whole input."""
    source_file: str
    id: str
    values: Mapping[str, Any]
    """Column name to Python value."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Name to value of each of `output.keep_columns`: a Python value, or an Arrow array of one row
    where Python's would not be the same."""
    failure: Failure | None = None
    """Set where the row itself could not be read; `values` and `kept` are then empty."""
    said: tuple[Completion, ...] = ()
    """Of a dialog: the answers to the turns before this one."""
    fetched: Mapping[str, bytes | Failure] = field(default_factory=dict)
    """What was fetched from each address among its images, where that is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How one row is decoded: the run's settings with the row's own columns over them."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_on_repetition: bool = True
    logprobs: bool = False
    num_return_sequences: int = 1
    """Answers to the row."""

    @property
    def has_penalty(self) -> bool:
        """Whether what was said makes a difference to what is said next."""
        counts = self.frequency_penalty != 0 or self.presence_penalty != 0
        return counts or self.repetition_penalty != 1.0


class FormKind(StrEnum):
    """What the form of an answer is described by."""

    JSON_SCHEMA = "json_schema"
    CHOICE = "choice"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Form:
    """The form that an answer must have."""

    kind: FormKind
    text: str
    """A JSON schema, a JSON list of strings, a pattern for the whole answer, or a Lark grammar."""


class Constraint(StrEnum):
    """How far an answer was held to its form: the values of the output column `constraint`."""

    STRICT = "strict"
    """Whatever the model said, it was of the form."""
    LENIENT = "lenient"
    """As far as a grammar can say; the rest was left to validation."""
    XGRAMMAR = "xgrammar"
    """As far as xgrammar knows the schema, which llguidance refuses; the rest likewise."""
    NONE = "none"
    """Not at all: no grammar was made of it, or the row's grammar broke off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """Where an image is: bytes at hand, a path below the allowed root, or an address."""

    data: bytes | None = None
    path: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Chat messages with image slots, and the images that fill them, in order."""

    row_index: int
    messages: Sequence[Mapping[str, Any]]
    """`[{"role": ..., "content": [{"type": "text", "text": ...} | {"type": "image"}]}]`."""
    images: tuple[ImageRef, ...]
    generation: Generation
    json_schema: str | None = None
    """The row's own JSON schema, where the rows bring one."""
    choices: tuple[str, ...] | None = None
    """The row's own choices, where the rows bring some."""
    turns_left: int = 0
    """Of a dialog: turns that follow this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelTable:
    """What each byte of `pixel_values` stands for, where a processor's last step is left out."""

    values_C256: Array
    """float32 [3, 256]: by colour."""
    is_patched: bool
    """Whether colours are thirds of the last dimension, as in rows of patches, rather than the
    third dimension from the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A prompt as a server takes it: nothing is tokenized here."""

    messages: Sequence[Mapping[str, Any]]
    """As a `Prompt` has them, with image slots."""
    images: tuple[bytes, ...]
    """An image file for each slot, in order."""

    @property
    def size_bytes(self) -> int:
        return size_of_value(self.images) + size_of_value(self.messages)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt as the model takes it, not yet padded."""

    row_index: int
    features: Mapping[str, Array]
    """What the processor returned for this row alone: `input_ids` [1, T], `pixel_values`, ...;
    empty where a server has the processor."""
    image_tokens: int
    image_sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each image as the model sees it."""
    image_keys: tuple[str, ...] = ()
    """A digest of each image's pixels: images of one key need encoding once."""
    pixel_table: PixelTable | None = None
    """What the bytes in `pixel_values` stand for; None where these are numbers already."""
    generation: Generation
    json_schema: str | None = None
    choices: tuple[str, ...] | None = None
    room: int | None = None
    """Tokens that the model's positions leave for an answer; None where it does not say."""
    turns_left: int = 0
    """Of a dialog: turns that follow this one."""
    answer: int = 0
    """Which of the row's answers this is for, where it wants several."""
    request: ChatRequest | None = None
    """In place of `features`, where a server answers."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, image tokens included; 0 where only a server knows."""
        return int(self.features["input_ids"].shape[-1]) if self.features else 0

    @property
    def form(self) -> Form | None:
        """The form that the row itself brings for its answer."""
        if self.choices is not None:
            return Form(FormKind.CHOICE, json.dumps(self.choices, ensure_ascii=False))
        return Form(FormKind.JSON_SCHEMA, self.json_schema) if self.json_schema else None

    def without_images(self) -> Sample:
        """What is needed of a sample whose prompt is computed: no pixels."""
        ids = {name: ids for name, ids in self.features.items() if name == "input_ids"}
        return replace(self, features=ids, request=None)

    @cached_property
    def size_bytes(self) -> int:
        sent_bytes = 0 if self.request is None else self.request.size_bytes
        return sent_bytes + sum(array.nbytes for array in self.features.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples that go through the model together."""

    samples: tuple[Sample, ...]

    @property
    def padded_tokens(self) -> int:
        """Cells of the padded prompt rectangle."""
        return len(self.samples) * max(s.prompt_tokens for s in self.samples)

    @property
    def prompt_tokens(self) -> int:
        """Cells of that rectangle that are no padding."""
        return sum(s.prompt_tokens for s in self.samples)


class FinishReason(StrEnum):
    """Why decoding ended: the values of the output column `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens as a server counted them; None where it does not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceScore:
    """What the model makes of one choice."""

    choice: str
    logprob: float
    """Log-probability of its tokens behind the prompt, and of the end behind these."""
    probability: float
    """Among the row's choices, of which it is 1 in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the model answered to one sample."""

    row_index: int
    token_ids: tuple[int, ...]
    """Generated ids, with the end-of-sequence token where one was generated; empty where a server
    keeps them to itself."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each of these ids, where `Generation.logprobs` asks for them."""
    text: str
    finish_reason: FinishReason
    latency_s: float
    """Seconds from the start of the row's batch until its answer was complete."""
    constraint: Constraint | None = None
    """How far the answer was held to its form; None where it has none."""
    scores: tuple[ChoiceScore, ...] | None = None
    """Of each of the row's choices, in their order, where these are scored."""
    alternatives: tuple[Completion, ...] = ()
    """Further answers to the row, where it wants several."""
    usage: Usage | None = None
    """Set where a server answered."""

    @property
    def num_tokens(self) -> int | None:
        """Tokens of this answer."""
        return len(self.token_ids) if self.usage is None else self.usage.completion_tokens


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """What an engine computed, to be held against what was needed."""

    num_batches: int = 0
    """Prompt batches."""
    prompt_tokens: int = 0
    prompt_cells: int = 0
    """Positions computed for these prompts, padding included."""
    images_encoded: int = 0
    """Images, or rows of images where a family encodes these together, that were encoded."""
    vision_s: float = 0.0
    """Seconds in the image encoder; on a GPU, between the marks around its work, as below."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    row_steps: int = 0
    """Decode steps summed over the rows that took part, finished rows included."""
    forced_tokens: int = 0
    """Tokens that a grammar forced and that took no step of their own."""

    @property
    def padding_share(self) -> float:
        """Share of the prompt positions that were padding."""
        return 1 - self.prompt_tokens / self.prompt_cells if self.prompt_cells else 0.0


class Status(StrEnum):
    """The values of the output column `status`."""

    SUCCESS = "success"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One output row, less what is the same for the whole run."""

    row: int
    row_index: int
    source_file: str
    id: str
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Values of `output.keep_columns`, as a record has them."""
    status: Status
    failure: Failure | None = None
    attempts: int = 1
    generated_text: str | None = None
    generated_texts: tuple[str, ...] | None = None
    """All answers, where the row wants several or is a dialog."""
    finish_reasons: tuple[FinishReason, ...] | None = None
    """Of each of them."""
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    parsed: Any = None
    """The typed value of an extract task: a value of the column's Arrow type."""
    json_valid: bool | None = None
    constraint: Constraint | None = None
    scores: tuple[ChoiceScore, ...] | None = None
    """Of each of the row's choices, where these are scored."""
    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    completion_tokens: int | None = None
    num_images: int | None = None
    image_sizes: tuple[tuple[int, int], ...] | None = None
    latency_s: float | None = None

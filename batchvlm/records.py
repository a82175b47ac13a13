"""The data types that the stages pass on, in the order in which they are made.

    Shard -> Record -> Prompt -> Sample -> Batch -> Completion -> Result

Every type identifies a row by its position in the whole input (`row_index`), never by an index into
a list. A row that fails goes with a `Failure` from the stage that failed straight to the writer.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy.typing as npt

from batchvlm.errors import ErrorType, RowError

Array = npt.NDArray[Any]

_MAX_CHAR_TOKENS = 4
"""The most bytes of a character; each may be a token of its own."""


def size_of_value(value: Any) -> int:
    """Approximate bytes of a cell's Python value: text and binary count, numbers do not."""
    match value:
        case str() | bytes():
            return len(value)
        case dict():
            return sum(size_of_value(item) for item in value.values())
        case list() | tuple():
            return sum(size_of_value(item) for item in value)
    # Arrow values have `nbytes`.
    return int(getattr(value, "nbytes", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of the input, as described by its metadata."""

    name: str
    """Path relative to the input's root; becomes the column `source_file`."""
    num_rows: int
    row_groups: tuple[int, ...]
    """Rows of each part that is read as a whole (Parquet row groups); their sum is `num_rows`."""
    identity: str
    """A digest of metadata that changes with the content; no modification time is part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A contiguous range of rows of one input file: the unit of work and of output."""

    index: int
    """Position in the plan; names the output part."""
    source_file: str
    first_row: int
    """First row within `source_file`."""
    num_rows: int
    first_row_index: int
    """Position of the first row in the whole input."""

    def piece(self, first: int, num_rows: int) -> Shard:
        """Return rows `first` to `first + num_rows` of this shard as a shard."""
        return replace(
            self,
            first_row=self.first_row + first,
            num_rows=num_rows,
            first_row_index=self.first_row_index + first,
        )


def shard_of(plan: Sequence[Shard], row_index: int) -> Shard:
    """Return the shard of a plan that holds a row."""
    return plan[bisect_right(plan, row_index, key=lambda shard: shard.first_row_index) - 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a row has no answer."""

    error_type: ErrorType
    message: str

    @classmethod
    def of(cls, error: RowError) -> Failure:
        """Return the failure of the row that raised the error."""
        return cls(error_type=error.error_type, message=error.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One input row: the columns that the job needs, with images not decoded yet."""

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
    if Python has no equal value."""
    failure: Failure | None = None
    """Set if the row itself could not be read; `values` and `kept` are then empty."""
    answers: tuple[Completion, ...] = ()
    """For a dialog, the answers to earlier turns."""
    fetched: Mapping[str, bytes | Failure] = field(default_factory=dict)
    """Image address to the bytes fetched from it or the failure, if fetching is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Sampling settings of one row: the run's settings, overridden by the row's own columns."""

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
    """Answers to sample for the row."""

    @property
    def has_penalty(self) -> bool:
        """Whether the logits depend on earlier tokens through a penalty."""
        counts = self.frequency_penalty != 0 or self.presence_penalty != 0
        return counts or self.repetition_penalty != 1.0


def derived_seed(*parts: object) -> int:
    """Return a seed that depends on nothing but the text of these parts: 63 bits of its digest."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


class FormKind(StrEnum):
    """The kinds of description that an answer's form can have."""

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
    """How strictly decoding enforced an answer's form: values of the output column `constraint`."""

    STRICT = "strict"
    """Fully: every token sequence that could be decoded had the form."""
    LENIENT = "lenient"
    """As far as a grammar can express the form; the rest was left to validation."""
    XGRAMMAR = "xgrammar"
    """As far as xgrammar supports a schema that llguidance refuses; the rest was left to
    validation."""
    NONE = "none"
    """Not at all: the form could not be compiled to a grammar, or the row's grammar failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """The source of an image: its bytes, a path below the allowed root, or an address."""

    data: bytes | None = None
    path: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Chat messages with image slots, and the images that fill them, in order."""

    row_index: int
    messages: Sequence[Mapping[str, Any]]
    """`[{"role": ..., "content": [{"type": "text", "text": ...} | {"type": "image"}]}]`. A last
    message of the assistant's is continued."""
    images: tuple[ImageRef, ...]
    generation: Generation
    json_schema: str | None = None
    """The row's own JSON schema, if it has one."""
    choices: tuple[str, ...] | None = None
    """The row's own choices, if it has some."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """The row's own variables of the chat template, JSON values."""
    turns_left: int = 0
    """For a dialog, the number of turns after this one."""

    @property
    def is_continued(self) -> bool:
        """Whether the answer continues the last message."""
        return bool(self.messages[-1]["role"] == "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelTable:
    """Maps bytes of `pixel_values` to normalized values, which is left to the engine."""

    values_C256: Array
    """float32 [3, 256]: for each colour channel, the value of each byte."""
    is_patched: bool
    """Whether the channels are thirds of the last dimension, as in flattened patches, rather than
    the third dimension from the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A prompt as sent to a server, which tokenizes it."""

    messages: Sequence[Mapping[str, Any]]
    """The messages of the `Prompt`, with image slots."""
    images: tuple[bytes, ...]
    """An image file for each slot, in order."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """Those of the `Prompt`."""

    @property
    def size_bytes(self) -> int:
        return size_of_value(self.images) + size_of_value(self.messages)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt as input of the model, not padded."""

    row_index: int
    features: Mapping[str, Array]
    """The processor's output for this row alone: `input_ids` [1, T], `pixel_values`, ...; empty if
    a server runs the processor."""
    image_tokens: int
    image_sizes: tuple[tuple[int, int], ...]
    """(width, height) in pixels of each image as the model gets it."""
    image_keys: tuple[str, ...] = ()
    """A digest of each image's pixels: images with equal keys are encoded once."""
    pixel_table: PixelTable | None = None
    """Maps the bytes of `pixel_values` to values; None if they are values already."""
    generation: Generation
    json_schema: str | None = None
    choices: tuple[str, ...] | None = None
    room: int | None = None
    """Tokens that the context length leaves for an answer; None if the model has no known limit."""
    turns_left: int = 0
    """For a dialog, the number of turns after this one."""
    is_continued: bool = False
    """Whether the answer continues text at the end of the prompt."""
    answer: int = 0
    """The index of the answer to sample, if the row asks for several."""
    request: ChatRequest | None = None
    """Used in place of `features` if a server answers."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, image tokens included; 0 if only a server knows it."""
        return int(self.features["input_ids"].shape[-1]) if self.features else 0

    @property
    def continued_ids(self) -> tuple[int, ...]:
        """The last ids of the prompt if the answer continues their text; else empty."""
        if not self.is_continued:
            return ()
        return tuple(self.features["input_ids"][0, -_MAX_CHAR_TOKENS:].tolist())

    @property
    def form(self) -> Form | None:
        """The row's own form for its answer; None if it has none."""
        if self.choices is not None:
            return Form(FormKind.CHOICE, json.dumps(self.choices, ensure_ascii=False))
        return Form(FormKind.JSON_SCHEMA, self.json_schema) if self.json_schema else None

    def without_images(self) -> Sample:
        """A copy with the features that a prefilled sample still needs: the token ids."""
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
        """Positions of the padded prompt batch."""
        return len(self.samples) * max(s.prompt_tokens for s in self.samples)

    @property
    def prompt_tokens(self) -> int:
        """Positions of the batch that are not padding."""
        return sum(s.prompt_tokens for s in self.samples)


class FinishReason(StrEnum):
    """Why decoding ended: the values of the output column `finish_reason`."""

    STOP = "stop"
    LENGTH = "length"
    REPETITION = "repetition"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts reported by a server; None for a count that it does not report."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceScore:
    """The model's score of one choice."""

    choice: str
    logprob: float
    """Log-probability of its tokens, and of the end of the answer, given the prompt."""
    probability: float
    """Its probability normalized over the row's choices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The model's answer to one sample."""

    row_index: int
    token_ids: tuple[int, ...]
    """Generated ids, including an end-of-sequence token that was generated; empty if a server does
    not return them."""
    logprobs: tuple[float, ...] | None = None
    """Log-probability of each of these ids, if `Generation.logprobs` is set."""
    text: str
    finish_reason: FinishReason
    latency_s: float
    """Seconds from the start of the row's batch until its answer was complete."""
    constraint: Constraint | None = None
    """How strictly the answer's form was enforced; None if it has no form."""
    scores: tuple[ChoiceScore, ...] | None = None
    """The scores of the row's choices, in their order, if choices are scored."""
    alternatives: tuple[Completion, ...] = ()
    """Further answers to the row, if it asks for several."""
    usage: Usage | None = None
    """Set if a server answered."""

    @property
    def num_tokens(self) -> int | None:
        """Tokens of this answer; None if a server did not report them."""
        return len(self.token_ids) if self.usage is None else self.usage.completion_tokens


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """What an engine computed, to compare with what was needed."""

    num_batches: int = 0
    """Prompt batches computed."""
    prompt_tokens: int = 0
    prompt_cells: int = 0
    """Positions computed for these prompts, padding included."""
    images_encoded: int = 0
    """Encoded images, or rows of images if the family encodes a row's images together."""
    vision_s: float = 0.0
    """Seconds in the image encoder; on a GPU measured by CUDA events, like the next two."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    row_steps: int = 0
    """Decode steps summed over the rows that took part, finished rows included."""
    forced_tokens: int = 0
    """Tokens that a grammar forced and that took no separate step."""

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
    """One output row, without the columns that are the same for the whole run."""

    row: int
    row_index: int
    source_file: str
    id: str
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Values of `output.keep_columns`, as in `Record`."""
    status: Status
    failure: Failure | None = None
    attempts: int = 1
    generated_text: str | None = None
    generated_texts: tuple[str, ...] | None = None
    """All answers, if the row asks for several or is a dialog."""
    finish_reasons: tuple[FinishReason, ...] | None = None
    """The finish reason of each of these."""
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    parsed: Any = None
    """The typed value of an extract task: a value of the column's Arrow type."""
    json_valid: bool | None = None
    constraint: Constraint | None = None
    scores: tuple[ChoiceScore, ...] | None = None
    """The scores of the row's choices, if choices are scored."""
    finish_reason: FinishReason | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    completion_tokens: int | None = None
    num_images: int | None = None
    image_sizes: tuple[tuple[int, int], ...] | None = None
    latency_s: float | None = None

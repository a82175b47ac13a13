"""What can go wrong: errors that end the run, and errors that cost one row.

A user's mistake ends the run with one line and a hint. A bad row never ends it: a stage raises
`RowError`, and the pipeline turns that into the row's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """What the process tells its caller."""

    DONE = 0
    """Every row of this task has its output row."""
    FAILED = 1
    """Something broke that is neither the user's configuration nor a row."""
    USAGE = 2
    """The configuration or the input is wrong; nothing was computed."""
    TOO_MANY_ERRORS = 3
    """More rows failed than `runtime.max_error_rate` allows; finished rows are on disk."""
    INTERRUPTED = 75
    """Stopped with all finished rows on disk, by a signal, because nothing got on, or because the
    time of the allocation is up; the same command goes on from there."""
    STOPPED = 130
    """A second Ctrl-C: rows finished since the last flush are lost, and computed again."""


class BatchvlmError(Exception):
    """The root of every error that ends the run.

    Args:
        message: one line: what, where, the limit.
        hint: one line: what to do about it.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(BatchvlmError):
    """A setting is unknown, missing, of the wrong type, out of range, or at odds with another."""

    exit_code = ExitCode.USAGE


class InputError(BatchvlmError):
    """The input as a whole cannot be read: no such file, a missing column, an empty folder."""

    exit_code = ExitCode.USAGE


class FingerprintError(ConfigError):
    """The output folder holds the answers to another question."""


class ModelError(BatchvlmError):
    """The model or its processor cannot be loaded."""

    exit_code = ExitCode.USAGE


class DeviceError(BatchvlmError):
    """The accelerator is in a state that only a new process can leave."""

    exit_code = ExitCode.INTERRUPTED


class EndpointError(BatchvlmError):
    """The server that answers is not there, or answers nobody."""

    exit_code = ExitCode.INTERRUPTED


class UnfinishedError(BatchvlmError):
    """The run ended at a safe point with rows left to do: the same command goes on."""

    exit_code = ExitCode.INTERRUPTED


class ReplicaError(BatchvlmError):
    """Processes that hold a model together have lost one another."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="finished rows are on disk; run the same command again")


class OutputError(BatchvlmError):
    """The output folder cannot be written, or holds something that is not ours."""


class TooManyErrors(BatchvlmError):
    """More rows failed than `runtime.max_error_rate` allows.

    Args:
        message, hint: as ever.
        causes: a line for each error type: how many, and one example.
    """

    exit_code = ExitCode.TOO_MANY_ERRORS

    def __init__(self, message: str, *, hint: str, causes: Sequence[str]) -> None:
        super().__init__(message, hint=hint)
        self.causes = tuple(causes)


class ErrorType(StrEnum):
    """Why a row has no answer: the values of the output column `error_type`."""

    INPUT = "input"
    """The input row itself cannot be read: a broken JSON line, a corrupt page."""
    PROMPT = "prompt"
    """The prompt cannot be built: a null or malformed column, images that do not match slots."""
    PROMPT_TOO_LONG = "prompt_too_long"
    """The prompt with its image tokens exceeds what the model can read. Never truncated."""
    MISSING_IMAGE = "missing_image"
    """The row names an image that is null, empty, or not there."""
    FETCH = "fetch"
    """The image is there, but reading it failed: a network file system or a disk had a fault."""
    DECODE = "decode"
    """The bytes are no image, or only part of one."""
    TOO_LARGE = "too_large"
    """The image has more bytes than `data.max_image_bytes`, or its header claims more pixels than
    `data.max_source_pixels`."""
    FORBIDDEN = "forbidden"
    """The row asks for a file or an address that the configuration does not allow."""
    TIMEOUT = "timeout"
    """Preparing the row took longer than `runtime.sample_timeout_s`, or a server's answer longer
    than `engine.endpoint.timeout_s`."""
    PREPROCESS = "preprocess"
    """The model's processor failed on the row, or its worker process died."""
    OOM = "oom"
    """The row does not fit into memory even in a batch of its own."""
    ENGINE = "engine"
    """The model raised on the row, even in a batch of its own, or the server refused it."""
    INVALID_JSON = "invalid_json"
    """The answer is no JSON, or breaks the schema; `generated_text` still holds it."""


class RowError(Exception):
    """One row has no answer; the run goes on.

    Args:
        error_type: which of the documented kinds it is.
        message: one line without the payload: what, where, the limit.
    """

    def __init__(self, error_type: ErrorType, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.error_type}: {self.message}"

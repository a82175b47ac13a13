"""Errors that end the run, and errors that fail one row.

A user's mistake ends the run with a one-line message and a hint. A bad row never ends it: a stage
raises `RowError`, which the pipeline converts into the row's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """The exit status of the process."""

    DONE = 0
    """Every row of this task has its output row."""
    FAILED = 1
    """Something failed that is neither the configuration nor a row."""
    USAGE = 2
    """The configuration or the input is wrong; nothing was computed."""
    TOO_MANY_ERRORS = 3
    """More rows failed than `runtime.max_error_rate` allows; finished rows are on disk."""
    INTERRUPTED = 75
    """Stopped with all finished rows on disk: by a signal, because the run made no progress, or
    because the time of the allocation is up. The same command resumes the run."""
    STOPPED = 130
    """A second Ctrl-C: rows finished since the last flush are lost and will be computed again."""


class BatchvlmError(Exception):
    """The base class of all errors that end the run.

    Args:
        message: one line: what is wrong, where, and the limit.
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
    """A setting is unknown, missing, of the wrong type, out of range, or conflicts with another."""

    exit_code = ExitCode.USAGE


class InputError(BatchvlmError):
    """The input as a whole cannot be read: no such file, a missing column, an empty folder."""

    exit_code = ExitCode.USAGE


class FingerprintError(ConfigError):
    """The output folder holds the answers of a job with another fingerprint or layout."""


class ModelError(BatchvlmError):
    """The model or its processor cannot be loaded."""

    exit_code = ExitCode.USAGE


class DeviceError(BatchvlmError):
    """The accelerator is in a state from which only a new process can recover."""

    exit_code = ExitCode.INTERRUPTED


class EndpointError(BatchvlmError):
    """The server cannot be reached, or answers no request."""

    exit_code = ExitCode.INTERRUPTED


class UnfinishedError(BatchvlmError):
    """The run stopped at a safe point with rows left; the same command resumes it."""

    exit_code = ExitCode.INTERRUPTED


class ReplicaError(BatchvlmError):
    """The processes that hold the parts of one model have lost contact."""

    exit_code = ExitCode.INTERRUPTED

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="finished rows are on disk; run the same command again")


class OutputError(BatchvlmError):
    """The output folder cannot be written, or holds something that is not ours."""


class TooManyErrors(BatchvlmError):
    """More rows failed than `runtime.max_error_rate` allows.

    Args:
        message, hint: see `BatchvlmError`.
        causes: one line for each error type: the number of rows and an example.
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
    """The row's image is null, empty, or does not exist."""
    FETCH = "fetch"
    """The image exists, but reading it failed: a fault of the network, a file system or a disk."""
    DECODE = "decode"
    """The bytes are not an image, or only part of one."""
    TOO_LARGE = "too_large"
    """The image has more bytes than `data.max_image_bytes`, or its header claims more pixels than
    `data.max_source_pixels`."""
    FORBIDDEN = "forbidden"
    """The row asks for a file or an address that the configuration does not allow."""
    TIMEOUT = "timeout"
    """Preparing the row took longer than `runtime.sample_timeout_s`, or a server's answer took
    longer than `engine.endpoint.timeout_s`."""
    PREPROCESS = "preprocess"
    """The model's processor failed on the row, or its worker process died."""
    OOM = "oom"
    """The row does not fit into memory even in a batch of its own."""
    ENGINE = "engine"
    """The model raised on the row, even in a batch of its own, or the server refused it."""
    INVALID_JSON = "invalid_json"
    """The answer is not JSON or violates the schema; `generated_text` still holds it."""


class RowError(Exception):
    """One row has no answer; the run continues.

    Args:
        error_type: its value in the output column `error_type`.
        message: one line without the payload: what is wrong, where, and the limit.
    """

    def __init__(self, error_type: ErrorType, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.error_type}: {self.message}"

"""Exceptions in the engine, classified: those that fail rows and those that end the process."""

from __future__ import annotations

import gc
import logging

import torch

from batchvlm.errors import DeviceError, ErrorType
from batchvlm.records import Failure
from batchvlm.words import described

log = logging.getLogger(__name__)


def is_oom(error: BaseException) -> bool:
    """Whether the error says that memory was short, on the device or on the host."""
    # torch's CPU allocator and cuBLAS raise RuntimeError.
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )


def failure_of(error: BaseException) -> Failure:
    """The failure of a row that raised this error when it was computed alone."""
    return Failure(
        error_type=ErrorType.OOM if is_oom(error) else ErrorType.ENGINE, message=described(error)
    )


def device_error(error: BaseException) -> DeviceError:
    """The error that ends the process after a `torch.AcceleratorError`.

    After one, every further call on the device fails, so that the rows cannot be blamed.
    """
    return DeviceError(
        f"the accelerator failed: {described(error)}",
        hint="run the same command again: it goes on from the last finished rows",
    )


def free_memory(device: torch.device) -> None:
    """Free the memory that a failed attempt has left allocated."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.empty_cache()
    except torch.AcceleratorError:
        raise
    except RuntimeError as error:
        # torch 2.11 never frees this memory after an aborted graph capture.
        log.debug("cached memory was not freed: %s", described(error))

"""The C library's allocator, told to keep what a forward gives back for the next one."""

from __future__ import annotations

import ctypes
import logging

log = logging.getLogger(__name__)

# <malloc.h> of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
"""Memory at the end of the heap that is free and not given back to the system."""
_LARGEST_BYTES = 32 << 20
"""The largest block that glibc allows to be taken from the heap."""


def keep_freed_memory() -> bool:
    """Let tensors of a few MiB reuse memory that the process has already.

    By default glibc gets each from the system and gives it back at once, and the system fills each
    page with zeros anew: a quarter of the time of an image encoder in float32, two fifths in
    bfloat16.

    Returns:
        Whether there is a glibc to tell.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False  # another system, another library
    is_set = bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES))
    return bool(mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)) and is_set

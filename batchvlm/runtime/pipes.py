"""Pipes between processes that transfer large arrays without intermediate copies.

A multiprocessing pipe pickles an object into one byte string, which it copies several times on both
sides while it holds the GIL. Here the large arrays of an object are sent after its pickle, out of
band: written from their own memory, and read into their final memory.
"""

from __future__ import annotations

import fcntl
import io
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

_LARGE_BYTES = 1 << 16
"""A smaller array is sent within the pickle, which saves a read."""
_PIPE_BYTES = 1 << 20
"""Linux's default limit for an unprivileged user. A larger pipe needs fewer reads, and after each
the reader waits for the GIL."""
_NUM = struct.Struct("!Q")


class ArrayConnection(Connection):
    """One end of a pipe for objects with large arrays. Both ends must be of this class."""

    def send(self, obj: Any) -> None:
        """Send an object.

        Raises:
            PicklingError, TypeError, AttributeError: it cannot be pickled; nothing was sent.
        """
        arrays: list[memoryview] = []

        def is_within(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes < _LARGE_BYTES:
                return True
            arrays.append(view)
            return False

        pickled = io.BytesIO()
        reduction.ForkingPickler(pickled, pickle.HIGHEST_PROTOCOL, True, is_within).dump(obj)
        sizes = [_NUM.pack(n) for n in (len(arrays), *(view.nbytes for view in arrays))]
        self.send_bytes(b"".join(sizes) + pickled.getvalue())
        for view in arrays:
            while view:
                view = view[os.write(self.fileno(), view) :]

    def recv(self) -> Any:
        """Receive an object. Its arrays are writable.

        Raises:
            EOFError: the other end is closed.
            OSError: the other end was closed in the middle of an object.
        """
        message = memoryview(self.recv_bytes())
        (num,) = _NUM.unpack_from(message)
        arrays = []
        for i in range(1, num + 1):
            (size,) = _NUM.unpack_from(message, i * _NUM.size)
            # Not a bytearray, which would be zero-filled first.
            arrays.append(np.empty(size, np.uint8))
            view = arrays[-1].data
            while view:
                num_read = os.readv(self.fileno(), [view])
                if not num_read:
                    raise OSError("the pipe was closed in the middle of an object")
                view = view[num_read:]
        return pickle.loads(message[(num + 1) * _NUM.size :], buffers=arrays)


def array_pipe() -> tuple[ArrayConnection, ArrayConnection]:
    """Return the reading and the writing end of a new pipe."""
    reader, writer = os.pipe()
    # Fails outside Linux, or above the user's limit on pipe memory. The pipe is slower then.
    with suppress(AttributeError, OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return ArrayConnection(reader, writable=False), ArrayConnection(writer, readable=False)


def _rebuild(fd: Any, readable: bool, writable: bool) -> ArrayConnection:
    return ArrayConnection(fd.detach(), readable, writable)


def _reduce(end: ArrayConnection) -> tuple[Callable[..., ArrayConnection], tuple[Any, ...]]:
    return _rebuild, (reduction.DupFd(end.fileno()), end.readable, end.writable)


reduction.register(ArrayConnection, _reduce)

"""Pipes between processes through which large arrays go without being copied on the way.

A pipe of multiprocessing makes one string of bytes of an object and copies it several times on
either side, with Python's lock held. Here the arrays of an object follow behind it: they are
written from where they lie, and read to where they will.
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
"""An array of fewer bytes goes within the object: that is one read less."""
_PIPE_BYTES = 1 << 20
"""What Linux grants without asking: a reader who waits for Python's lock does so less often."""
_NUM = struct.Struct("!Q")


class ArrayConnection(Connection):
    """One end of a pipe; it sends and receives objects with large arrays.

    Both ends must be of this class.
    """

    def send(self, obj: Any) -> None:
        """Send an object.

        Raises:
            PicklingError, TypeError, AttributeError: it cannot be sent; nothing of it was.
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
        """Receive an object; its arrays may be written to.

        Raises:
            EOFError: the other end is closed.
            OSError: it was closed in the middle of an object.
        """
        message = memoryview(self.recv_bytes())
        (num,) = _NUM.unpack_from(message)
        arrays = []
        for i in range(1, num + 1):
            (size,) = _NUM.unpack_from(message, i * _NUM.size)
            # Not a bytearray, which would be filled with zeros first.
            arrays.append(np.empty(size, np.uint8))
            view = arrays[-1].data
            while view:
                num_read = os.readv(self.fileno(), [view])
                if not num_read:
                    raise OSError("the pipe was closed in the middle of an object")
                view = view[num_read:]
        return pickle.loads(message[(num + 1) * _NUM.size :], buffers=arrays)


def array_pipe() -> tuple[ArrayConnection, ArrayConnection]:
    """A pipe: the end to read from, and the one to write to."""
    reader, writer = os.pipe()
    # Not everywhere, nor for a user whose pipes hold much already: it is slower then, no more.
    with suppress(AttributeError, OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return ArrayConnection(reader, writable=False), ArrayConnection(writer, readable=False)


def _rebuild(fd: Any, readable: bool, writable: bool) -> ArrayConnection:
    return ArrayConnection(fd.detach(), readable, writable)


def _reduce(end: ArrayConnection) -> tuple[Callable[..., ArrayConnection], tuple[Any, ...]]:
    return _rebuild, (reduction.DupFd(end.fileno()), end.readable, end.writable)


reduction.register(ArrayConnection, _reduce)

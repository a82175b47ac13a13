"""Objects with arrays through a pipe: all of them, unchanged, or an error and none of them."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvlm.runtime.pipes import ArrayConnection, array_pipe

LARGE = 3_400_000
"""Bytes: more than any pipe holds."""


@pytest.fixture
def pipe() -> Iterator[tuple[ArrayConnection, ArrayConnection]]:
    reader, writer = array_pipe()
    yield reader, writer
    reader.close()
    writer.close()


def through(pipe: tuple[ArrayConnection, ArrayConnection], *objects: Any) -> list[Any]:
    """What arrives of objects that a thread sends."""
    reader, writer = pipe
    sender = threading.Thread(target=lambda: [writer.send(each) for each in objects])
    sender.start()
    got = [reader.recv() for _ in objects]
    sender.join()
    return got


def echo(reader: ArrayConnection, writer: ArrayConnection) -> None:
    while (got := reader.recv()) is not None:
        writer.send(got)


shapes = st.lists(st.integers(0, 300), max_size=3).map(tuple)
types = st.sampled_from(["u1", "f4", "f2", "i8", "?", "<M8[s]"])


@given(st.lists(st.tuples(shapes, types, st.booleans(), st.integers(1, 3)), max_size=4))
@settings(max_examples=60)
def test_arrays_arrive_as_they_were(drawn: list[tuple[Any, str, bool, int]]) -> None:
    arrays = []
    for shape, kind, is_fortran, step in drawn:
        numbers = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int64) % 251
        array = numbers.astype(kind).reshape(shape, order="F" if is_fortran else "C")
        arrays.append(array[::step] if shape else array)
    reader, writer = array_pipe()
    with reader, writer:
        sent = {"arrays": arrays, "again": arrays[:1], "text": "ä" * 70_000, "none": None}
        (got,) = through((reader, writer), sent)
    assert {**got, "arrays": None, "again": None} == {**sent, "arrays": None, "again": None}
    for mine, its in zip([*got["arrays"], *got["again"]], [*arrays, *arrays[:1]], strict=True):
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
        np.testing.assert_array_equal(mine, its)
    if arrays:
        assert got["again"][0] is got["arrays"][0]


def test_what_arrives_may_be_written_to(pipe: tuple[ArrayConnection, ArrayConnection]) -> None:
    fixed = np.zeros(LARGE, np.uint8)
    (got,) = through(pipe, [fixed, fixed[:5]])
    for array in got:
        array[:] = 7
    assert not fixed.any()


def test_many_objects_one_behind_the_other(pipe: tuple[ArrayConnection, ArrayConnection]) -> None:
    objects = [np.full(n * 40_000, n, np.uint8) for n in range(12)]
    for mine, its in zip(through(pipe, *objects), objects, strict=True):
        np.testing.assert_array_equal(mine, its)


def test_what_cannot_be_sent_leaves_nothing_in_the_pipe(
    pipe: tuple[ArrayConnection, ArrayConnection],
) -> None:
    _, writer = pipe
    with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
        writer.send([np.zeros(LARGE, np.uint8), threading.Lock()])
    assert through(pipe, "next") == ["next"]


def test_another_process_gets_its_ends() -> None:
    context = get_context("spawn")
    there, here = array_pipe(), array_pipe()
    process = context.Process(target=echo, args=(there[0], here[1]))
    process.start()
    try:
        for size in (3, LARGE):
            sent = np.arange(size, dtype=np.uint32)
            threading.Thread(target=there[1].send, args=({"x": sent},)).start()
            np.testing.assert_array_equal(here[0].recv()["x"], sent)
        there[1].send(None)
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        for end in (*there, *here):
            end.close()


def test_the_end_of_a_pipe(pipe: tuple[ArrayConnection, ArrayConnection]) -> None:
    reader, writer = pipe
    writer.send("last")
    writer.close()
    assert reader.recv() == "last"
    with pytest.raises(EOFError):
        reader.recv()


def test_a_writer_that_goes_in_the_middle_of_an_object(
    pipe: tuple[ArrayConnection, ArrayConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    write = os.write

    def goes(fd: int, data: Any) -> int:
        if len(data) == LARGE:
            write(fd, data[:1000])
            raise KeyboardInterrupt
        return write(fd, data)

    monkeypatch.setattr(os, "write", goes)
    with pytest.raises(KeyboardInterrupt):
        writer.send(np.zeros(LARGE, np.uint8))
    writer.close()
    with pytest.raises(OSError, match="in the middle of an object"):
        reader.recv()

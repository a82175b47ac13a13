"""What it takes to bring prepared rows from worker processes to the engine's process.

    python benchmarks/pipes.py [--write]

A process sends samples of the size that they have on their way to a GPU (an image of some 730 by
730 pixels, a byte for each number) through a pipe of multiprocessing, and through the package's. A
thread receives them, once while the main thread has nothing to do and once while it runs Python
without end, as an engine does that launches many kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections import deque
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from results import environment, write_section

from batchvlm.runtime.pipes import array_pipe

KINDS = {"multiprocessing": "multiprocessing's", "arrays": "the package's"}
_KEPT = 20
"""Samples that wait in the engine's process."""


def send(writer: Connection, report: Connection, num: int, size: int) -> None:
    sample = {"pixel_values": np.random.default_rng(0).integers(0, 255, size, np.uint8), "row": 1}
    start_s = time.process_time()
    for _ in range(num):
        writer.send(sample)
    report.send(time.process_time() - start_s)


def measure(kind: str, *, num: int, size: int, is_busy: bool) -> dict[str, float]:
    """Milliseconds that a sample takes."""
    context = get_context("spawn")
    reader, writer = array_pipe() if kind == "arrays" else context.Pipe(duplex=False)
    heard, report = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(writer, report, num, size))
    process.start()
    kept: deque[Any] = deque(maxlen=_KEPT)
    kept.append(reader.recv())  # it is on its way

    def receive() -> None:
        for _ in range(num - 1):
            kept.append(reader.recv())

    thread = threading.Thread(target=receive)
    start_s, own_s = time.perf_counter(), time.thread_time()
    all_s = time.process_time()
    thread.start()
    while is_busy and thread.is_alive():
        sum(range(1000))
    thread.join()
    wall_s, own_s = time.perf_counter() - start_s, time.thread_time() - own_s
    receiver_s = time.process_time() - all_s - own_s
    sender_s = heard.recv()
    process.join()
    for end in (reader, writer, heard, report):
        end.close()
    return {
        "wall_ms": wall_s * 1e3 / (num - 1),
        "sender_ms": sender_s * 1e3 / num,
        "receiver_ms": receiver_s * 1e3 / (num - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=3_200_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to RESULTS.md")
    args = parser.parse_args()
    found: dict[tuple[bool, str], list[dict[str, float]]] = {}
    for _ in range(args.repeat):
        for is_busy in (False, True):
            for kind in KINDS:
                one = measure(kind, num=args.samples, size=args.bytes, is_busy=is_busy)
                print(is_busy, kind, one, file=sys.stderr)
                found.setdefault((is_busy, kind), []).append(one)
    lines = [
        f"{args.samples} samples of {args.bytes / 1e6:.1f} MB, medians of {args.repeat},"
        " in milliseconds a sample.",
        "",
        "| main thread | pipe | arrives every | CPU of the sender | CPU of the receiving thread |",
        "|---|---|--:|--:|--:|",
    ]
    for (is_busy, kind), runs in sorted(found.items()):
        wall, sender, receiver = (
            statistics.median(one[name] for one in runs)
            for name in ("wall_ms", "sender_ms", "receiver_ms")
        )
        lines.append(
            f"| {'busy' if is_busy else 'idle'} | {KINDS[kind]} | {wall:.1f} | {sender:.1f}"
            f" | {receiver:.1f} |"
        )
    command = f"python benchmarks/pipes.py --repeat {args.repeat} --write"
    load = f"Load before: {os.getloadavg()[0]:.1f}."
    markdown = "\n".join([environment(command), "", load, "", *lines])
    print(markdown)
    if args.write:
        write_section("Rows on their way to the engine", markdown)


if __name__ == "__main__":
    main()

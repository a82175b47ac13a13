"""The command lines of `batchvlm verify`, `batchvlm status` and `batchvlm compact`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from batchvlm.arguments import Parser, at_least
from batchvlm.errors import ExitCode
from batchvlm.words import counted, duration, number_of

if TYPE_CHECKING:
    from batchvlm.output.status import JobStatus, Silent

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_PREFIXES = ("", "K", "M", "G", "T")
_MAX_SILENT = 10


def verify(argv: Sequence[str]) -> ExitCode:
    """`batchvlm verify OUT`."""
    parser = _parser(
        "verify",
        "Check that OUT/data holds every input row exactly once, readable and of one run.",
        "Exit code 0: it does. 1: it does not, and the lines say which rows are missing, double or "
        "foreign, by their column row_index. Writes nothing.",
    )
    args = parser.parse_args(argv)
    from batchvlm.output.folder import OutputFolder
    from batchvlm.output.verify import verify

    verdict = verify(OutputFolder(args.out))
    print(f"input        {number_of(verdict.num_rows, 'row')}")
    num_there = number_of(verdict.statuses.total(), "row")
    print(f"output       {num_there}: {counted(verdict.statuses) or 'none'}")
    if verdict.errors:
        print(f"errors       {counted(verdict.errors)}")
    for fault in verdict.faults:
        print(fault)
    print("incomplete or damaged" if verdict.faults else "every input row is there exactly once")
    return ExitCode.FAILED if verdict.faults else ExitCode.DONE


def status(argv: Sequence[str]) -> ExitCode:
    """`batchvlm status OUT`."""
    parser = _parser(
        "status",
        "Show the progress of a job, running or dead, from its folder alone.",
        "Writes nothing. Runs on any machine that can read the folder.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="refresh every SECONDS (5) until the job is done or has stopped",
    )
    args = parser.parse_args(argv)
    from batchvlm.output.folder import OutputFolder
    from batchvlm.output.status import status

    while True:
        found = status(OutputFolder(args.out))
        if args.watch and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # clear the screen
        if args.json:
            silent = [asdict(worker) for worker in found.silent]
            shown = {"state": found.state} | vars(found) | {"silent": silent}
            print(json.dumps(shown), flush=True)
        else:
            _print_status(found)
        # Not `done`: a retry can run on a job whose rows are all answered.
        if not args.watch or found.state != "running":
            return ExitCode.DONE
        time.sleep(args.watch)
        if not args.json:
            print(flush=True)


def _print_status(found: JobStatus) -> None:
    share = found.num_done / max(found.num_rows, 1)
    unfinished = found.num_in_segments
    print(f"state    {_state(found)}")
    print(f"rows     {found.num_done:,} of {found.num_rows:,} ({share:.1%})", end="")
    print(f", {unfinished:,} of them in unfinished shards" if unfinished else "")
    print(f"shards   {found.num_finished:,} of {found.num_shards:,} finished")
    for name in found.damaged:
        print(f"damaged  {name}: delete it, and the same command computes its rows again")
    if found.errors:
        print(f"errors   {counted(found.errors)}")
    if found.num_waiting:
        wait = "waits" if found.num_waiting == 1 else "wait"
        print(f"retried  {number_of(found.num_waiting, 'row')} {wait} for a run with retry.errors")
    if found.num_live and found.rows_per_s:
        num_left = found.num_rows - found.num_done
        left = f", {duration(num_left / found.rows_per_s)} left" if num_left else ""
        of = number_of(found.num_live, "process")
        print(f"speed    {found.rows_per_s:,.1f} rows/s of {of}{left}")
    elif found.num_live:
        print("speed    not known yet")
    if found.silent and found.num_done < found.num_rows:
        _print_silent(found.silent)
    if found.written_s_ago is not None:
        print(f"written  {duration(found.written_s_ago)} ago")


def _state(found: JobStatus) -> str:
    if found.num_live:
        return f"{found.state} ({number_of(found.num_live, 'process')})"
    return f"{found.state}{': the same command goes on' * (found.state == 'stopped')}"


def _print_silent(silent: Sequence[Silent]) -> None:
    have, say = ("has", "says") if len(silent) == 1 else ("have", "say")
    num = number_of(len(silent), "process")
    print(f"silent   {num}, which {have} not ended and {say} nothing:")
    for worker in silent[:_MAX_SILENT]:
        where = f" on {worker.where}" if worker.where else ""
        print(f"         {worker.name}{where}, for {duration(worker.silent_s)}")
    if len(silent) > _MAX_SILENT:
        print(f"         and {len(silent) - _MAX_SILENT:,} more")


def compact(argv: Sequence[str]) -> ExitCode:
    """`batchvlm compact OUT`."""
    parser = _parser(
        "compact",
        "Merge the parts of a finished job into fewer, larger ones, in the order of the input.",
        "OUT/data is whole at every instant, whatever is killed. The merged parts need room beside "
        "the old ones meanwhile. Resume, retry, verify and status know merged parts.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--target-size",
        type=_size,
        default=_size("256MB"),
        metavar="SIZE",
        help="size of a merged part at most, such as 500MB or 2GB (default: 256MB)",
    )
    size.add_argument("--rows", type=at_least(1), metavar="N", help="rows of a merged part at most")
    args = parser.parse_args(argv)
    from batchvlm.output.compact import compact
    from batchvlm.output.folder import OutputFolder

    folder = OutputFolder(args.out)
    if args.rows is not None:
        done = compact(folder, target_rows=args.rows)
    else:
        done = compact(folder, target_bytes=args.target_size)
    print(f"{number_of(done.num_before, 'part')} -> {done.num_after:,} in {folder.data}")
    return ExitCode.DONE


def _parser(name: str, about: str, more: str) -> Parser:
    parser = Parser(name, about, more)
    parser.add_argument("out", metavar="OUT", help="the folder that output.dir named")
    return parser


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is not None:
        unit = 1024 if match[3] else 1000
        if size := int(float(match[1]) * unit ** _PREFIXES.index(match[2].upper())):
            return size
    raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 2GB")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds

"""Two compute threads beside other work: what idle threads do makes the difference.

    python benchmarks/busy.py --peer FOLDER --rows 16 [--write]

FOLDER is that of `peers.py`. The engine answers the first rows of the work with two threads while
two other processes compute without end. Threads of OpenMP that have nothing to do sleep, or wait
some 20 us for more work and then sleep, as the program sets it, or spin as long as there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import environment, write_section

ANSWER = Path(__file__).with_name("answer.py")
_BUSY = "while True: pass"


_WAYS: dict[str, dict[str, str]] = {
    "sleep (`OMP_WAIT_POLICY=passive`)": {"OMP_WAIT_POLICY": "passive"},
    "wait a little (`GOMP_SPINCOUNT=1000`)": {
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "1000",
    },
    "spin (`OMP_WAIT_POLICY=active`)": {"OMP_WAIT_POLICY": "active"},
}


def run(
    args: argparse.Namespace, variables: dict[str, str], limit_s: float | None
) -> dict[str, Any] | None:
    """Answer the rows once; None where that takes longer than the limit."""
    command = [sys.executable, str(ANSWER), "--model", str(args.peer / "models/m50")]
    command += ["--work", str(args.peer / "work.parquet"), "--rows", str(args.rows)]
    command += ["--threads", "2", "--dtype", args.dtype]
    env = os.environ | variables
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--beside", type=int, default=2, help="processes that compute without end")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    lines = [
        "| idle threads | wall s, median | CPU s, median |",
        "|---|--:|--:|",
    ]
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(args.beside)]
    try:
        limit_s: float | None = None
        for meaning, variables in _WAYS.items():
            runs = [run(args, variables, limit_s) for _ in range(args.repeat)]
            done = [r for r in runs if r is not None]
            if len(done) < len(runs):
                lines.append(f"| {meaning} | more than {limit_s:.0f}, given up | |")
            else:
                wall, cpu = (statistics.median(r[key] for r in done) for key in ("wall_s", "cpu_s"))
                lines.append(f"| {meaning} | {wall:.1f} | {cpu:.1f} |")
                # Loading counts here, and takes as long.
                limit_s = limit_s or 6 * wall + 30
            print(lines[-1], file=sys.stderr)
    finally:
        for other in others:
            other.kill()
            other.wait()
    command = f"python benchmarks/busy.py --peer FOLDER --rows {args.rows} --repeat {args.repeat}"
    busy = f"{os.getloadavg()[1]:.1f} processes running on average over the last five minutes"
    markdown = "\n".join([environment(command), "", f"{args.dtype}; {busy}.", "", *lines])
    print(markdown)
    if args.write:
        write_section("Two threads on a busy machine", markdown)


if __name__ == "__main__":
    main()

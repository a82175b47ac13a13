"""The same work by batchvlm, vLLM, OpenVINO and plain transformers, side by side in one run.

    python benchmarks/peers.py --peer FOLDER --rows 64 --repeat 3 [--write]

FOLDER holds the work and the peers' runners: `models/m50`, `work.parquet`, `run_vllm.py`,
`run_ov.py`, `run_hf.py`, and virtual environments `vllm-venv` and `ov-venv`; a peer whose
environment is not there is left out. Every system runs in a process of its own, one after the other
and round by round; seconds are wall seconds with the model loaded, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from results import environment, write_section

HERE = Path(__file__).parent


@dataclass(frozen=True)
class System:
    """Something that answers the rows."""

    name: str
    command: list[str]
    needs: Path
    """It is left out where this is not there."""
    extra: dict[str, str]
    """Environment variables."""


def systems(args: argparse.Namespace, dtype: str) -> list[System]:
    peer = args.peer
    vllm, openvino = peer / "vllm-venv/bin/python", peer / "ov-venv/bin/python"
    threads, rows = str(args.threads), str(args.rows)
    answer = [
        *(sys.executable, str(HERE / "answer.py"), "--model", str(peer / "models/m50")),
        *("--work", str(peer / "work.parquet"), "--rows", rows, "--dtype", dtype),
    ]
    mine = [*answer, "--threads", threads]
    ranks = [*answer, "--threads", "1", "--processes", threads]
    libraries = [
        Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"),
        peer / "vllm-venv/lib/libiomp5.so",
    ]
    preload = {
        "LD_PRELOAD": ":".join(str(path) for path in libraries if path.exists()),
        "OMP_NUM_THREADS": threads,
    }
    hf = [str(vllm), "run_hf.py", "--n", rows, "--dtype", dtype, "--threads", threads]
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    here = Path(sys.executable)
    as_run = {"GOMP_SPINCOUNT": "1000"}  # as `batchvlm run` sets it
    several = System(f"batchvlm, slots, {threads} processes of one thread", ranks, here, as_run)
    return [
        System("batchvlm, slots", [*mine, "--engine", "slots"], here, as_run),
        *([several] if args.threads > 1 else []),
        System("batchvlm, generate", [*mine, "--engine", "generate"], here, as_run),
        System(
            "vLLM, eager, 32 sequences",
            [
                *(str(vllm), "run_vllm.py", "--n", rows, "--dtype", dtype, "--eager", "1"),
                *("--bind", f"0-{args.threads - 1}" if args.threads > 1 else "0"),
                *("--out", f"o_vllm_{dtype}.json"),
            ],
            vllm,
            preload,
        ),
        System(
            "OpenVINO GenAI, continuous batching, 32",
            [str(openvino), "run_ov.py", "--n", rows, "--prec", precision, "--threads", threads],
            openvino,
            {},
        ),
        System(
            "transformers, sorted by answer, batch 16",
            [*hf, "--mode", "sorted", "--sort", "out", "--bs", "16"],
            vllm,
            {},
        ),
        System("transformers, pipeline, batch 8", [*hf, "--mode", "pipe", "--bs", "8"], vllm, {}),
    ]


def run(system: System, peer: Path) -> dict[str, Any]:
    """Run a system once.

    Returns:
        `wall_s`, `process_cpu_s` (loading included), and what the system tells beyond.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"} | system.extra
    done = subprocess.run(system.command, cwd=peer, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{system.name} failed:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    last = done.stdout.strip().splitlines()[-1]
    if last.startswith("{"):
        return {**json.loads(last), "process_cpu_s": cpu_s}
    found = re.search(r"^rep0 ([\d.]+)s", done.stdout, flags=re.MULTILINE)
    assert found, done.stdout[-2000:]
    return {"wall_s": float(found[1]), "process_cpu_s": cpu_s}


def table(args: argparse.Namespace, dtype: str) -> list[str]:
    """Run every system `args.repeat` times; the lines of a table."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    there = [
        system
        for system in systems(args, dtype)
        if system.needs.exists() and any(word in system.name for word in args.only)
    ]
    for number in range(args.repeat):
        for system in there:
            runs[system.name].append(run(system, args.peer))
            seconds = runs[system.name][-1]["wall_s"]
            print(f"{dtype} round {number + 1}: {system.name} {seconds:.2f} s", file=sys.stderr)
    busy = f"{os.getloadavg()[2]:.1f} processes running on average"
    median = {n: statistics.median(r["wall_s"] for r in several) for n, several in runs.items()}
    base = median["batchvlm, slots"]
    lines = [
        f"**{dtype}**, {_threads(args.threads)}; {busy} over the last quarter of an hour",
        "",
        "| system | wall s, median (range) | over batchvlm's | CPU s of the process |",
        "|---|--:|--:|--:|",
    ]
    for name, several in runs.items():
        walls = [r["wall_s"] for r in several]
        cpu = statistics.median(r["process_cpu_s"] for r in several)
        lines.append(
            f"| {name} | {median[name]:.1f} ({min(walls):.1f} to {max(walls):.1f}) "
            f"| {median[name] / base:.2f} | {cpu:.0f} |"
        )
    mine = min(runs["batchvlm, slots"], key=lambda r: abs(r["wall_s"] - base))
    parts = {key: mine[f"{key}_s"] for key in ("wait", "vision", "prefill", "decode")}
    rest = mine["wall_s"] - sum(parts.values())
    useful = sum(len(ids) for ids in mine["answers"].values())
    lines += [
        "",
        "Where batchvlm's seconds went: "
        + ", ".join(f"{key} {seconds:.1f}" for key, seconds in parts.items())
        + f", the rest {rest:.1f}; preprocessing beside them, in a thread, "
        f"{mine['preprocess_s']:.1f}. {mine['row_steps']} row-steps for {useful} tokens (the first "
        f"of a row comes of its prompt); {mine['padding_share']:.1%} padding in prompts.",
    ]
    theirs = args.peer / f"o_vllm_{dtype}.json"
    if theirs.exists() and dtype == "float32":
        lines.append(tokens_beside(json.loads(theirs.read_text()), mine["answers"], args))
    return [*lines, ""]


def tokens_beside(
    theirs: dict[str, list[int]], mine: dict[str, list[int]], args: argparse.Namespace
) -> str:
    """In how many rows the tokens are vLLM's, there with torchvision and so with other pixels."""
    count = sum(list(ids) == theirs[key] for key, ids in mine.items())
    line = f"Tokens equal to vLLM's in {count} of {len(mine)} rows"
    if find_spec("torchvision") is not None:
        return f"{line}."
    # By vLLM's Python, which has torchvision, with what it lacks from here.
    by_name = {system.name: system for system in systems(args, "float32")}
    ours, python = by_name["batchvlm, slots"], by_name["vLLM, eager, 32 sequences"].needs
    own = [str(HERE.parent), str(HERE)]
    program = (
        "import runpy, sys; "
        f"sys.path[:0] = {own}; sys.path += {[p for p in sys.path if p.endswith('-packages')]}; "
        f"sys.argv = {ours.command[1:]}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [str(python), "-c", program]
    alike = run(System("batchvlm with torchvision", command, python, ours.extra), args.peer)
    count = sum(list(ids) == theirs[key] for key, ids in alike["answers"].items())
    return f"{line}, without torchvision here; with it, as vLLM has it, in {count}."


def _threads(num: int) -> str:
    return f"{num} thread{'s' * (num > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", nargs="+", default=[""], help="systems with a word in the name")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    args.peer = args.peer.resolve()
    lines: list[str] = []
    for dtype in args.dtypes.split(","):
        lines += table(args, dtype)
    command = (
        f"python benchmarks/peers.py --peer FOLDER --rows {args.rows} --repeat {args.repeat} "
        f"--threads {args.threads}"
    )
    markdown = "\n".join([environment(command), "", *lines])
    print(markdown)
    if args.write:
        title = f"Beside other systems, {_threads(args.threads)}"
        write_section(title, markdown)


if __name__ == "__main__":
    main()

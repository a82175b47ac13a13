"""Compiles grammars for another process, under limits: `python -m batchvlm.constraints.worker`.

Reads one JSON line for each form, `[kind, text]`, and writes one: `[constraint, grammar, notes]`.
For a schema without a grammar of llguidance the line is `["xgrammar", schema]`, the first time with
the tokenizer as a third item. The process ends with its input, so it never outlives its parent. It
ignores signals, which its parent handles.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchvlm.constraints.plan import Plan

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

MAX_MEMORY_BYTES = 3 << 30
"""Limit of the process's address space; most forms take a few megabytes."""
MAX_GRAMMAR_CHARS = 1 << 25
"""Limit of a serialized grammar of xgrammar; most have thousands of characters."""
XGRAMMAR = "xgrammar"
"""Stands in place of a form's kind for a schema that xgrammar compiles."""
MAX_CPU_S = 20
"""Limit for one form, in seconds of CPU time, which does not depend on other load."""


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _limit_memory(MAX_MEMORY_BYTES)
    from batchvlm.constraints.plan import make_plan
    from batchvlm.records import Form, FormKind

    tokenizer = ""
    for line in sys.stdin:
        _limit_time()
        kind, text, *rest = json.loads(line)
        if kind == XGRAMMAR:
            tokenizer = rest[0] if rest else tokenizer
            plan = _plan_by_xgrammar(text, tokenizer)
        else:
            plan = make_plan(Form(FormKind(kind), text))
        sys.stdout.write(json.dumps([plan.constraint, plan.grammar, plan.notes]) + "\n")
        sys.stdout.flush()


def _plan_by_xgrammar(schema: str, tokenizer: str) -> Plan:
    if "xgrammar" not in sys.modules:
        # It imports torch, whose libraries add to the address space: with CUDA, gigabytes.
        _limit_memory(None)
        importlib.import_module("xgrammar")
        _limit_memory(MAX_MEMORY_BYTES + _size_bytes())
        _limit_time()
    from batchvlm.constraints.fallback import compile_schema
    from batchvlm.constraints.plan import Plan
    from batchvlm.records import Constraint

    constraint, grammar = Constraint.NONE, None
    try:
        compiled = compile_schema(schema, tokenizer)
    # Any error of its C++ code.
    except Exception as error:
        note = f"xgrammar: {' '.join(str(error).split())[:200]}"
    else:
        if len(compiled) > MAX_GRAMMAR_CHARS:
            note = f"xgrammar: a grammar of {len(compiled) >> 20} MB"
        else:
            constraint, grammar = Constraint.XGRAMMAR, compiled
            note = "left to validation: what xgrammar does not know"
    return Plan(constraint=constraint, grammar=grammar, notes=(note,))


def _size_bytes() -> int:
    """Return the size of this process's address space in bytes; 0 if it is unknown."""
    statm = Path("/proc/self/statm")
    num_pages = int(statm.read_text().split()[0]) if statm.exists() else 0
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def _limit_memory(num_bytes: int | None) -> None:
    """Set the limit of this process's address space; None for the system's hard limit."""
    if resource is not None:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if num_bytes is None or 0 <= most < num_bytes:
            num_bytes = most
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    """Have the kernel end this process if the next form takes too long."""
    if resource is not None:
        until_s = int(time.process_time()) + MAX_CPU_S + 1
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (until_s, most))


if __name__ == "__main__":
    main()

"""Plans grammars for another process, under limits: `python -m batchvlm.constraints.worker`.

Reads one JSON line a form and answers with one. Ends with its input, so it never outlives whoever
started it; signals to the whole process group are that one's to handle.
"""

from __future__ import annotations

import json
import signal
import sys
import time

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

MAX_MEMORY_BYTES = 3 << 30
"""Address space of the process; most forms take a few megabytes."""
MAX_CPU_S = 20
"""Of computing time for one form, in seconds: a busy machine makes none of them hostile."""


def main() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _limit_memory()
    from batchvlm.constraints.plan import make_plan
    from batchvlm.records import Form, FormKind

    for line in sys.stdin:
        kind, text = json.loads(line)
        _limit_time()
        plan = make_plan(Form(FormKind(kind), text))
        sys.stdout.write(json.dumps([plan.constraint, plan.grammar, plan.notes]) + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    """Have the kernel end this process if the next form takes too long."""
    if resource is not None:
        until_s = int(time.process_time()) + MAX_CPU_S + 1
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (until_s, most))


if __name__ == "__main__":
    main()

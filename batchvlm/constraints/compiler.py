"""Compile forms to matchers off the engine's thread: planned in a process, built in a thread."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from batchvlm.constraints.fallback import Fallback, XgrammarMatcher
from batchvlm.constraints.plan import Plan, open_matcher
from batchvlm.constraints.worker import XGRAMMAR
from batchvlm.records import Constraint, Form, FormKind
from batchvlm.words import one_line

log = logging.getLogger(__name__)

MAX_PLAN_S = 180.0
"""Wall-clock limit for planning one form, in seconds, also on slow machines. The worker itself
limits its CPU time."""
_MAX_KEPT = 2048
"""Forms whose compiled grammars are cached."""


class Planner:
    """A worker process that makes plans; replaced after a form took too much time or memory."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._has_tokenizer = False

    def plan(self, form: Form, *, timeout_s: float) -> Plan:
        """Plan one form for llguidance. Never raises on a form."""
        return self._ask([form.kind, form.text], timeout_s)

    def plan_by_xgrammar(self, form: Form, tokenizer: str, *, timeout_s: float) -> Plan:
        """Plan a JSON schema for xgrammar. Never raises on a form.

        Args:
            form: a form for which `plan` found no grammar.
            tokenizer: from `Fallback.tokenizer_text`; the same in every call.
            timeout_s: limit in seconds.
        """
        has_it = self._has_tokenizer and self._process is not None and self._process.poll() is None
        plan = self._ask([XGRAMMAR, form.text, *([] if has_it else [tokenizer])], timeout_s)
        self._has_tokenizer = self._process is not None
        return plan

    def _ask(self, question: Sequence[str], timeout_s: float) -> Plan:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, timeout_s)
        except TimeoutError:
            self.close()
            return _none(f"compiling took longer than {timeout_s:g} s", is_final=True)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            reason = "compiling took too much time or memory, or broke the compiler"
            return _none(reason, is_final=True)
        constraint, grammar, notes = json.loads(line)
        return Plan(constraint=Constraint(constraint), grammar=grammar, notes=tuple(notes))

    def close(self) -> None:
        """Kill the process."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # closing may flush to the dead process
                    pipe.close()
        process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "batchvlm.constraints.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust prints panics there
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        return self._process


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """Read a line of the process's output; an incomplete one if the process ends.

    Raises:
        TimeoutError: no complete line came in time.
    """
    assert process.stdout is not None
    until = time.monotonic() + timeout_s
    pieces: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, until - time.monotonic())):
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 20)
            pieces.append(piece)
            if not piece or piece.endswith(b"\n"):
                return b"".join(pieces)


def _none(*reasons: str, is_final: bool = False) -> Plan:
    return Plan(constraint=Constraint.NONE, grammar=None, notes=reasons, is_final=is_final)


class Compiled:
    """The compiled grammar of a form."""

    def __init__(self, plan: Plan, matcher: Any | None) -> None:
        self.constraint = plan.constraint if matcher is not None else Constraint.NONE
        self.notes = plan.notes
        self.matcher = matcher
        """An `LLMatcher` or `XgrammarMatcher` at its start, to be copied for each row; None if no
        grammar was found."""


class Compiler:
    """Compiles each form once, off the engine's thread.

    Args:
        tokenizer: the model's tokenizer as llguidance's.
        fallback: used for forms for which llguidance has no grammar; None for no fallback.
        num_workers: forms compiled concurrently.
        max_plan_s: limit for planning one form, in seconds.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        fallback: Fallback | None = None,
        num_workers: int = 1,
        max_plan_s: float = MAX_PLAN_S,
    ) -> None:
        self._tokenizer = tokenizer
        self._fallback = fallback
        self._num_workers = num_workers
        self._max_plan_s = max_plan_s
        self._kept: OrderedDict[Form, Future[Compiled]] = OrderedDict()
        self._todo: queue.SimpleQueue[tuple[Form, Future[Compiled]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def compile(self, form: Form) -> Future[Compiled]:
        """Return a future of the form's grammar, from the cache if possible. Not thread-safe."""
        future = self._kept.get(form)
        if future is None:
            future = self._kept[form] = Future()
            self._todo.put((form, future))
            if len(self._threads) < self._num_workers:
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        self._kept.move_to_end(form)
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return future

    def close(self) -> None:
        """End the worker processes; the cache stays."""
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        planner = Planner()
        try:
            while (item := self._todo.get()) is not None:
                form, future = item
                try:
                    future.set_result(self._compile(planner, form))
                # Rows wait for the result: after any error, a Rust panic among others, they
                # continue without a grammar.
                except BaseException as error:
                    log.exception("compiling a form failed")
                    future.set_result(Compiled(_none(type(error).__name__), None))
        finally:
            planner.close()

    def _compile(self, planner: Planner, form: Form) -> Compiled:
        plan = planner.plan(form, timeout_s=self._max_plan_s)
        matcher: Any = None
        if plan.grammar is not None:
            # llguidance releases the GIL here.
            matcher = open_matcher(self._tokenizer, plan.grammar)
            if matcher.is_error():
                reason = one_line(matcher.get_error())
                plan, matcher = _none(f"with this tokenizer: {reason}"), None
        if matcher is None and not plan.is_final and form.kind is FormKind.JSON_SCHEMA:
            plan, matcher = self._compile_by_xgrammar(planner, form, plan)
        if plan.notes:
            log.info("a form is %s: %s", plan.constraint, "; ".join(plan.notes))
        return Compiled(plan, matcher)

    def _compile_by_xgrammar(
        self, planner: Planner, form: Form, plan: Plan
    ) -> tuple[Plan, XgrammarMatcher | None]:
        """Compile by xgrammar; return `plan` and None if xgrammar is not available."""
        if self._fallback is None or (tokenizer := self._fallback.tokenizer_text()) is None:
            return plan, None
        second = planner.plan_by_xgrammar(form, tokenizer, timeout_s=self._max_plan_s)
        second = replace(second, notes=(*plan.notes, *second.notes))
        if second.grammar is None:
            return second, None
        return second, self._fallback.matcher(second.grammar)

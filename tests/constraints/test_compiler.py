"""Compiling beside the engine: once a form, under limits, whatever the form does."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from llguidance import LLTokenizer

from batchvlm.constraints import worker
from batchvlm.constraints.compiler import Compiler, Planner
from batchvlm.records import Constraint, Form, FormKind

CHOICE = Form(FormKind.CHOICE, '["a"]')


@pytest.fixture
def planner() -> Iterator[Planner]:
    one = Planner()
    yield one
    one.close()


def test_a_form_that_takes_too_long_costs_itself(planner: Planner) -> None:
    late = planner.plan(CHOICE, timeout_s=0.0)
    assert late.constraint is Constraint.NONE
    assert "took longer" in late.notes[0]
    assert planner.plan(CHOICE, timeout_s=300.0).constraint is Constraint.STRICT


def test_a_worker_that_dies_is_replaced(planner: Planner) -> None:
    assert planner.plan(CHOICE, timeout_s=300.0).constraint is Constraint.STRICT
    assert planner._process is not None
    planner._process.kill()
    planner._process.wait()
    assert planner.plan(CHOICE, timeout_s=300.0).constraint is Constraint.STRICT


def test_a_worker_may_compute_so_long_and_no_longer() -> None:
    import resource
    import time

    before = resource.getrlimit(resource.RLIMIT_CPU)
    try:
        worker._limit_time()
        until_s, _ = resource.getrlimit(resource.RLIMIT_CPU)
        assert 0 < until_s - time.process_time() <= worker.MAX_CPU_S + 1
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, before)


def test_each_form_is_compiled_once_and_a_broken_one_says_why() -> None:
    compiler = Compiler(LLTokenizer("byte"))
    try:
        futures = [compiler.compile(CHOICE) for _ in range(3)]
        assert len({id(future) for future in futures}) == 1
        assert futures[0].result().constraint is Constraint.STRICT
        nowhere = Form(FormKind.JSON_SCHEMA, json.dumps({"$ref": "#/none"}))
        compiled = compiler.compile(nowhere).result()
        assert (compiled.constraint, compiled.matcher) == (Constraint.NONE, None)
        assert "leads nowhere" in compiled.notes[0]
    finally:
        compiler.close()
    # It starts again when it is needed.
    again = compiler.compile(Form(FormKind.CHOICE, '["b"]'))
    assert again.result().constraint is Constraint.STRICT
    compiler.close()

"""Compiling beside the engine: once a form, under limits, whatever the form does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from llguidance import LLTokenizer

from batchvlm.constraints import worker
from batchvlm.constraints.compiler import Compiler, Planner
from batchvlm.constraints.fallback import Fallback
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
        assert "cannot be resolved" in compiled.notes[0]
    finally:
        compiler.close()
    # It starts again when it is needed.
    again = compiler.compile(Form(FormKind.CHOICE, '["b"]'))
    assert again.result().constraint is Constraint.STRICT
    compiler.close()


# llguidance wants patterns of properties that cannot overlap.
OVERLAPPING = {"type": "object", "patternProperties": {"a": {"type": "integer"}, "^.b": {}}}


@pytest.fixture
def fallback() -> Fallback:
    tokenizer = LLTokenizer("byte")
    ends = [tokenizer.eos_token]
    return Fallback(tokenizer, num_ids=tokenizer.vocab_size, eos_ids=ends, banned_ids=[])


def test_what_llguidance_refuses_comes_to_xgrammar(fallback: Fallback) -> None:
    form = Form(FormKind.JSON_SCHEMA, json.dumps(OVERLAPPING))
    compiler = Compiler(LLTokenizer("byte"), fallback=fallback)
    alone = Compiler(LLTokenizer("byte"))
    try:
        compiled = compiler.compile(form).result()
        assert compiled.constraint is Constraint.XGRAMMAR
        assert "not disjoint" in compiled.notes[0] and "xgrammar" in compiled.notes[-1]
        for text, is_taken in ((b'{"a":1}', True), (b'{"a":true}', False), (b"[", False)):
            matcher = compiled.matcher.deep_copy()
            assert all(map(matcher.consume_token, text)) == is_taken
        nowhere = Form(FormKind.JSON_SCHEMA, json.dumps({"$ref": "#/none"}))
        refused = compiler.compile(nowhere).result()
        assert (refused.constraint, refused.matcher) == (Constraint.NONE, None)
        assert refused.notes[-1].startswith("xgrammar: ")
        assert alone.compile(form).result().constraint is Constraint.NONE
    finally:
        compiler.close()
        alone.close()


@pytest.mark.soak
def test_xgrammar_compiles_under_the_same_limits(planner: Planner, fallback: Fallback) -> None:
    tokenizer = fallback.tokenizer_text()
    assert tokenizer is not None
    form = Form(FormKind.JSON_SCHEMA, json.dumps(OVERLAPPING))
    plan = planner.plan_by_xgrammar(form, tokenizer, timeout_s=300.0)
    assert plan.constraint is Constraint.XGRAMMAR
    assert planner._process is not None
    limits = Path(f"/proc/{planner._process.pid}/limits").read_text().splitlines()
    (memory,) = (line for line in limits if line.startswith("Max address space"))
    statm = Path(f"/proc/{planner._process.pid}/statm").read_text().split()
    allowed = int(memory.split()[3])
    # So much, beyond what its libraries take: torch's are among them.
    assert allowed <= int(statm[0]) * os.sysconf("SC_PAGE_SIZE") + worker.MAX_MEMORY_BYTES
    # It has no limit of its own for this one.
    keys = {f"key-{i:05d}": {"type": "string"} for i in range(20_000)}
    hostile = Form(FormKind.JSON_SCHEMA, json.dumps({"type": "object", "properties": keys}))
    plan = planner.plan_by_xgrammar(hostile, tokenizer, timeout_s=300.0)
    assert plan.constraint is Constraint.NONE
    assert planner.plan(CHOICE, timeout_s=300.0).constraint is Constraint.STRICT
    plan = planner.plan_by_xgrammar(form, tokenizer, timeout_s=300.0)
    assert plan.constraint is Constraint.XGRAMMAR


def test_a_worker_that_dies_is_told_the_tokenizer_again(
    planner: Planner, fallback: Fallback
) -> None:
    tokenizer = fallback.tokenizer_text()
    assert tokenizer is not None
    form = Form(FormKind.JSON_SCHEMA, json.dumps(OVERLAPPING))
    for _ in range(2):
        plan = planner.plan_by_xgrammar(form, tokenizer, timeout_s=300.0)
        assert plan.constraint is Constraint.XGRAMMAR
        assert planner._process is not None
        planner._process.kill()
        planner._process.wait()


def test_a_form_that_breaks_the_process_is_not_tried_again(fallback: Fallback) -> None:
    compiler = Compiler(LLTokenizer("byte"), fallback=fallback, max_plan_s=0.0)
    try:
        compiled = compiler.compile(Form(FormKind.JSON_SCHEMA, json.dumps(OVERLAPPING))).result()
    finally:
        compiler.close()
    assert compiled.constraint is Constraint.NONE
    assert len(compiled.notes) == 1 and "took longer" in compiled.notes[0]


def test_a_mask_that_takes_too_long_ends_the_grammar(
    fallback: Fallback, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = fallback.tokenizer_text()
    assert tokenizer is not None
    form = Form(FormKind.JSON_SCHEMA, json.dumps(OVERLAPPING))
    plan = planner.plan_by_xgrammar(form, tokenizer, timeout_s=300.0)
    assert plan.grammar is not None
    matcher = fallback.matcher(plan.grammar)
    matcher.mask()
    assert not matcher.is_error()
    monkeypatch.setattr("batchvlm.constraints.fallback._MAX_MASK_S", -1.0)
    matcher.mask()
    assert matcher.is_error()

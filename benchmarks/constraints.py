"""How many real-world schemas answers can be held to, by drawing tokens at random from the masks.

    python benchmarks/constraints.py SCHEMAS.jsonl [--limit 60] [--seeds 3] [--write]
        [--systems batchvlm llguidance xgrammar outlines_core] [--sample outlines_core=60]

Each line of the input is `{"id", "subset", "schema", "tests": [{"valid", "data"}]}`, as in
JSONSchemaBench and MaskBench. A token drawn evenly among the allowed ones is the hardest test of a
mask: a model would never say most of what it lets pass. Each schema is tried in another process,
under limits of time and memory. xgrammar and outlines_core are driven through outlines.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pebble import ProcessPool

from batchvlm.constraints.plan import Plan, byte_matcher, make_plan
from batchvlm.forms import schemas
from batchvlm.forms.schemas import why_invalid
from batchvlm.records import Constraint, Form, FormKind

if __package__ in (None, ""):
    sys.path[:0] = map(str, Path(__file__).parents[:2])
from results import environment, write_section
from systems import SYSTEMS, tokenizer_at

from tests.constraints.instances import accepts

MAX_TOKENS = 1024
TIMEOUT_S = 60.0
MAX_MEMORY_BYTES = 6 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of one schema under one system."""

    kind: str
    """`valid`: every finished answer; `invalid`: at least one was not; `cap`: none finished;
    `rejected`: there is no grammar; `timeout`, `crash`."""
    constraint: str = ""
    compile_s: float = 0.0
    mask_us: float = 0.0
    num_finished: int = 0
    num_tokens: int = 0
    num_forced: int = 0
    """Tokens that were the only ones allowed."""
    num_cut: int = 0
    """Draws that did not end."""


def train_tokenizer(path: Path, vocab_size: int, documents: Sequence[str]) -> None:
    """A byte-level BPE over the schemas, and what every Python has: its library's sources.

    Models have seen much JSON: their tokenizers have tokens for a quote with what follows it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts][:900]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        max_token_length=64,  # what schemas repeat would become tokens of hundreds of bytes
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = (file.read_text("utf-8", "replace") for file in files)
    core.train_from_iterator(chain(documents, sources), trainer)
    core.save(str(path))


def try_schema(system: str, path: str, schema: str, seeds: int) -> Outcome:
    """Draw answers to one schema."""
    start = time.perf_counter()
    begin, constraint = SYSTEMS[system](path, schema)
    compile_s = time.perf_counter() - start
    if begin is None:
        return Outcome("rejected", constraint, compile_s)
    tokenizer = tokenizer_at(path)
    eos_id = tokenizer.eos_token_id
    kinds = set()
    num_finished = num_tokens = num_forced = num_cut = 0
    mask_s = 0.0
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        allowed, commit = begin()
        ids: list[int] = []
        while len(ids) < MAX_TOKENS:
            before = time.perf_counter()
            choices = allowed()
            mask_s += time.perf_counter() - before
            num_tokens += 1
            num_forced += len(choices) == 1
            if not len(choices):
                kinds.add("invalid")  # it has led into a place from which nothing leads on
                break
            token = int(draw.choice(choices))
            if token == eos_id:
                num_finished += 1
                text = tokenizer.decode(ids, skip_special_tokens=False)
                kinds.add("valid" if is_valid(text, schema) else "invalid")
                break
            ids.append(token)
            if not commit(token):
                kinds.add("invalid")
                break
        else:
            num_cut += 1
    kind = "invalid" if "invalid" in kinds else "valid" if kinds else "cap"
    mask_us = 1e6 * mask_s / max(1, num_tokens)
    return Outcome(
        kind, constraint, compile_s, mask_us, num_finished, num_tokens, num_forced, num_cut
    )


def is_valid(text: str, schema: str) -> bool:
    """Whether an answer is JSON that fits."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return why_invalid(value, schema) is None


def try_instances(
    schema: str, tests: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[bool, bool]]]:
    """How far the schema can be held to, and of each instance: is it valid, does the grammar take
    it, written compactly."""
    plan: Plan = make_plan(Form(FormKind.JSON_SCHEMA, schema))
    if plan.grammar is None:
        return plan.constraint.value, []
    first = byte_matcher(plan.grammar)
    judged = [(t["valid"], accepts(first, t["data"], json.loads(schema))) for t in tests]
    return plan.constraint.value, judged


def limited() -> None:
    import resource

    # A busy machine makes no valid answer invalid.
    schemas.MAX_CHECK_S = TIMEOUT_S

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def run_all(calls: Sequence[tuple[Any, ...]], function: Any, *, workers: int) -> list[Any]:
    """The result of each call, or the name of what ended it."""
    results: list[Any] = []
    with ProcessPool(max_workers=workers, initializer=limited) as pool:
        futures = [pool.schedule(function, args=call, timeout=TIMEOUT_S) for call in calls]
        for future in futures:
            try:
                results.append(future.result())
            except TimeoutError:
                results.append("timeout")
            except Exception:  # it ran out of memory, or died
                results.append("crash")
    return results


Found = Mapping[str, Sequence[tuple[str, str, Outcome]]]
"""By system: subset, id and outcome of each schema that it was tried with."""

KINDS = {
    "valid": "all finished valid",
    "cap": "none finished",
    "invalid": "some invalid",
    "rejected": "no grammar",
    "timeout": "too long",
    "crash": "died",
}


def by_system(found: Found) -> str:
    """What became of the schemas, a line a system, and the share that is held to, both ways."""
    lines = [
        f"| system | schemas | {' | '.join(KINDS.values())} | valid | valid or none finished |"
    ]
    lines.append(f"|---|{'--:|' * (len(KINDS) + 3)}")
    for system, outcomes in found.items():
        counts = Counter(outcome.kind for _, _, outcome in outcomes)
        total = len(outcomes)
        cells = " | ".join(str(counts[kind]) for kind in KINDS)
        shares = [counts["valid"] / total, (counts["valid"] + counts["cap"]) / total]
        lines.append(f"| {system} | {total} | {cells} | {shares[0]:.1%} | {shares[1]:.1%} |")
    return "\n".join(lines)


def by_subset(found: Found) -> str:
    """Valid schemas and those of which no answer ended, of each subset under each system."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for system, outcomes in found.items():
        for subset, _, outcome in outcomes:
            counts[subset, system][outcome.kind] += 1
    heads = " | ".join(f"{system} | cap" for system in found)
    lines = [f"| subset | schemas | {heads} |", f"|---|--:{'|--:' * 2 * len(found)}|"]
    for subset in sorted({subset for subset, _ in counts}):
        totals = [counts[subset, system].total() for system in found]
        cells = []
        for system, total in zip(found, totals, strict=True):
            count = counts[subset, system]
            of = "" if total == totals[0] else f" of {total}"
            cells.append(f"{count['valid']}{of} | {count['cap']}")
        lines.append(f"| {subset} | {totals[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def words_about(mine: Sequence[Outcome]) -> str:
    """What else there is to say of our own outcomes."""
    constraints = Counter(outcome.constraint for outcome in mine if outcome.constraint)
    invalid = Counter(outcome.constraint for outcome in mine if outcome.kind == "invalid")
    said = ", ".join(
        f"{constraints[c.value]} {c.value} ({invalid[c.value]} with an invalid answer)"
        for c in Constraint
        if constraints[c.value]
    )
    times = sorted(o.compile_s for o in mine if o.compile_s)
    tokens = sum(o.num_tokens for o in mine)
    num_drawn = sum(o.num_finished + o.num_cut for o in mine)
    return (
        f"batchvlm: {said}. {sum(o.num_cut for o in mine):,} of {num_drawn:,} answers did not end. "
        f"Compile, median / 95% / longest: {1e3 * times[len(times) // 2]:.0f} / "
        f"{1e3 * times[int(0.95 * len(times))]:.0f} / {1e3 * times[-1]:.0f} ms. "
        f"A mask, alone: {np.mean([o.mask_us for o in mine if o.mask_us]):.0f} us on the "
        f"mean. {sum(o.num_forced for o in mine) / max(1, tokens):.0%} of {tokens:,} tokens "
        "were the only ones allowed."
    )


def instances_table(rows: Sequence[Mapping[str, Any]], results: Sequence[Any]) -> str:
    """Instances taken by our grammars, strict and lenient apart."""
    judged: dict[str, Counter[tuple[bool, bool]]] = defaultdict(Counter)
    wrong = []
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, str):
            wrong.append(f"{row['id']} ({result})")
            continue
        constraint, instances = result
        judged[constraint].update(instances)
        if constraint == Constraint.STRICT and any(valid != taken for valid, taken in instances):
            wrong.append(row["id"])
    lines = ["| grammar | valid | of them accepted | invalid | of them rejected |"]
    lines.append("|---|--:|--:|--:|--:|")
    for constraint, count in judged.items():
        num_valid = count[True, True] + count[True, False]
        num_invalid = count[False, True] + count[False, False]
        if num_valid + num_invalid:
            good = f"{count[True, True]} ({count[True, True] / max(1, num_valid):.1%})"
            bad = f"{count[False, False]} ({count[False, False] / max(1, num_invalid):.1%})"
            lines.append(f"| {constraint} | {num_valid} | {good} | {num_invalid} | {bad} |")
    return "\n".join(lines) + (f"\n\nStrict and wrong: {', '.join(wrong)}." if wrong else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--limit", type=int, help="take every n-th schema, so many in all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=["batchvlm", "llguidance"])
    parser.add_argument(
        "--sample", nargs="*", default=[], metavar="SYSTEM=N", help="every n-th schema, N in all"
    )
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.schemas.read_text(encoding="utf-8").splitlines()]
    rows = every_nth(rows, args.limit)
    samples = {name: int(num) for name, _, num in (text.partition("=") for text in args.sample)}
    path = Path(tempfile.gettempdir()) / f"batchvlm-bpe-{args.vocab}.json"
    if not path.exists():
        documents = [json.dumps(row) for row in rows]
        compact = [json.dumps(row, separators=(",", ":")) for row in rows]
        train_tokenizer(path, args.vocab, documents + compact)
    parts = [
        f"{len(rows)} schemas of JSONSchemaBench, {args.seeds} draws each, {MAX_TOKENS:,} tokens "
        f"at most, {TIMEOUT_S:.0f} s and {MAX_MEMORY_BYTES >> 30} GiB a schema; `valid`: every "
        "answer that ended was; `cap`: none ended. The machine was shared by others: times are "
        "long, counts are not touched by that."
    ]
    for name, num in samples.items():
        parts[0] += f" {name} tried every {len(rows) // num}th schema: it takes seconds for each."
    calls = [(json.dumps(r["schema"]), r["tests"]) for r in rows]
    results = run_all(calls, try_instances, workers=args.workers)
    parts.append(f"**Instances of MaskBench**\n\n{instances_table(rows, results)}")
    print(parts[-1], flush=True)
    for name, where in (("the demo model's", "demo"), (f"a {args.vocab:,} BPE", str(path))):
        found: dict[str, list[tuple[str, str, Outcome]]] = {}
        for system in args.systems:
            tried = every_nth(rows, samples.get(system))
            calls = [(system, where, json.dumps(r["schema"]), args.seeds) for r in tried]
            found[system] = []
            for row, result in zip(
                tried, run_all(calls, try_schema, workers=args.workers), strict=True
            ):
                outcome = result if isinstance(result, Outcome) else Outcome(result)
                found[system].append((row["subset"], row["id"], outcome))
                if system == "batchvlm" and outcome.kind != "valid":
                    print(row["id"], outcome, file=sys.stderr)
            print(by_system(found), flush=True)
        parts.append(f"**Tokenizer: {name}**\n\n{by_system(found)}\n\n{by_subset(found)}")
        if "batchvlm" in found:
            parts.append(words_about([outcome for _, _, outcome in found["batchvlm"]]))
    if args.write:
        command = f"python benchmarks/constraints.py {args.schemas.name} --seeds {args.seeds}"
        command += f" --systems {' '.join(args.systems)}"
        command += f" --sample {' '.join(args.sample)}" if args.sample else ""
        body = "\n\n".join(parts)
        packages = ("llguidance", "xgrammar", "outlines", "outlines_core")
        write_section("Schemas held to", f"{environment(command, packages)}\n\n{body}")


def every_nth(rows: Sequence[Any], num: int | None) -> Sequence[Any]:
    """So many of the rows, at equal distances; None: all."""
    return rows if num is None else rows[:: max(1, len(rows) // num)][:num]


if __name__ == "__main__":
    main()

"""How many real-world schemas answers can be held to, by drawing tokens at random from the masks.

    python benchmarks/constraints.py SCHEMAS.jsonl [--limit 60] [--seeds 3] [--write]

Each line of the input is `{"id", "subset", "schema", "tests": [{"valid", "data"}]}`, as in
JSONSchemaBench and MaskBench. A token drawn evenly among the allowed ones is the hardest test of a
mask: a model would never say most of what it lets pass. Each schema is tried in a process of its
own, under limits of time and memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pebble import ProcessPool

from batchvlm import schemas
from batchvlm.constraints.instances import accepts
from batchvlm.constraints.plan import Plan, byte_matcher, make_plan
from batchvlm.records import Constraint, Form, FormKind
from batchvlm.schemas import why_invalid

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent))
from results import environment, write_section

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


@cache
def tokenizer_at(path: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    if path == "demo":
        from batchvlm.demo.model import build_processor

        return build_processor().tokenizer
    return PreTrainedTokenizerFast(tokenizer_file=path, eos_token="</s>")


@cache
def engine_tokenizer(path: str) -> Any:
    from llguidance import hf

    return hf.from_tokenizer(tokenizer_at(path))


Step = tuple[Callable[[], np.ndarray[Any, Any]], Callable[[int], bool]]


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
    num_finished = num_tokens = num_forced = 0
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
    kind = "invalid" if "invalid" in kinds else "valid" if kinds else "cap"
    mask_us = 1e6 * mask_s / max(1, num_tokens)
    return Outcome(kind, constraint, compile_s, mask_us, num_finished, num_tokens, num_forced)


def is_valid(text: str, schema: str) -> bool:
    """Whether an answer is JSON that fits."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return why_invalid(value, schema) is None


def by_llguidance(path: str, grammar: str) -> Callable[[], Step] | None:
    from llguidance import LLMatcher

    tokenizer = engine_tokenizer(path)
    first = LLMatcher(tokenizer, grammar, log_level=0)
    if first.is_error():
        return None

    def begin() -> Step:
        matcher = first.deep_copy()

        def allowed() -> np.ndarray[Any, Any]:
            mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(mask, bitorder="little")[: tokenizer.vocab_size]
            return np.flatnonzero(bits)

        return allowed, matcher.consume_token

    return begin


def ours(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
    plan = make_plan(Form(FormKind.JSON_SCHEMA, schema))
    if plan.grammar is None:
        return None, plan.constraint.value
    return by_llguidance(path, plan.grammar), plan.constraint.value


def llguidance_alone(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    return by_llguidance(path, grammar), "strict"


def _by_outlines(backend: str) -> Callable[[str, str], tuple[Callable[[], Step] | None, str]]:
    """Through outlines' own interface: a processor for one static batch."""

    def open_system(path: str, schema: str) -> tuple[Callable[[], Step] | None, str]:
        import torch
        from outlines.backends import get_json_schema_logits_processor
        from outlines.models.transformers import Transformers

        tokenizer = tokenizer_at(path)
        model = _ModelOf(tokenizer)
        outer = Transformers(model, tokenizer)  # type: ignore[arg-type]
        try:
            processor = get_json_schema_logits_processor(backend, outer, schema)
        except Exception:  # whatever it refuses a schema with
            return None, backend

        def begin() -> Step:
            processor.reset()
            ids: list[int] = []

            def allowed() -> np.ndarray[Any, Any]:
                logits = torch.zeros(1, len(tokenizer))
                context = torch.tensor([[0, *ids]])
                out = processor.process_logits(context, logits)
                return np.flatnonzero(torch.isfinite(out[0]).numpy())

            def commit(token: int) -> bool:
                ids.append(token)
                return True

            return allowed, commit

        return begin, backend

    return open_system


class _ModelOf:
    """As much of a transformers model as outlines looks at."""

    def __init__(self, tokenizer: Any) -> None:
        from types import SimpleNamespace

        self.config = SimpleNamespace(
            is_encoder_decoder=False, vocab_size=len(tokenizer), eos_token_id=0
        )
        self.device = "cpu"
        self.dtype = None


SYSTEMS: Mapping[str, Callable[[str, str], tuple[Callable[[], Step] | None, str]]] = {
    "batchvlm": ours,
    "llguidance": llguidance_alone,
    "outlines_core": _by_outlines("outlines_core"),
    "xgrammar": _by_outlines("xgrammar"),
}


def try_instances(schema: str, tests: Sequence[Mapping[str, Any]]) -> list[tuple[bool, bool]]:
    """Of each instance whether it is valid and whether the strict grammar takes it."""
    plan: Plan = make_plan(Form(FormKind.JSON_SCHEMA, schema))
    if plan.constraint is not Constraint.STRICT or plan.grammar is None:
        return []
    first = byte_matcher(plan.grammar)
    return [(t["valid"], accepts(first, t["data"], json.loads(schema))) for t in tests]


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


def table(rows: Iterable[tuple[str, str, Outcome]], systems: Sequence[str]) -> str:
    """Valid schemas of all, by subset and system."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for subset, system, outcome in rows:
        counts[subset, system][outcome.kind] += 1
        counts["all", system][outcome.kind] += 1
    subsets = [*sorted({subset for subset, _ in counts} - {"all"}), "all"]
    lines = [f"| subset | n | {' | '.join(systems)} |", f"|---|--:{'|--:' * len(systems)}|"]
    for subset in subsets:
        total = counts[subset, systems[0]].total()
        cells = []
        for system in systems:
            count = counts[subset, system]
            rest = [f"{n} {k}" for k, n in sorted(count.items()) if k != "valid"]
            cells.append(f"{count['valid']} ({', '.join(rest)})" if rest else str(count["valid"]))
        lines.append(f"| {subset} | {total} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--limit", type=int, help="take every n-th schema, so many in all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=["batchvlm", "llguidance"])
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.schemas.read_text(encoding="utf-8").splitlines()]
    if args.limit:
        rows = rows[:: max(1, len(rows) // args.limit)][: args.limit]
    path = Path(tempfile.gettempdir()) / f"batchvlm-bpe-{args.vocab}.json"
    if not path.exists():
        documents = [json.dumps(row) for row in rows]
        compact = [json.dumps(row, separators=(",", ":")) for row in rows]
        train_tokenizer(path, args.vocab, documents + compact)
    parts = []
    for name, where in (("the demo model's", "demo"), (f"a {args.vocab:,} BPE", str(path))):
        found: list[tuple[str, str, Outcome]] = []
        for system in args.systems:
            calls = [(system, where, json.dumps(r["schema"]), args.seeds) for r in rows]
            for row, result in zip(
                rows, run_all(calls, try_schema, workers=args.workers), strict=True
            ):
                outcome = result if isinstance(result, Outcome) else Outcome(result)
                found.append((row["subset"], system, outcome))
                if system == "batchvlm" and outcome.kind != "valid":
                    print(row["id"], outcome, file=sys.stderr)
        mine = [o for _, system, o in found if system == "batchvlm"]
        strict = [o for o in mine if o.constraint == "strict"]
        times = sorted(o.compile_s for o in mine if o.compile_s)
        tokens = sum(o.num_tokens for o in mine)
        parts.append(
            f"**Tokenizer: {name}**\n\n{table(found, args.systems)}\n\n"
            f"batchvlm: {len(strict)} schemas strict, "
            f"{sum(o.kind == 'invalid' for o in strict)} of them with an invalid answer; "
            f"{sum(o.constraint == 'lenient' for o in mine)} lenient. Compile, median / 95% / "
            f"longest: {1e3 * times[len(times) // 2]:.0f} / "
            f"{1e3 * times[int(0.95 * len(times))]:.0f} / {1e3 * times[-1]:.0f} ms. "
            f"A mask, alone: {np.mean([o.mask_us for o in mine if o.mask_us]):.0f} us on the "
            f"mean. {sum(o.num_forced for o in mine) / max(1, tokens):.0%} of {tokens:,} tokens "
            "were the only ones allowed."
        )
        print(parts[-1], flush=True)
    calls = [(json.dumps(r["schema"]), r["tests"]) for r in rows]
    judged: Counter[tuple[bool, bool]] = Counter()
    for result in run_all(calls, try_instances, workers=args.workers):
        if isinstance(result, list):
            judged.update(result)
    parts.append(
        f"**Instances, strict mode**: {judged[True, True]} of "
        f"{judged[True, True] + judged[True, False]} valid ones accepted, {judged[False, False]} "
        f"of {judged[False, False] + judged[False, True]} invalid ones rejected."
    )
    print(parts[-1])
    if args.write:
        command = f"python benchmarks/constraints.py {args.schemas.name} --seeds {args.seeds}"
        body = "\n\n".join(parts)
        write_section("Schemas held to", f"{environment(command)}\n\n{body}")


if __name__ == "__main__":
    main()

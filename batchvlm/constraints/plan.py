"""Find a grammar of llguidance for a form, by the first way that works: strict, lenient, none.

Runs in a separate process with limits of time and memory, so that a hostile schema harms only
itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from batchvlm.constraints.limits import leave_out_refused
from batchvlm.constraints.merge import MergeError, open_references
from batchvlm.constraints.rewrite import Rewriter, UnsupportedSchemaError
from batchvlm.constraints.strings import WORDS, translate
from batchvlm.records import Constraint, Form, FormKind
from batchvlm.words import described, one_line

# One optional space where people and models write one. With any white space allowed, a model can
# generate white space up to its token limit.
_COMPACT = {
    "whitespace_flexible": False,
    "item_separator": ",[ ]?",
    "key_separator": ":[ ]?",
}
# Two and five times llguidance's defaults, with which objects of more than 500 optional properties,
# or open ones of 200, fail at their first key. A mask of such a row takes up to 50 ms.
_LIMITS = LLParserLimits(max_items_in_row=4_000, step_max_items=100_000, step_lexer_fuel=1_000_000)
_APPROXIMATE = {"lenient": True, "coerce_one_of": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a form will be enforced."""

    constraint: Constraint
    grammar: str | None
    """Text for llguidance or xgrammar; None if there is no grammar."""
    notes: tuple[str, ...] = ()
    """Reasons why the form is not enforced more strictly, one line each."""
    is_final: bool = False
    """Whether planning was killed, so that nothing else must be tried."""


class _NoGrammarError(ValueError):
    """llguidance refuses a grammar; the message says why."""


def make_plan(form: Form) -> Plan:
    """Find the strictest grammar that enforces a form. Never raises on a form."""
    notes = []
    for constraint, name, write in _ways(form):
        try:
            grammar, left_out = write()
            if left_out:
                notes.append(f"left to validation: {', '.join(sorted(left_out))}")
            return Plan(constraint=constraint, grammar=grammar, notes=tuple(notes))
        except (UnsupportedSchemaError, MergeError, _NoGrammarError) as error:
            notes.append(f"{name}: {one_line(error)}")
        # An unforeseen schema must only fail its own rows.
        except (RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
            notes.append(f"{name}: {described(error)}")
    return Plan(constraint=Constraint.NONE, grammar=None, notes=tuple(notes))


Written = tuple[str, set[str]]


def _ways(form: Form) -> Iterator[tuple[Constraint, str, Callable[[], Written]]]:
    match form.kind:
        case FormKind.CHOICE:
            yield Constraint.STRICT, "choice", lambda: (_checked(choice_grammar(form.text)), set())
        case FormKind.REGEX:
            yield Constraint.STRICT, "regex", lambda: (_checked(_regex_grammar(form.text)), set())
        case FormKind.GRAMMAR:
            lark = LLMatcher.grammar_from_lark(form.text)
            yield Constraint.STRICT, "grammar", lambda: (_checked(lark), set())
        case FormKind.JSON_SCHEMA:
            schema = json.loads(form.text)
            strict, lenient = Constraint.STRICT, Constraint.LENIENT
            yield strict, "strict", lambda: _of_schema(schema, is_lenient=False, splits=False)
            if '"oneOf"' in form.text:
                yield strict, "strict", lambda: _of_schema(schema, is_lenient=False, splits=True)
                yield lenient, "lenient", lambda: _of_schema(schema, is_lenient=True, splits=True)
            yield lenient, "lenient", lambda: _of_schema(schema, is_lenient=True, splits=False)
            yield lenient, "as it is", lambda: (_json_grammar(schema, **_APPROXIMATE), {"more"})


def _of_schema(schema: Any, *, is_lenient: bool, splits: bool) -> Written:
    rewriter = Rewriter(schema, is_lenient=is_lenient, splits_one_of=splits)
    rewritten = rewriter.rewrite()
    if not is_lenient:
        return _opened(rewritten), set()
    try:
        return _opened(rewritten, **_APPROXIMATE), rewriter.left_out
    except _NoGrammarError:
        refused = leave_out_refused(rewritten, _is_refused)
        if not refused:
            raise
        return _opened(rewritten, **_APPROXIMATE), rewriter.left_out | refused


def _opened(schema: Any, **options: Any) -> str:
    try:
        return _json_grammar(schema, **options)
    except _NoGrammarError as error:
        if "circular" not in str(error):
            raise
        return _json_grammar(open_references(schema), **options)


def _is_refused(schema: Any) -> bool:
    try:
        _json_grammar(schema, **_APPROXIMATE)
    except _NoGrammarError:
        return True
    return False


def _json_grammar(schema: Any, **options: Any) -> str:
    # Options in the schema itself would override these.
    schema = {k: v for k, v in schema.items() if k != "x-guidance"} if schema is not True else {}
    text = LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        overrides={**_COMPACT, **options},  # type: ignore[arg-type]
    )
    return _checked(text)


def choice_grammar(text: str) -> str:
    """Return a grammar for the texts in a JSON list."""
    choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)]
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(choices)}\n")


def _regex_grammar(pattern: str) -> str:
    translated = translate(pattern, WORDS)
    if translated is None:
        raise _NoGrammarError("the pattern looks around or refers to a group")
    # Anchors are redundant because the whole answer must match.
    body = translated.removeprefix("^")
    if body.endswith("$") and not body.endswith(r"\$"):
        body = body[:-1]
    return LLMatcher.grammar_from_regex(f"(?:{body})")


def fits(form: Form, text: str) -> bool:
    """Whether the grammar of a form accepts a text; False if the form has no grammar."""
    grammar = _grammar_of(form)
    if grammar is None:
        return False
    matcher = byte_matcher(grammar)
    tokens = list(text.encode("utf-8", "surrogatepass"))
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@lru_cache(maxsize=64)
def _grammar_of(form: Form) -> str | None:
    return make_plan(form).grammar


_tokenizer: LLTokenizer | None = None


def byte_matcher(grammar: str) -> LLMatcher:
    """Return a matcher of a grammar over bytes, which needs no tokenizer."""
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = LLTokenizer("byte")
    return open_matcher(_tokenizer, grammar)


def open_matcher(tokenizer: Any, grammar: str) -> LLMatcher:
    """Return a matcher at the start of a grammar; `is_error` tells whether it is valid.

    Args:
        tokenizer: a tokenizer of llguidance.
        grammar: from a plan.
    """
    return LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)


def _checked(grammar: str) -> str:
    matcher = byte_matcher(grammar)
    if matcher.is_error():
        raise _NoGrammarError(matcher.get_error().split("\n\n")[0])
    # Some errors only show when the first mask is computed.
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _NoGrammarError(matcher.get_error().split("\n\n")[0])
    return grammar

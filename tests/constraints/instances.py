"""Check whether a grammar accepts a JSON value in some order of its keys.

A grammar fixes the order of an object's keys, which JSON does not: declared keys come first, in the
order of the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_MAX_STEPS = 4000
_MAX_ORDERS = 8


def accepts(matcher: Any, value: Any, schema: Any) -> bool:
    """Whether a grammar accepts a value in some order of its keys.

    Args:
        matcher: an `LLMatcher` over bytes, at its start; not changed.
        value: any JSON value.
        schema: the schema of the grammar, which gives the orders to try first.
    """
    search = _Search(schema)
    if (end := search.first_after(matcher, value)) is not None and end.is_accepting():
        return True
    search = _Search(schema)
    return any(end.is_accepting() for end in search.after(matcher, value))


class _Search:
    def __init__(self, schema: Any) -> None:
        self._listed: list[list[str]] = []
        self._note(schema)
        self._num_steps = 0

    def _note(self, schema: Any) -> None:
        """Collect every list of properties in a schema."""
        if isinstance(schema, dict):
            if isinstance(schema.get("properties"), dict):
                self._listed.append(list(schema["properties"]))
            for part in schema.values():
                self._note(part)
        elif isinstance(schema, list):
            for part in schema:
                self._note(part)

    def first_after(self, matcher: Any, value: Any) -> Any | None:
        """Return the matcher after the value, using for each object the first order that works.

        There is no backtracking, so objects with many keys are fast.
        """
        self._num_steps += 1
        if isinstance(value, dict) and value:
            for ordered in self._orders(value):
                if self._num_steps > _MAX_STEPS:
                    return None
                if (end := self._take(matcher, ordered)) is not None:
                    return end
            return None
        if not isinstance(value, list) or not value:
            return _consume(matcher, json.dumps(value, ensure_ascii=False))
        for place, item in enumerate(value):
            if (lead := _consume(matcher, "," if place else "[")) is None:
                return None
            if (matcher := self.first_after(lead, item)) is None:
                return None
        return _consume(matcher, "]")

    def _take(self, matcher: Any, members: dict[str, Any]) -> Any | None:
        """Return the matcher after an object with its members in this order; None if refused."""
        for place, (name, value) in enumerate(members.items()):
            key = f"{',' if place else '{'}{json.dumps(name, ensure_ascii=False)}:"
            if (lead := _consume(matcher, key)) is None:
                return None
            if (matcher := self.first_after(lead, value)) is None:
                return None
        return _consume(matcher, "}")

    def _orders(self, value: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield an object in the orders of the most similar property lists, and in its own."""
        lists = sorted(self._listed, key=lambda names: len(names) - 2 * len(value.keys() & names))
        seen: set[tuple[str, ...]] = set()
        for names in [*lists[:_MAX_ORDERS], list(value)]:
            places = {name: place for place, name in enumerate(names)}
            ordered = sorted(value, key=lambda name: places.get(name, len(places)))
            if (key := tuple(ordered)) not in seen:
                seen.add(key)
                yield {name: value[name] for name in ordered}

    def after(self, matcher: Any, value: Any) -> Iterator[Any]:
        """Yield the matcher after the value for each order that works."""
        self._num_steps += 1
        if isinstance(value, dict) and value:
            yield from self._members(matcher, value, self._in_order(value), "{")
        elif isinstance(value, list) and value:
            yield from self._items(matcher, value, 0)
        elif (end := _consume(matcher, json.dumps(value, ensure_ascii=False))) is not None:
            yield end

    def _in_order(self, value: dict[str, Any]) -> list[str]:
        """Return an object's names in the order of the most similar property list."""
        nearest = max(
            self._listed, key=lambda names: 2 * len(value.keys() & names) - len(names), default=[]
        )
        places = {name: place for place, name in enumerate(nearest)}
        return sorted(value, key=lambda name: places.get(name, len(places)))

    def _members(
        self, matcher: Any, value: dict[str, Any], names: list[str], lead: str
    ) -> Iterator[Any]:
        if not names:
            if (end := _consume(matcher, "}")) is not None:
                yield end
            return
        for name in names:
            if self._num_steps > _MAX_STEPS:
                return
            key = _consume(matcher, f"{lead}{json.dumps(name, ensure_ascii=False)}:")
            if key is None:
                continue
            rest = [other for other in names if other != name]
            for end in self.after(key, value[name]):
                yield from self._members(end, value, rest, ",")

    def _items(self, matcher: Any, items: list[Any], place: int) -> Iterator[Any]:
        if place == len(items):
            if (end := _consume(matcher, "]")) is not None:
                yield end
            return
        lead = _consume(matcher, "," if place else "[")
        if lead is not None:
            for end in self.after(lead, items[place]):
                yield from self._items(end, items, place + 1)


def _consume(matcher: Any, text: str) -> Any | None:
    """Return a copy of the matcher after a text; None if the grammar refuses the text."""
    tokens = list(text.encode("utf-8", "surrogatepass"))
    end = matcher.deep_copy()
    return end if end.try_consume_tokens(tokens) == len(tokens) else None

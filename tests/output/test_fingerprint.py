from __future__ import annotations

import json
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvlm.output.fingerprint import differences, fingerprint

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
mappings = st.dictionaries(st.text(string.ascii_lowercase, min_size=1), json_values, max_size=4)


def test_a_known_digest_does_not_change_between_releases() -> None:
    identity = {"task": {"prompt": "Décris ☃"}, "model": {"revision": None}, "seed": 0}
    assert fingerprint(identity) == "b0ec02fb273aeebc"


@given(mappings)
def test_order_of_keys_does_not_matter(identity: dict[str, object]) -> None:
    backwards = dict(reversed(identity.items()))
    assert fingerprint(identity) == fingerprint(backwards)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(identity))


@given(mappings, mappings)
def test_there_are_differences_exactly_where_the_digests_differ(
    old: dict[str, object], new: dict[str, object]
) -> None:
    lines = differences(old, new)
    assert bool(lines) == (fingerprint(old) != fingerprint(new))
    assert all(" -> " in line and "\n" not in line for line in lines)
    assert not differences(old, json.loads(json.dumps(old)))


def test_unknown_types_are_refused() -> None:
    with pytest.raises(TypeError):
        fingerprint({"path": object()})


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, ["a.b: 'x' -> 'y'"]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}, ["a: 1 -> 2", "b: 2 -> 1"]),
        ({"a": 1}, {"a": 1.0}, ["a: 1 -> 1.0"]),
        ({"a": None}, {}, ["a: null -> absent"]),
        ({"a": None}, {"a": 3}, ["a: null -> 3"]),
        ({"a": True}, {"a": [False, None]}, ["a: true -> [false, null]"]),
        ({}, {"a": {"b": 0}}, ['a: absent -> {"b": 0}']),
        ({"a": [1]}, {"a": [1, 2, 3]}, ["a: 1 item -> 3 items"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1]: 2 -> 3"]),
        ({"a": (1, 2)}, {"a": [1, 2]}, []),
        (
            {"files": [{"name": "a", "rows": 1}, {"name": "b", "rows": 1}, 5]},
            {"files": [{"name": "a", "rows": 2}, {"name": "c", "rows": 1}, 5]},
            ["files[0].rows: 1 -> 2 (and 1 more of 3 items)"],
        ),
        ({"a": "it is"}, {"a": "it's"}, ["a: 'it is' -> 'it\\'s'"]),
        ({"a": "one\ntwo"}, {"a": "\ud800"}, ["a: 'one\\ntwo' -> '\\ud800'"]),
        ({"a": float("nan")}, {"a": float("nan")}, []),
    ],
)
def test_lines(old: dict[str, object], new: dict[str, object], lines: list[str]) -> None:
    assert differences(old, new) == lines


@pytest.mark.parametrize("place", [0, 30, 2_000, 3_999])
def test_long_values_are_shortened_around_the_difference(place: int) -> None:
    old = "".join(string.ascii_lowercase[i % 26] for i in range(4_000))
    (line,) = differences({"p": old}, {"p": f"{old[:place]}HERE{old[place:]}"})
    assert "HERE" in line
    assert len(line) < 200


def test_a_long_value_that_only_grew_shows_what_was_added() -> None:
    (line,) = differences({"p": "x" * 500}, {"p": "x" * 500 + " and more"})
    assert "and more" in line
    assert len(line) < 200

"""Log lines for programs."""

from __future__ import annotations

import json
import logging
import sys

from batchvlm.runtime.logs import DATA, JsonFormatter


def line_of(message: str, *args: object, **kwargs: object) -> dict[str, object]:
    logger = logging.Logger("batchvlm.somewhere")
    record = logger.makeRecord(
        logger.name, logging.WARNING, "f", 1, message, args, kwargs.pop("exc_info", None),  # type: ignore[arg-type]
        extra=kwargs,
    )  # fmt: skip
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    return found


def test_a_line_is_an_object() -> None:
    found = line_of('%d rows\n"quoted" é', 3)
    assert str(found.pop("time")).endswith("+00:00")
    assert found == {
        "level": "warning",
        "logger": "batchvlm.somewhere",
        "message": '3 rows\n"quoted" é',
    }


def test_numbers_and_errors_go_with_it() -> None:
    assert line_of("x", **{DATA: {"rows": 3, "left_s": 1.5}})["left_s"] == 1.5
    try:
        raise ValueError("told to")
    except ValueError:
        assert "ValueError: told to" in str(line_of("x", exc_info=sys.exc_info())["exception"])

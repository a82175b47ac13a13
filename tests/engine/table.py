"""The families that are tested, as a page: `python -m tests.engine.table > docs/models.md`."""

from __future__ import annotations

from .families import FAMILIES, REFUSED, Family

HEAD = """\
# Models

Made by `python -m tests.engine.table` from what `tests/engine` asserts of each family with tiny
random models in float32: every row of mixed batches (one image or several of other sizes, text
alone where that is allowed) is answered token by token as transformers' `generate()` answers it
alone, by `generate()` in batches and, where the table says so, over slots. All families below take
several images in a prompt.

`engine=auto` chooses as the table says, and the log says so. Families that are not listed run by
`generate()`; `engine=slots` tries slots, and the canary ends the run before the first row where the
two differ. With transformers 5.17 all families run by `generate()`: their models take no image
features from outside.

"""

COLUMNS = ("Family", "Class in transformers", "Engine", "Text alone", "Shared beginnings", "Needs")


def page() -> str:
    """The whole page."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(cells(family) for family in FAMILIES)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    refused = "".join(f"- {reason}.\n" for reason in REFUSED.values())
    return f"{HEAD}{table}\nRefused before the first row:\n\n{refused}"


def cells(family: Family) -> tuple[str, ...]:
    """A family's line in the table."""
    engine = "slots"
    if family.why_not_slots:
        pace = ", row by row" if family.is_alone else ""
        engine = f"`generate()`{pace}: {family.why_not_slots}"
    is_sharing = not family.why_not_slots and not family.sees_ahead
    needs = [f"`{name}`" for name in family.needs]
    if any(family.needs_torchvision_before):
        needs.append(f"`torchvision` before transformers {dotted(family.needs_torchvision_before)}")
    if family.since > (5, 17):
        needs.append(f"transformers {dotted(family.since)}")
    return (
        family.title,
        f"`{family.model_class}`",
        engine,
        "yes" if family.takes_text_alone else "no",
        "yes" if is_sharing else "no",
        ", ".join(needs),
    )


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    print(page(), end="")

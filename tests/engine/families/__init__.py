"""Tiny random models with full processors, one for each family that the engines must get right.

A family is a function that returns (model, processor). What stands above it is asserted by the
tests, and `docs/models.md` is made of it.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest

from .family import REGISTERED, SLOTS_SINCE, VERSION, Family

__all__ = ["FAMILIES", "VERSION", "Family", "needs_slots"]

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")

FAMILIES = tuple(sorted(REGISTERED, key=lambda family: family.name))

needs_slots = pytest.mark.skipif(
    VERSION < SLOTS_SINCE, reason="no images over slots before transformers 5.18"
)

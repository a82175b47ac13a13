"""What stands at the function that builds a family's tiny model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers

from batchvlm.model.loading import has_torchvision

from ..tiny import Built

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
SLOTS_SINCE = (5, 18)
"""The version of transformers from which on models take image features from outside."""

HYBRID = "it has layers of hybrid, hybrid_sliding"
INDEXED = "it has layers of indexed_attention"
INDEXED_AND_LINEAR = "it has layers of indexed_attention, linear_attention"
NO_FEATURES = "it gives no image features of its own"
LINEAR = "it has layers of linear_attention"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, and what it makes of the test's pictures."""

    build: Callable[[], Built]
    title: str = ""
    """What people call it."""
    model_class: str = ""
    image_tokens: tuple[int, int, int]
    """Image tokens of a picture of 90 x 60 pixels, one of 70 x 150, and of two in one prompt, of
    48 x 48 and 130 x 100."""
    takes_text_alone: bool = True
    """Whether prompts without an image are allowed."""
    takes_several: bool = True
    """Whether prompts with several images are allowed; without one, they are not either."""
    answers_apart: bool = False
    """Whether the answer stands alone and not behind the prompt: an encoder-decoder."""
    sees_ahead: bool = False
    """Whether image tokens attend to later ones: no prompt is cut, none shares a beginning."""
    has_pages: bool = False
    """Whether its processor takes lists of images within a list as the pages of one document."""
    is_cut: bool = True
    """Whether a prompt with images may be computed in pieces."""
    attention: str | None = "sdpa"
    """What its preset asks for; None if transformers allows that in its decoder alone."""
    why_not_slots: str = ""
    """Why `engine=auto` gives it to `generate()`, as `why_not_slots` says it."""
    is_alone: bool = False
    """Whether `generate()` takes its rows one by one."""
    needs: tuple[str, ...] = ()
    """Modules without which its processor does not load."""
    needs_torchvision_before: tuple[int, int] = (0, 0)
    """The version of transformers from which on it does without."""
    since: tuple[int, int] = (5, 17)
    """The version of transformers that brought it, or the first whose processor does what is asked
    of it here."""

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def why_not_slots_here(self) -> str:
        """`why_not_slots` with the transformers that is here."""
        is_of_layers = self.why_not_slots.startswith("it has layers")
        if VERSION >= SLOTS_SINCE or (self.why_not_slots and not is_of_layers):
            return self.why_not_slots
        return f"it takes no image features from outside in transformers {transformers.__version__}"

    @property
    def missing(self) -> list[str]:
        """What it needs and is not here."""
        needs = [*self.needs]
        if self.needs_torchvision_before > VERSION:
            needs.append("torchvision")
        missing = [name for name in needs if not _has(name)]
        if self.since > VERSION:
            missing.append(f"transformers {'.'.join(map(str, self.since))}")
        return missing


def _has(module: str) -> bool:
    if module == "torchvision":
        return has_torchvision()
    return importlib.util.find_spec(module) is not None


REGISTERED: list[Family] = []
"""The families of all modules that were imported."""


def family(**fields: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register the family whose tiny model a function builds.

    Args:
        fields: those of `Family`, but `build`.
    """

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        REGISTERED.append(Family(build=build, **fields))
        return build

    return register

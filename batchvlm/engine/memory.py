"""How much goes through the model at once: sized from free memory, lowered where it fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from batchvlm.config import EngineConfig

log = logging.getLogger(__name__)

_MAX_SLOTS = {"cpu": 64, "cuda": 512}
_PACK_TOKENS = {"cpu": 1024, "cuda": 16_384}
"""Prompt tokens in one pack. Past these, a pack is no more efficient: it only takes memory."""
_VISION_CELLS = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Numbers in the pixel arrays of one batch of images."""
_CACHE_SHARE = 0.6
"""Share of the free memory that keys and values may take; the rest is for activations, for image
features, and for prompts that wait for a slot."""


_TRY_AGAIN_STEPS = 256
"""Memory may have been short for a moment, by somebody else's doing."""
_UNLIMITED = 1 << 62
_SCORED_LOGITS = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Logits in one forward over choices, all of which are looked at."""
_SCORED_TOKENS = 4096
"""Tokens there: each may attend to every other."""


class MemoryPlan:
    """Limits of slots, packs and image batches.

    Args:
        cfg: a limit that is not null counts as it is.
        device: where the model is, its weights loaded.
        taken_bytes: what is still to come there before keys and values do.
    """

    def __init__(self, cfg: EngineConfig, device: torch.device, *, taken_bytes: int = 0) -> None:
        kind = "cuda" if device.type == "cuda" else "cpu"
        self.max_slots = cfg.max_slots or _MAX_SLOTS[kind]
        """Rows decoded at once."""
        self.max_step_rows = self.max_slots
        """Rows in one forward of a decode step."""
        self._num_good_steps = 0
        self.pack_tokens = cfg.max_prefill_tokens or _PACK_TOKENS[kind]
        """Prompt tokens in one forward."""
        self._scored_logits = _SCORED_LOGITS[kind]
        self._scored_tokens = min(_SCORED_TOKENS, self.pack_tokens)
        self.vision_cells = _VISION_CELLS[kind]
        """Numbers in the pixel arrays of one forward of the image encoder."""
        self._cache_bytes = int(
            cfg.memory_fraction * _CACHE_SHARE * max(0, free_bytes(device) - taken_bytes)
        )

    def count_good_step(self) -> None:
        """Note a decode step that went well: after many of them, more rows are tried again."""
        if self.max_step_rows < self.max_slots:
            self._num_good_steps += 1
            if self._num_good_steps >= _TRY_AGAIN_STEPS:
                self._num_good_steps = 0
                self.max_step_rows = min(2 * self.max_step_rows, self.max_slots)

    def num_slots(self, bytes_per_token: int, length: int) -> int:
        """Slots of `length` tokens that there is memory for; one at least."""
        return max(1, min(self.max_slots, self._cache_bytes // (bytes_per_token * length)))

    def lower_cache(self, num_bytes: int) -> None:
        """Remember that there was no memory for keys and values of this many bytes."""
        self._cache_bytes = min(self._cache_bytes, num_bytes // 2)

    def lower_step(self, num_rows: int) -> None:
        """Remember that there was no memory to decode more than this many rows at once."""
        self.max_step_rows = max(1, min(self.max_step_rows, num_rows))
        self._num_good_steps = 0

    def lower_pack(self, num_tokens: int) -> None:
        """Remember that there was no memory for a pack of this many prompt tokens."""
        self.pack_tokens = max(1, min(self.pack_tokens, num_tokens // 2))
        log.warning("no memory for %d prompt tokens at once; %d", num_tokens, self.pack_tokens)

    def num_scored(self, vocab_size: int) -> int:
        """Tokens of choices in one forward; two at least."""
        return max(2, min(self._scored_tokens, self._scored_logits // vocab_size))

    def lower_scored(self, num_tokens: int) -> None:
        """Remember that there was no memory to score this many tokens at once."""
        self._scored_tokens = max(2, min(self._scored_tokens, num_tokens // 2))

    def lower_vision(self, num_cells: int) -> None:
        """Remember that there was no memory for images of this many numbers."""
        self.vision_cells = max(1, min(self.vision_cells, num_cells // 2))


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on a device may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and does not use is there for it too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_bytes(), _group_bytes())


def _available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _group_bytes() -> int:
    """What the limits of this process's control groups leave; without any, a very large number."""
    return min((_left(*files) for files in _group_files()), default=_UNLIMITED)


def _group_files() -> Iterator[tuple[Path, Path, Path]]:
    """Limit, usage and details of each group that this process is in, from its own upwards."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        # v2 has one tree for all kinds, v1 one for each.
        root = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
        limit, used = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        own = PurePosixPath(name.lstrip("/"))
        # Within a container the name may be that outside of it: then its root is what there is.
        for group in dict.fromkeys((own, *own.parents, PurePosixPath())):
            folder = root / group
            yield folder / f"memory.{limit}", folder / f"memory.{used}", folder / "memory.stat"


def _left(limit: Path, used: Path, stat: Path) -> int:
    try:
        most, now, details = (f.read_text(encoding="ascii").strip() for f in (limit, used, stat))
    except OSError:
        return _UNLIMITED
    if most == "max":
        return _UNLIMITED
    counts = dict(line.split() for line in details.splitlines())
    # Files that were read fill the cache and go when memory is asked for.
    return max(0, int(most) - int(now) + int(counts.get("inactive_file", 0)))

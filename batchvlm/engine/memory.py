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
"""Steps that go well before a lowered limit rises: memory may have been short for a moment."""
_TRY_AGAIN_PACKS = 32
"""Packs likewise, which take longer."""
_UNLIMITED = 1 << 62
_SCORED_LOGITS = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Logits in one forward over choices, all of which are looked at."""
_SCORED_TOKENS = 4096
"""Tokens there: each may attend to every other."""


class Ceiling:
    """A limit that is lowered where memory was short, and doubled after some successes.

    Where the doubled limit fails too, the next doubling takes twice as many successes.

    Args:
        most: the limit at first, and the highest that it rises to.
        try_again: successes before it is doubled.
        least: the lowest that it falls to.
    """

    def __init__(self, most: int, *, try_again: int, least: int = 1) -> None:
        self.now = self._most = most
        self._least = least
        self._try_again = try_again
        self._num_good = 0
        self._is_tried_again = False

    def lower(self, limit: int) -> None:
        """Remember that there was no memory for more than this."""
        if self._is_tried_again:
            self._try_again *= 2
        self._is_tried_again = False
        self._num_good = 0
        self.now = max(self._least, min(self.now, limit))

    def count_good(self) -> None:
        """Note one that went well."""
        if self.now >= self._most:
            return
        self._num_good += 1
        if self._num_good >= self._try_again:
            self._num_good = 0
            self._is_tried_again = True
            self.now = min(2 * self.now, self._most)


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
        self._step_rows = Ceiling(self.max_slots, try_again=_TRY_AGAIN_STEPS)
        pack_tokens = cfg.max_prefill_tokens or _PACK_TOKENS[kind]
        self._pack_tokens = Ceiling(pack_tokens, try_again=_TRY_AGAIN_PACKS)
        self.pieces = Ceiling(pack_tokens, try_again=_TRY_AGAIN_PACKS)
        """Tokens of pieces of one long prompt: they attend to all that lies before, so what is too
        much for them is not too much for a pack."""
        self._scored_logits = _SCORED_LOGITS[kind]
        scored_tokens = min(_SCORED_TOKENS, pack_tokens)
        self._scored_tokens = Ceiling(scored_tokens, least=2, try_again=_TRY_AGAIN_STEPS)
        self._vision_cells = Ceiling(_VISION_CELLS[kind], try_again=_TRY_AGAIN_PACKS)
        share = cfg.memory_fraction * _CACHE_SHARE
        num_bytes = int(share * max(0, free_bytes(device) - taken_bytes))
        self._cache_bytes = Ceiling(num_bytes, try_again=_TRY_AGAIN_STEPS)

    @property
    def max_step_rows(self) -> int:
        """Rows in one forward of a decode step."""
        return self._step_rows.now

    @property
    def pack_tokens(self) -> int:
        """Prompt tokens in one forward."""
        return self._pack_tokens.now

    @property
    def piece_tokens(self) -> int:
        """Tokens of one prompt in one forward."""
        return min(self.pieces.now, self.pack_tokens)

    @property
    def vision_cells(self) -> int:
        """Numbers in the pixel arrays of one forward of the image encoder."""
        return self._vision_cells.now

    def count_good_step(self) -> None:
        """Note a decode step that went well."""
        self._step_rows.count_good()
        self._cache_bytes.count_good()

    def count_good_pack(self) -> None:
        """Note a pack of prompts that went well."""
        self._pack_tokens.count_good()
        self.pieces.count_good()

    def count_good_images(self) -> None:
        """Note a batch of images that went well."""
        self._vision_cells.count_good()

    def count_good_scored(self) -> None:
        """Note a pack of choices that went well."""
        self._scored_tokens.count_good()

    def num_slots(self, bytes_per_token: int, length: int) -> int:
        """Slots of `length` tokens that there is memory for; one at least."""
        return max(1, min(self.max_slots, self._cache_bytes.now // (bytes_per_token * length)))

    def lower_cache(self, num_bytes: int) -> None:
        """Remember that there was no memory for keys and values of this many bytes."""
        self._cache_bytes.lower(num_bytes // 2)

    def lower_step(self, num_rows: int) -> None:
        """Remember that there was no memory to decode more than this many rows at once."""
        self._step_rows.lower(num_rows)

    def lower_pack(self, num_tokens: int) -> None:
        """Remember that there was no memory for a pack of this many prompt tokens."""
        self._pack_tokens.lower(num_tokens // 2)
        log.warning("no memory for %d prompt tokens at once; %d", num_tokens, self.pack_tokens)

    def num_scored(self, vocab_size: int) -> int:
        """Tokens of choices in one forward; two at least."""
        return max(2, min(self._scored_tokens.now, self._scored_logits // vocab_size))

    def lower_scored(self, num_tokens: int) -> None:
        """Remember that there was no memory to score this many tokens at once."""
        self._scored_tokens.lower(num_tokens // 2)

    def lower_vision(self, num_cells: int) -> None:
        """Remember that there was no memory for images of this many numbers."""
        self._vision_cells.lower(num_cells // 2)


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

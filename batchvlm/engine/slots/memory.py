"""Limits on what one forward computes: sized from free memory, lowered when memory runs out."""

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
"""Prompt tokens in one pack. A larger pack is no more efficient and takes more memory."""
_VISION_CELLS = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Elements of the pixel arrays of one batch of images."""
_CACHE_SHARE = 0.6
"""Share of the free memory that the slots may take. The rest is for activations, image features,
and the keys and values of prompts that wait for a slot."""

_TRY_AGAIN_STEPS = 256
"""Successful steps before a lowered limit is raised: memory may have been short for a moment."""
_TRY_AGAIN_PACKS = 32
"""The same in packs, which take longer than steps."""
_UNLIMITED = 1 << 62
_SCORED_LOGITS = {"cpu": 32 << 20, "cuda": 256 << 20}
"""Logits in one forward over choices, which needs those of every token."""
_SCORED_TOKENS = 4096
"""Tokens in one forward over choices. Their mask grows with the square of this number."""


class Ceiling:
    """A limit that is lowered when memory is short, and doubled after a number of successes.

    If the doubled limit fails too, the next doubling takes twice as many successes.

    Args:
        most: the initial and highest value.
        try_again: successes before the limit is doubled.
    """

    def __init__(self, most: int, *, try_again: int) -> None:
        self.now = self._most = most
        self._try_again = try_again
        self._num_good = 0
        self._is_tried_again = False

    def lower(self, limit: int) -> None:
        """Lower the limit to `limit`, at least 1, because there was no memory for more."""
        if self._is_tried_again:
            self._try_again *= 2
        self._is_tried_again = False
        self._num_good = 0
        self.now = max(1, min(self.now, limit))

    def count_good(self) -> None:
        """Count a success."""
        if self.now >= self._most:
            return
        self._num_good += 1
        if self._num_good >= self._try_again:
            self._num_good = 0
            self._is_tried_again = True
            self.now = min(2 * self.now, self._most)


class MemoryPlan:
    """Limits on slots, packs, scored choices and image batches.

    Args:
        cfg: settings; a limit that is not null is used as it is.
        device: the model's device.
        taken_bytes: memory still to be allocated before the slots, such as weights not yet loaded.
    """

    def __init__(self, cfg: EngineConfig, device: torch.device, *, taken_bytes: int = 0) -> None:
        kind = "cuda" if device.type == "cuda" else "cpu"
        self.max_slots = cfg.max_slots or _MAX_SLOTS[kind]
        """Rows decoded at once."""
        self._step_rows = Ceiling(self.max_slots, try_again=_TRY_AGAIN_STEPS)
        pack_tokens = cfg.max_prefill_tokens or _PACK_TOKENS[kind]
        self._pack_tokens = Ceiling(pack_tokens, try_again=_TRY_AGAIN_PACKS)
        self.pieces = Ceiling(pack_tokens, try_again=_TRY_AGAIN_PACKS)
        """Tokens of a piece of one long prompt. It attends to all earlier tokens, so it may run out
        of memory where a pack of the same length does not."""
        self._scored_logits = _SCORED_LOGITS[kind]
        scored_tokens = min(_SCORED_TOKENS, pack_tokens)
        self._scored_tokens = Ceiling(scored_tokens, try_again=_TRY_AGAIN_STEPS)
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
        """Elements of the pixel arrays in one forward of the image encoder."""
        return self._vision_cells.now

    def count_good_step(self) -> None:
        """Count a decode step that succeeded."""
        self._step_rows.count_good()
        self._cache_bytes.count_good()

    def count_good_pack(self) -> None:
        """Count a pack of prompts that succeeded."""
        self._pack_tokens.count_good()
        self.pieces.count_good()

    def count_good_images(self) -> None:
        """Count a batch of images that succeeded."""
        self._vision_cells.count_good()

    def count_good_scored(self) -> None:
        """Count a pack of choices that succeeded."""
        self._scored_tokens.count_good()

    def num_slots(self, bytes_per_token: int, length: int) -> int:
        """The number of slots of `length` tokens that fit into memory, at least 1."""
        return max(1, min(self.max_slots, self._cache_bytes.now // (bytes_per_token * length)))

    def lower_cache(self, num_bytes: int) -> None:
        """Lower the limit to half of this many bytes of slots, for which there was no memory."""
        self._cache_bytes.lower(num_bytes // 2)

    def lower_step(self, num_rows: int) -> None:
        """Decode at most this many rows in one forward: there was no memory for more."""
        self._step_rows.lower(num_rows)

    def lower_pack(self, num_tokens: int) -> None:
        """Lower the limit to half of this many prompt tokens, for which there was no memory."""
        self._pack_tokens.lower(num_tokens // 2)
        log.warning(
            "no memory for %d prompt tokens at once; the limit is now %d",
            num_tokens,
            self.pack_tokens,
        )

    def num_scored(self, vocab_size: int) -> int:
        """Tokens of choices in one forward, at least 2."""
        return max(2, min(self._scored_tokens.now, self._scored_logits // vocab_size))

    def lower_scored(self, num_tokens: int) -> None:
        """Lower the limit to half of this many scored tokens, for which there was no memory."""
        self._scored_tokens.lower(num_tokens // 2)

    def lower_vision(self, num_cells: int) -> None:
        """Lower the limit to half of this many pixel elements, for which there was no memory."""
        self._vision_cells.lower(num_cells // 2)


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on a device may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Memory that torch has reserved and does not use is free to new tensors too.
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
    """Bytes left by the limits of this process's cgroups; a very large number if there are none."""
    return min((_left(*files) for files in _group_files()), default=_UNLIMITED)


def _group_files() -> Iterator[tuple[Path, Path, Path]]:
    """Yield the limit, usage and statistics files of this process's cgroup and of its parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, kinds, name = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        # cgroup v2 has one tree for all controllers, v1 one for each.
        root = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
        limit, used = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        own = PurePosixPath(name.lstrip("/"))
        # Within a container the name may be the one outside it; then only the root exists.
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
    # The cache of files read earlier counts as used, but is reclaimed on demand.
    return max(0, int(most) - int(now) + int(counts.get("inactive_file", 0)))

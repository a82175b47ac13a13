"""The input behind sampled rows: the prompt that was asked, and thumbnails of its images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import features

from batchvlm.config import JobConfig
from batchvlm.errors import BatchvlmError, RowError
from batchvlm.identity import input_identity
from batchvlm.images import load_image
from batchvlm.output.run_file import RunFile
from batchvlm.prompts import PromptBuilder
from batchvlm.records import ImageRef, Record, Shard
from batchvlm.report.redact import redact
from batchvlm.sources import Source, open_source

_THUMBNAIL_PIXELS = 224
"""Longest side: sharp on a dense screen at half the size."""
_MAX_THUMBNAILS = 4
"""Of one row."""
_MAX_PIXELS = (2 * _THUMBNAIL_PIXELS) ** 2
"""A large JPEG is decoded at about this size, for a fraction of the work."""
_CHUNK_ROWS = 64
_FORMAT = "WEBP" if features.check("webp") else "JPEG"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What one row asked."""

    prompt: str | None = None
    thumbnails: Sequence[str] = ()
    """`data:` URIs."""
    num_images: int = 0
    note: str = ""
    """Why something is missing; one line."""


@dataclass(frozen=True)
class Inputs:
    """The input of a run, where it is still there.

    Args:
        path: takes the place of `data.path`.
    """

    run: RunFile
    cfg: JobConfig
    problem: str = ""
    """Why the input cannot be shown; one line."""
    _source: Source | None = None
    _prompts: PromptBuilder | None = field(default=None)

    def read(self, rows: Sequence[int], *, with_images: Sequence[bool]) -> Iterator[Asked]:
        """What each of the rows asked, in the same order.

        Args:
            rows: row indices, ascending.
            with_images: of each row, whether its images may be opened.
        """
        if self._source is None or self._prompts is None:
            yield from (Asked(note=self.problem) for _ in rows)
            return
        with ThreadPoolExecutor(4) as threads:
            # A chunk's images are in memory at once, and no more.
            for start in range(0, len(rows), _CHUNK_ROWS):
                records = [self._record(row) for row in rows[start : start + _CHUNK_ROWS]]
                wanted = with_images[start : start + _CHUNK_ROWS]
                yield from threads.map(self._ask, records, wanted)

    def _record(self, row: int) -> Record | str:
        """The input's row, or why there is none."""
        assert self._source is not None and self._prompts is not None
        shard = _shard_of(self.run.plan, row)
        # A shard of one row: neighbours in a file are found by reading on.
        alone = replace(
            shard,
            first_row=shard.first_row + row - shard.first_row_index,
            num_rows=1,
            first_row_index=row,
        )
        try:
            return next(iter(self._source.read_shard(alone, list(self._prompts.needed_columns()))))
        except Exception as error:  # each format and file system raises errors of its own
            return f"the input row cannot be read: {type(error).__name__}"

    def _ask(self, record: Record | str, is_wanted: bool) -> Asked:
        assert self._source is not None and self._prompts is not None
        if isinstance(record, str):
            return Asked(note=record)
        if record.failure is not None:
            return Asked(note=redact(record.failure.message))
        try:
            messages, images = self._prompts.whole(record)
        except RowError as error:
            return Asked(note=redact(error.message))
        thumbnails, note = [], ""
        if not is_wanted:
            note = "images are not opened again: preparing the row failed in the run"
        for ref in images[:_MAX_THUMBNAILS] if is_wanted else ():
            if ref.url is not None:
                note = "images are not fetched from addresses"
                continue
            try:
                thumbnails.append(self._thumbnail(ref))
            except RowError as error:
                note = redact(error.message)
        return Asked(
            prompt=_text_of(messages),
            thumbnails=thumbnails,
            num_images=len(images),
            note=note,
        )

    def _thumbnail(self, ref: ImageRef) -> str:
        assert self._source is not None
        image = load_image(
            ref,
            image_root=self._source.image_root,
            max_source_pixels=self.cfg.data.max_source_pixels,
            max_pixels=_MAX_PIXELS,
            max_image_bytes=self.cfg.data.max_image_bytes,
        )
        image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        file = io.BytesIO()
        image.save(file, _FORMAT, quality=70, method=2)
        text = base64.b64encode(file.getvalue()).decode("ascii")
        return f"data:image/{_FORMAT.lower()};base64,{text}"


def open_inputs(run: RunFile, cfg: JobConfig, *, path: str | None = None) -> Inputs:
    """Open the input that a run has read. Never fails: an `Inputs` says what is the matter.

    Args:
        path: where the input is now; None: where it was.
    """
    if path is not None:
        cfg = replace(cfg, data=replace(cfg.data, path=path))
    try:
        source = open_source(cfg.data)
        prompts = PromptBuilder(task=cfg.task, columns=cfg.data.columns, generation=cfg.generation)
        found = input_identity(source.files(list(prompts.needed_columns())))
    except BatchvlmError as error:
        return Inputs(run, cfg, f"the input is not there any more: {redact(error.message)}")
    except Exception as error:  # each file system raises errors of its own
        return Inputs(run, cfg, f"the input cannot be opened: {type(error).__name__}")
    if found != run.identity.get("input"):
        return Inputs(run, cfg, f"{redact(cfg.data.path)} is not what the run has read any more")
    return Inputs(run, cfg, _source=source, _prompts=prompts)


def _shard_of(plan: Sequence[Shard], row: int) -> Shard:
    low, high = 0, len(plan)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if plan[middle].first_row_index <= row else (low, middle)
    return plan[low]


def _text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages as text, image slots in brackets; roles where there are several."""
    parts: list[str] = []
    num_images = 0
    for message in messages:
        texts = []
        for item in message["content"]:
            num_images += item["type"] == "image"
            texts.append(f"[image {num_images}]" if item["type"] == "image" else item["text"])
        said = "\n".join(texts)
        parts.append(f"{message['role']}: {said}" if len(messages) > 1 else said)
    return "\n\n".join(parts)

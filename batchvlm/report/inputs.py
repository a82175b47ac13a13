"""Read sampled rows of the input again: their prompts and thumbnails of their images."""

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
from batchvlm.output.run_file import RunFile
from batchvlm.preprocess.images import load_image
from batchvlm.prompts.builder import PromptBuilder
from batchvlm.records import ImageRef, Record, shard_of
from batchvlm.report.redact import redact
from batchvlm.sources import Source, open_source

_THUMBNAIL_PIXELS = 224
"""Longest side of a thumbnail, which is shown at half the size to be sharp on dense screens."""
_MAX_THUMBNAILS = 4
"""Most thumbnails of one row."""
_MAX_PIXELS = (2 * _THUMBNAIL_PIXELS) ** 2
"""Large JPEGs are decoded at about this size, which is much faster."""
_CHUNK_ROWS = 64
_FORMAT = "WEBP" if features.check("webp") else "JPEG"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The prompt and images of one row."""

    prompt: str | None = None
    thumbnails: Sequence[str] = ()
    """`data:` URIs."""
    num_images: int = 0
    note: str = ""
    """Why something is missing, in one line; "" if nothing is."""


@dataclass(frozen=True)
class Inputs:
    """The input of a run, if it can still be read."""

    run: RunFile
    cfg: JobConfig
    problem: str = ""
    """Why the input cannot be shown, in one line; "" if it can."""
    _source: Source | None = None
    _prompts: PromptBuilder | None = field(default=None)

    def read(self, rows: Sequence[int], *, with_images: Sequence[bool]) -> Iterator[Asked]:
        """Yield the prompt and images of each row, in the same order.

        Args:
            rows: row indices, ascending.
            with_images: for each row, whether its images may be opened.
        """
        if self._source is None or self._prompts is None:
            yield from (Asked(note=self.problem) for _ in rows)
            return
        with ThreadPoolExecutor(4) as threads:
            # Only the images of one chunk are in memory at once.
            for start in range(0, len(rows), _CHUNK_ROWS):
                records = [self._record(row) for row in rows[start : start + _CHUNK_ROWS]]
                wanted = with_images[start : start + _CHUNK_ROWS]
                yield from threads.map(self._ask, records, wanted)

    def _record(self, row: int) -> Record | str:
        """Return the input's row, or why it cannot be read."""
        assert self._source is not None and self._prompts is not None
        shard = shard_of(self.run.plan, row)
        # A source reads on from one row to the next in a file.
        single = shard.piece(row - shard.first_row_index, 1)
        try:
            return next(iter(self._source.read_shard(single, list(self._prompts.needed_columns()))))
        except Exception as error:  # each format and file system has its own errors
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
                note = "images are not fetched from URLs"
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
    """Open the input that a run has read. Never raises: `Inputs.problem` has the error.

    Args:
        path: the input's present path, in place of `data.path`; None if it has not moved.
    """
    if path is not None:
        cfg = replace(cfg, data=replace(cfg.data, path=path))
    try:
        source = open_source(cfg.data)
        prompts = PromptBuilder(task=cfg.task, columns=cfg.data.columns, generation=cfg.generation)
        found = input_identity(source.files(list(prompts.needed_columns())))
    except BatchvlmError as error:
        return Inputs(run, cfg, f"the input is not there any more: {redact(error.message)}")
    except Exception as error:  # each file system has its own errors
        return Inputs(run, cfg, f"the input cannot be opened: {type(error).__name__}")
    if found != run.identity.get("input"):
        return Inputs(run, cfg, f"{redact(cfg.data.path)} is not what the run has read any more")
    return Inputs(run, cfg, _source=source, _prompts=prompts)


def _text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return messages as text, with numbered image slots; with roles if there are several."""
    parts: list[str] = []
    num_images = 0
    for message in messages:
        texts = []
        for item in message["content"]:
            num_images += item["type"] == "image"
            texts.append(f"[image {num_images}]" if item["type"] == "image" else item["text"])
        text = "\n".join(texts)
        parts.append(f"{message['role']}: {text}" if len(messages) > 1 else text)
    return "\n\n".join(parts)

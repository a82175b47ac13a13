"""What `batchvlm preview` shows of a row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from batchvlm import demo
from batchvlm.before.preview import preview
from batchvlm.before.thumbnail import half_blocks, print_thumbnail
from batchvlm.errors import ConfigError
from batchvlm.settings.compose import compose

from .test_drawn import demo_job


@pytest.mark.parametrize("engine", ["slots", "generate"])
def test_rows_prompts_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    job = demo_job(tmp_path, "task=extract", f"engine={engine}", "generation.max_new_tokens=60")
    preview(job, num_rows=4, seed=3, with_images=True)
    shown = capsys.readouterr().out
    assert shown.count("\n--- ") == 4 and "--- 4 of 4: row " in shown
    # The chat template's own words, and the image as one of its tokens.
    assert shown.count("<image>[36 times]") == shown.count("List the objects as JSON.") == 4
    assert '<|im_start|>assistant\n{"objects":' in shown
    assert shown.count("60 tokens of prompt, 36 of them of images; ") == 4
    # Two objects fit into 60 tokens, four do not.
    assert shown.count('parsed: {"count":') + shown.count('parsed: {"objects":') >= 1
    assert "cut at its limit (generation.max_new_tokens=60)" in shown
    assert "invalid_json: " in shown
    assert "\x1b" not in shown  # no terminal, no picture
    assert not (tmp_path / "out").exists()


def test_every_answer_is_shown_and_the_limit_is_the_rows_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pq.read_table(demo.SAMPLES_PATH).slice(0, 1).append_column("most", pa.array([3]))
    pq.write_table(rows, tmp_path / "in.parquet")
    job = demo_job(
        tmp_path, "data=parquet", f"data.path={tmp_path / 'in.parquet'}",
        "generation.columns.max_new_tokens=most", "generation.temperature=1",
        "generation.num_return_sequences=3",
    )  # fmt: skip
    preview(job, num_rows=1, seed=0, with_images=False)
    shown = capsys.readouterr().out
    assert "\n[answer 2] A " in shown and "\n[answer 3] A " in shown
    assert "; 9 of answer in " in shown and "; cut at its limit (3 tokens)" in shown


def test_tokens_are_shown_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all at once when the row is done."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", Recorder(written))
    preview(demo_job(tmp_path), num_rows=1, seed=4, with_images=False)
    start = next(i for i, text in enumerate(written) if "assistant" in text)
    end = next(i for i, text in enumerate(written) if "tokens of prompt" in text)
    words = [text for text in written[start + 1 : end] if text.strip()]
    assert len(words) >= 5


class Recorder:
    def __init__(self, written: list[str]) -> None:
        self._written = written

    def write(self, text: str) -> int:
        self._written.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def test_a_row_that_cannot_work_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview(demo_job(tmp_path), num_rows=29, seed=0, with_images=False, engine=Silent())
    shown = capsys.readouterr().out
    for kind in ("decode: ", "missing_image: ", "too_large: the header claims", "engine: told to"):
        assert f"\n{kind}" in shown


class Silent:
    """Fails on every row."""

    def run(self, samples: Any) -> Any:
        from batchvlm.errors import ErrorType
        from batchvlm.records import Failure

        for sample in samples:
            yield sample.row_index, Failure(error_type=ErrorType.ENGINE, message="told to")


def test_a_picture_of_half_blocks() -> None:
    image = Image.new("RGB", (4, 4), (250, 0, 0))
    image.paste((0, 0, 250), (0, 2, 4, 4))
    lines = half_blocks(image, columns=4, rows=2).splitlines()
    assert len(lines) == 2 and all(line.count("▀") == 4 for line in lines)
    assert lines[0].startswith("\x1b[38;2;250;0;0m\x1b[48;2;250;0;0m▀")
    assert lines[1].startswith("\x1b[38;2;0;0;250m") and lines[1].endswith("\x1b[0m")
    # Of an odd number of pixels, the last line has no lower half.
    assert half_blocks(image.crop((0, 0, 4, 3)), columns=4, rows=2).count("\x1b[48") == 4
    wide = half_blocks(Image.new("L", (400, 10)), columns=40)
    assert len(wide.splitlines()) == 1 and wide.count("▀") == 40


def test_a_terminal_that_draws_pixels_gets_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import textual_image.renderable as renderable
    from textual_image import _terminal

    image = Image.new("RGB", (60, 30), "red")
    print_thumbnail(image)
    assert "▀" in capsys.readouterr().out  # stdin is no terminal that could be asked
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(renderable, "Image", renderable.SixelImage)
    monkeypatch.setattr(renderable.sixel, "get_cell_size", lambda: _terminal.CellSize(10, 20))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    print_thumbnail(image)
    shown = capsys.readouterr().out
    assert "\x1bP" in shown and "▀" not in shown

    def refuse() -> None:
        raise _terminal.TerminalError("no answer")

    monkeypatch.setattr(renderable.sixel, "get_cell_size", refuse)
    print_thumbnail(image)
    assert "▀" in capsys.readouterr().out


def test_flags_and_settings_are_told_apart() -> None:
    from batchvlm.before.commands import preview as command

    _, overrides = command(["-n", "3", "task=vqa", "--seed=7", "--config-dir", "conf", "a.b=c d"])
    assert overrides == ["task=vqa", "--config-dir", "conf", "a.b=c d"]
    for wrong in (["-n", "0"], ["--seed", "x"]):
        with pytest.raises(ConfigError):
            command(wrong)
    assert compose("run", ["task=vqa"]).task.name.value == "vqa"


def test_a_dialog_is_shown_turn_by_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pq.read_table(demo.SAMPLES_PATH).slice(0, 1)
    turns = pa.array([["Describe the image.", "How many shapes are there?"]])
    pq.write_table(rows.append_column("turns", turns), tmp_path / "in.parquet")
    job = demo_job(
        tmp_path, "task=dialog", "data=parquet", f"data.path={tmp_path / 'in.parquet'}",
        "data.columns.turns=turns",
    )  # fmt: skip
    preview(job, num_rows=1, seed=0, with_images=False)
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 1 and shown.count("tokens of prompt") == 2
    assert shown.count("Describe the image.") == 2  # the second prompt holds the first turn

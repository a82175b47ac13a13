"""The two commands from end to end: what they print, what they write, what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchvlm.cli import main
from batchvlm.errors import OutputError
from batchvlm.report.outputs import Output
from tests.report.make import answered, make_output


def test_report_writes_the_page_and_the_card(
    output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    root = output.folder.root
    assert main(["report", str(root), "--rows", "10"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{root / 'report.html'}  ") and printed.rstrip()[-2:] in ("kB", "MB")
    assert (root / "report.html").read_text().startswith("<!doctype html>")
    assert "configs:" in (root / "README.md").read_text()


def test_report_somewhere_else_without_images(output: Output, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    assert main(["report", str(output.folder.root), "--html", str(page), "--no-images"]) == 0
    assert "data:image" not in page.read_text()
    assert "--no-images asks" in page.read_text()


def test_compare_prints_a_table_and_writes_a_page(
    output: Output, extract_output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "c.html"
    folders = [str(output.folder.root), str(extract_output.folder.root)]
    assert main(["compare", *folders]) == 0
    assert "rows in both       60" in capsys.readouterr().out
    assert main(["compare", *folders, "--html", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("text", [r'{"\ud83d": "\ud83d"}', f'{{"price": {"1" * 400}}}'])
def test_json_beyond_what_utf8_and_floats_can_hold_is_shown(
    text: str, tmp_path: Path, source: Path
) -> None:
    out = str(tmp_path / "out")
    schema = "task.output.json_schema={type: object}"
    answer = answered(text, parsed=text, json_valid=True)
    make_output(tmp_path / "out", source, lambda row: answer, schema, name="extract")
    page = tmp_path / "page.html"
    for command in (["report", out], ["compare", out, out]):
        assert main([*command, "--html", str(page), "--rows", "1", "--no-images"]) == 0
        assert text[2:7] in page.read_text()


@pytest.mark.parametrize("command", [["report"], ["compare", "."]])
def test_a_folder_that_is_no_output_is_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no output of batchvlm" in error


@pytest.mark.parametrize(
    "more", [["report"], ["compare", "x"], ["export", "--to=openai", "--path=x"]]
)
def test_a_file_in_the_folders_place_is_a_mistake(
    more: list[str], output: Output, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([more[0], str(output.parts[0]), *more[1:]]) == 2
    assert f"{output.parts[0]} is a file; name the folder" in capsys.readouterr().err


def test_mistyped_options_are_refused(output: Output, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(output.folder.root), "--rows", "-3"]) == 2
    assert "'-3' is no number of 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [["report", "--html"], ["compare", ".", "--html"], ["export", "--to=openai", "--path"]],
)
def test_a_file_in_an_object_store_is_not_a_folder_named_s3(
    command: list[str],
    output: Output,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    root = str(output.folder.root.absolute())
    assert main([command[0], root, *command[1:], "s3://bucket/file"]) == 2
    assert "'s3://bucket/file' is a URL; name a file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_only_be_read_is_reported(
    output: Output,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OutputError("cannot write README.md: Permission denied")

    monkeypatch.setattr("batchvlm.output.folder.OutputFolder.commit_file", refuse)
    (output.folder.root / "README.md").unlink(missing_ok=True)
    page = tmp_path / "page.html"
    assert main(["report", str(output.folder.root), "--html", str(page), "--rows", "1"]) == 0
    assert capsys.readouterr().out.startswith(str(page))
    assert "no dataset card: cannot write README.md" in caplog.text


def test_a_page_that_cannot_be_written_is_one_line(
    output: Output, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "page.html")
    assert main(["report", str(output.folder.root), "--html", path, "--rows", "1"]) == 1
    assert "cannot be written" in capsys.readouterr().err

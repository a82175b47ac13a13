"""Rows on their way to the disk: tried again, too many of them failed, flushed in time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchvlm.errors import BatchvlmError, ErrorType, ExitCode, OutputError, TooManyErrors
from batchvlm.output import disk as disk_module
from batchvlm.output.compact import compact
from batchvlm.output.folder import OutputFolder
from batchvlm.pipeline import collector as collector_module
from batchvlm.pipeline.collector import Prepared
from batchvlm.pipeline.pipeline import Summary
from batchvlm.pipeline.summary import print_summary
from batchvlm.records import Completion, Failure, FinishReason, Record, Sample
from batchvlm.sources.parquet import ParquetSource
from tests.conftest import make_sample, picture
from tests.pipeline.test_pipeline import FakeEngine, answers, rows_of, run

Writer = Callable[..., Path]


class OomEngine(FakeEngine):
    """Has no room for some rows, and fails on others."""

    def __init__(self, oom: Iterable[int], failing: Iterable[int] = ()) -> None:
        super().__init__(failing)
        self.oom = set(oom)

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for index, outcome in super().run(samples):
            if index in self.oom:
                yield index, Failure(error_type=ErrorType.OOM, message="no room")
            else:
                yield index, outcome


class Crash(Exception):
    """Stands for whatever ends a process in the middle."""


class CrashingOomEngine(OomEngine):
    """Dies before it answers the third row."""

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for number, item in enumerate(super().run(samples)):
            if number == 2:
                raise Crash
            yield item


def test_rows_that_were_tried_often_enough_are_told(
    tmp_path: Path, write_parquet: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_parquet([picture()] * 25), tmp_path / "out"
    retry = ("retry.errors=[oom]", "retry.max_attempts=2")
    run(out, source, engine=OomEngine({3, 12}))
    assert run(out, source, *retry, engine=OomEngine({3, 12})).num_given_up == 0
    engine = FakeEngine()
    summary = run(out, source, *retry, engine=engine)
    assert (summary.num_given_up, engine.seen) == (2, [])
    print_summary(summary)
    shown = capsys.readouterr().out
    assert "retry    2 rows were left: tried 2 times already (retry.max_attempts)" in shown
    assert run(out, source, *retry, "runtime.num_tasks=2").num_given_up == 1


def test_a_run_that_answered_nothing_warns(
    tmp_path: Path, write_parquet: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_parquet([picture()] * 3 + [b"no image"], id=list("abcd"))
    print_summary(run(tmp_path / "out", source, engine=OomEngine({0, 1, 2})))
    assert "no row was answered: 3 of 4 with oom, such as " in caplog.text
    caplog.clear()
    print_summary(run(tmp_path / "some", source, engine=OomEngine({0, 1})))
    assert "no row was answered" not in caplog.text


class CutEngine(FakeEngine):
    """Its answers end in the middle."""

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for index, outcome in super().run(samples):
            assert isinstance(outcome, Completion)
            yield index, replace(outcome, finish_reason=FinishReason.LENGTH)


def test_json_that_was_cut_is_told_from_json_that_is_none(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()])
    settings = ("task=extract", "task.output.json_schema=any")
    for engine, message in (
        (
            CutEngine(answer='{{"a": "b'),
            "the answer was cut at 3 tokens before its JSON ended; raise generation.max_new_tokens",
        ),
        (CutEngine(answer="{{}} and"), "the answer is no JSON: Extra data at character 4"),
        (FakeEngine(answer="A cat"), "the answer is no JSON: Expecting value at character 1"),
    ):
        out = tmp_path / str(len(message))
        run(out, source, *settings, engine=engine)
        assert rows_of(out)[0]["error_message"] == message


def test_an_answer_that_was_cut_names_the_limit_that_cut_it(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()], longest=[9])
    settings = ("task=extract", "task.output.json_schema=any")
    for name, own, ending in (
        ("column", "generation.columns.max_new_tokens=longest", "; raise column longest, or "),
        ("context", "generation.max_new_tokens=1000000", "; no more fits behind its prompt"),
    ):
        run(tmp_path / name, source, *settings, own, engine=CutEngine(answer='{{"a": "b'))
        message = rows_of(tmp_path / name)[0]["error_message"]
        assert message.startswith(f"the answer was cut at 3 tokens before its JSON ended{ending}")


def test_valid_json_that_its_column_cannot_hold_is_an_error_of_its_row(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source, schema = write_parquet([picture()]), tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}')
    engine = FakeEngine(answer='{{"n": 9223372036854775808}}')
    run(
        tmp_path / "out", source, "task=extract", f"task.output.json_schema={schema}", engine=engine
    )
    (row,) = rows_of(tmp_path / "out")
    assert (row["error_type"], row["error_message"]) == (
        "invalid_json",
        "$.n is an integer beyond 64 bits",
    )
    assert (row["generated_text"], row["parsed"]) == ('{"n": 9223372036854775808}', None)


def test_a_row_that_waits_for_the_engine_counts_with_all_that_it_holds() -> None:
    """The queue of ready rows is bounded by these sizes."""
    record = Record(row=0, row_index=0, source_file="in", id="a", values={})
    sample = make_sample(0, num_tokens=1)
    plain = Prepared(record=record, outcome=sample).size_bytes
    large = {"a": bytes(1000), "b": ["x" * 500, {"c": "y" * 500}]}
    for heavy in (
        replace(record, values=large),
        replace(record, kept=large),
        replace(record, fetched={"https://x/a.png": bytes(2000)}),
    ):
        assert Prepared(record=heavy, outcome=sample).size_bytes == plain + 2000
    tokens = make_sample(0, num_tokens=251)
    assert Prepared(record=record, outcome=tokens).size_bytes == plain + 250 * 8
    failure = Failure(error_type=ErrorType.DECODE, message="no image")
    assert 0 < Prepared(record=record, outcome=failure).size_bytes < plain


def test_a_retry_computes_just_the_rows_it_names(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 25), tmp_path / "out"
    run(tmp_path / "plain", source, engine=FakeEngine(failing=[4]))
    run(out, source, engine=OomEngine({3, 11, 12, 24}, failing=[4]))
    before = {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    retry = ("retry=transient", "retry.max_attempts=9")
    engine = CrashingOomEngine({12})
    with pytest.raises(Crash):
        run(out, source, *retry, engine=engine)
    found = rows_of(out)
    assert len(found) == 25
    # A run without the setting has nothing to do, and loads nothing.
    idle = FakeEngine()
    run(out, source, engine=idle)
    assert idle.seen == []
    engine = OomEngine({12})
    summary = run(out, source, *retry, engine=engine)
    assert set() < set(engine.seen) < {3, 11, 12, 24}
    assert summary.num_found + summary.metrics.num_rows == 25
    expected = answers(tmp_path / "plain")
    for row, want in zip(answers(out), expected, strict=True):
        index = row["row_index"]
        if index == 12:
            assert (row["error_type"], row["error_message"]) == ("oom", "no room")
            assert row["attempts"] in (2, 3)
            continue
        assert row.pop("attempts") == (2 if index in {3, 11, 24} else 1)
        want.pop("attempts")
        assert row == want
    assert summary.num_given_up == 0
    run(out, source, *retry, engine=FakeEngine())
    assert [row["status"] for row in rows_of(out)].count("error") == 1
    assert all(path.stat().st_mtime_ns != at_ns for path, at_ns in before.items())
    idle = FakeEngine()
    run(out, source, *retry, engine=idle)
    assert idle.seen == []
    assert not list((out / "_batchvlm").glob("retries/*"))


@pytest.fixture
def merged(tmp_path: Path, write_parquet: Writer) -> Callable[..., Summary]:
    """A job of six shards in two merged parts, with a failed row in four of them.

    Returns:
        Runs it again with `retry.errors`.
    """
    source, out = write_parquet([picture()] * 45), tmp_path / "out"
    run(out, source, engine=OomEngine({3, 12, 25, 44}))
    compact(OutputFolder(out), target_rows=30)
    return partial(run, out, source, "retry.errors=[oom]")


def tried_twice(out: Path) -> list[int]:
    rows = rows_of(out)
    assert [row["row_index"] for row in rows] == list(range(45))
    return [row["row_index"] for row in rows if row["attempts"] == 2]


def test_a_retry_rewrites_each_merged_part_once(
    tmp_path: Path, merged: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit_file, written = OutputFolder.commit_file, []

    def count(self: OutputFolder, write: Any, final: Path, **options: Any) -> bool:
        written.extend([final.name] if final.parent == self.data else [])
        return commit_file(self, write, final, **options)

    monkeypatch.setattr(OutputFolder, "commit_file", count)
    engine = FakeEngine()
    summary = merged(engine=engine)
    assert written == sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert len(written) == 2 and all("-to-" in name for name in written)
    assert sorted(engine.seen) == tried_twice(tmp_path / "out") == [3, 12, 25, 44]
    assert (summary.metrics.num_rows, summary.metrics.num_errors) == (4, 0)
    assert not list((tmp_path / "out" / "_batchvlm").glob("retries/*"))


def test_a_run_that_dies_before_it_rewrites_merged_parts(
    tmp_path: Path, merged: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = rows_of(out)

    def die(*args: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(collector_module, "update_part", die)
        with pytest.raises(Crash):
            merged()
    assert rows_of(out) == before
    with pytest.raises(OutputError, match="rows of 4 shards were answered again"):
        compact(OutputFolder(out), target_rows=100)
    engine = FakeEngine()
    merged(engine=engine)
    assert engine.seen == []
    assert tried_twice(out) == [3, 12, 25, 44]


def test_a_run_that_ends_early_puts_what_it_has_into_merged_parts(
    tmp_path: Path, merged: Callable[..., Summary]
) -> None:
    with pytest.raises(Crash):
        merged(engine=CrashingOomEngine([]))
    done = tried_twice(tmp_path / "out")
    assert len(done) == 2
    engine = FakeEngine()
    merged(engine=engine)
    assert sorted(engine.seen + done) == tried_twice(tmp_path / "out") == [3, 12, 25, 44]


def test_a_run_that_was_told_to_stop_leaves_merged_parts_to_the_next(
    tmp_path: Path, merged: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(collector_module, "interrupted_at_s", lambda: 0.0)
        with pytest.raises(Crash):
            merged(engine=CrashingOomEngine([]))
    assert tried_twice(tmp_path / "out") == []
    engine = FakeEngine()
    merged(engine=engine)
    assert len(engine.seen) == 2
    assert tried_twice(tmp_path / "out") == [3, 12, 25, 44]


def test_a_row_of_a_merged_part_that_the_source_forgets_is_missed(
    tmp_path: Path, merged: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_shard = ParquetSource.read_shard

    def forget(self: ParquetSource, *args: Any, **options: Any) -> Iterator[Any]:
        return (row for row in read_shard(self, *args, **options) if row.row_index != 12)

    with monkeypatch.context() as patch:
        patch.setattr(ParquetSource, "read_shard", forget)
        with pytest.raises(BatchvlmError, match="1 row of shard 1 was never answered"):
            merged()
    assert tried_twice(tmp_path / "out") == [3, 25, 44]
    merged()
    assert tried_twice(tmp_path / "out") == [3, 12, 25, 44]


def test_a_disk_that_is_full_when_merged_parts_are_rewritten(
    tmp_path: Path, merged: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = rows_of(out)

    def refuse(path: Any, mode: str, **options: Any) -> Any:
        if "-to-" in Path(path).name:
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    with monkeypatch.context() as context:
        context.setattr(disk_module, "open", refuse, raising=False)
        with pytest.raises(OutputError, match=r"No space left.*make room and run the same"):
            merged()
    assert rows_of(out) == before
    engine = FakeEngine()
    merged(engine=engine)
    assert engine.seen == []
    assert tried_twice(out) == [3, 12, 25, 44]


def test_rows_of_an_unfinished_shard_are_retried_too(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture(size=(8 + i, 8)) for i in range(10)]), tmp_path / "out"
    with pytest.raises(Crash):
        run(out, source, engine=CrashingOomEngine(range(10)))
    engine = FakeEngine()
    summary = run(out, source, "retry.errors=[oom]", engine=engine)
    assert sorted(engine.seen) == list(range(10)) and summary.num_found == 0
    rows = rows_of(out)
    assert [row["status"] for row in rows] == ["success"] * 10
    assert sorted(row["attempts"] for row in rows) == [1] * 8 + [2] * 2


def test_too_many_errors_end_the_run_with_their_causes(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source = write_parquet([picture()] * 6 + [b"x"] * 30 + [picture()] * 64)
    limits = ["runtime.max_error_rate=0.5", "runtime.max_error_rate_after=20"]
    with pytest.raises(TooManyErrors) as caught:
        run(tmp_path / "out", source, *limits, engine=FakeEngine(failing=[1]))
    error = caught.value
    assert error.exit_code == ExitCode.TOO_MANY_ERRORS == 3
    assert "more than runtime.max_error_rate=0.5" in str(error) and "retry.errors=[" in str(error)
    assert error.causes[0].split()[1:3] == ["decode", "in.parquet:6:"]
    # What was done is kept, and the same command without the limit does the rest.
    summary = run(tmp_path / "out", source)
    assert summary.num_found >= 14  # of 20 that were read, 6 waited for the engine
    assert [row["row_index"] for row in rows_of(tmp_path / "out")] == list(range(100))


def test_few_rows_or_few_errors_end_nothing(tmp_path: Path, write_parquet: Writer) -> None:
    source = write_parquet([b"x"] * 10 + [picture()] * 30)
    run(tmp_path / "a", source, "runtime.max_error_rate=0.3", "runtime.max_error_rate_after=40")
    with pytest.raises(TooManyErrors):
        run(tmp_path / "b", source, "runtime.max_error_rate=0.2", "runtime.max_error_rate_after=40")
    run(tmp_path / "c", source)


class WaitingEngine(FakeEngine):
    """Answers some rows and then thinks about the next one until a segment is there."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out
        self.num_on_disk = 0

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
        for number, item in enumerate(super().run(samples)):
            if number == 3:
                has_segment = threading.Event()

                def look(event: threading.Event = has_segment) -> None:
                    while not list(self.out.glob("_batchvlm/segments/*/*.parquet")):
                        pass
                    event.set()

                threading.Thread(target=look, daemon=True).start()
                assert has_segment.wait(60), "nothing was flushed"
            yield item


def test_a_long_batch_does_not_keep_finished_rows_from_the_disk(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source, out = write_parquet([picture()] * 8), tmp_path / "out"
    run(out, source, "output.flush_every_s=1", engine=WaitingEngine(out))
    assert len(rows_of(out)) == 8


def test_a_full_disk_is_waited_for_by_the_clock_and_named_by_the_next_row(
    tmp_path: Path, write_parquet: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost: room is made, the same command is run again."""
    source, out = write_parquet([picture()] * 25), tmp_path / "out"
    num_files = 0

    def refuse(path: Any, mode: str, **options: Any) -> Any:
        nonlocal num_files
        num_files += 1
        if num_files > 5:
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    with monkeypatch.context() as context:
        context.setattr(disk_module, "open", refuse, raising=False)
        with pytest.raises(OutputError, match=r"No space left.*make room and run the same"):
            run(out, source, "output.flush_every_rows=2")
    kept = num_files
    assert kept > 5
    engine = FakeEngine()
    run(out, source, engine=engine)
    assert 0 < len(engine.seen) < 25
    assert [row["row_index"] for row in rows_of(out)] == list(range(25))


def test_a_flush_that_the_clock_began_and_the_disk_refused_is_tried_again(
    tmp_path: Path,
    write_parquet: Writer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    is_refused = threading.Event()

    def refuse(path: Any, mode: str, **options: Any) -> Any:
        if threading.current_thread().name == "flush" and not is_refused.is_set():
            is_refused.set()
            raise OSError(28, "No space left on device")
        return open(path, mode, **options)

    class Waiting(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            for number, item in enumerate(super().run(samples)):
                if number == 3:
                    assert is_refused.wait(60), "nothing was flushed"
                yield item

    monkeypatch.setattr(disk_module, "open", refuse, raising=False)
    source, out = write_parquet([picture()] * 8), tmp_path / "out"
    run(out, source, "output.flush_every_s=1", engine=Waiting())
    assert "No space left" in caplog.text
    assert [row["status"] for row in rows_of(out)] == ["success"] * 8


@pytest.mark.parametrize("is_overwritten", [False, True])
def test_a_folder_that_is_gone_or_given_away_is_not_written(
    tmp_path: Path, is_overwritten: bool
) -> None:
    """As after an unmount: the empty folder below must not be taken for the output."""
    folder = OutputFolder(tmp_path / "out")
    folder.commit_file(lambda file: file.write(b"ours"), folder.run_json)
    folder.claim(b"ours")
    folder.commit_file(lambda file: file.write(b"x"), folder.data / "a")
    if is_overwritten:
        folder.run_json.write_bytes(b"theirs")
    else:
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="another run" if is_overwritten else "unmounted"):
        folder.commit_file(lambda file: file.write(b"x"), folder.data / "b")
    assert not (folder.data / "b").exists()


def test_rows_that_fail_at_once_count_beside_those_that_wait_for_the_engine(
    tmp_path: Path, write_parquet: Writer
) -> None:
    # A fifth of the rows fails before the first of the others is answered.
    images = [b"no image" if i % 5 == 0 else picture() for i in range(100)]
    source, after = write_parquet(images), "runtime.max_error_rate_after=10"
    run(tmp_path / "out", source, "runtime.max_error_rate=0.4", after)
    with pytest.raises(TooManyErrors, match=r"more than runtime\.max_error_rate=0\.1"):
        run(tmp_path / "strict", source, "runtime.max_error_rate=0.1", after)

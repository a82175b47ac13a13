"""What a whole job makes of its output folder when something goes wrong around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from batchvlm.records import Completion, Failure, Sample
from tests.conftest import picture
from tests.test_pipeline import FakeEngine, run

Writer = Callable[..., Path]


def test_a_card_is_there_from_the_first_row_on(tmp_path: Path, write_parquet: Writer) -> None:
    source, out = write_parquet([picture()] * 5), tmp_path / "out"
    seen = []

    class Looking(FakeEngine):
        def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Completion | Failure]]:
            for answer in super().run(samples):
                seen.append((out / "README.md").read_text())
                yield answer

    run(out, source, engine=Looking())
    assert "rows so far, 0 of 5" in seen[0] and "split: train" in seen[0]
    assert "5 rows, one for every row" in (out / "README.md").read_text()


def test_a_card_that_a_kill_left_undone_is_written_by_the_next_run(
    tmp_path: Path, write_parquet: Writer
) -> None:
    source, out = write_parquet([picture()] * 5), tmp_path / "out"
    run(out, source)
    card = (out / "README.md").read_text()
    (out / "README.md").unlink()
    run(out, source, engine=FakeEngine())
    assert (out / "README.md").read_text() == card

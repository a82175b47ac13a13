"""The wheel works where the checkout is not: conf/, the demo's model and its samples are in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.dataset as ds
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with just what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("batchvlm-*.whl")
    assert wheel.stat().st_size < 12 << 20
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_run_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    program = (
        "import batchvlm, batchvlm.settings.compose as s, sys; from batchvlm.cli import main;"
        f"assert batchvlm.__file__.startswith({str(installed)!r}), batchvlm.__file__;"
        f"assert str(s.conf_dir()).startswith({str(installed)!r}), s.conf_dir();"
        "sys.exit(main(sys.argv[1:]))"
    )
    # A script, not -c: worker processes import the main module again.
    script = tmp_path / "batchvlm-command.py"
    script.write_text(f"if __name__ == '__main__':\n    {program}\n")
    done = subprocess.run(
        [sys.executable, str(script), "run", "data.max_rows=3", "output.dir=out"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ds.dataset(tmp_path / "out" / "data").count_rows() == 3

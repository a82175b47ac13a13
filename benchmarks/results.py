"""`RESULTS.md`: one section a benchmark, with its machine, versions, date and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("torch", "transformers", "datasets", "pyarrow")


def write_section(title: str, markdown: str, path: Path = RESULTS) -> None:
    """Put a section into the results, in place of the one with its title.

    Args:
        title: text of the section's second-level heading.
        markdown: what stands under it.
        path: the file; made where it is not there.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else "# Benchmark results\n"
    head, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    others = [s.strip() for s in sections if s.partition("\n")[0].strip() != title]
    sections = sorted([*others, f"{title}\n\n{markdown.strip()}"])
    path.write_text(
        "\n\n".join([head.strip(), *(f"## {section}" for section in sections)]) + "\n",
        encoding="utf-8",
    )


def environment(command: str, packages: Sequence[str] = PACKAGES) -> str:
    """A line with the hardware, the versions, the date and the command."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB,"
        f" {platform.system()}; Python {platform.python_version()}, {versions};"
        f" {datetime.now(UTC):%Y-%m-%d}; `{command}`"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)

"""What a forward gives back is there for the next one, without the system's help."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

_FAULTS = """
import resource, torch
from batchvlm.engine.forward.allocator import keep_freed_memory
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def forward(): return [torch.ones(4 << 20) for _ in range(8)] and None
assert keep_freed_memory()
for _ in range(4): forward()
before = faults(); forward(); print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_of_a_few_mib_is_not_filled_with_zeros_anew() -> None:
    def faults() -> int:
        code = _FAULTS
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    num_pages = 8 * (16 << 20) // resource.getpagesize()
    # Left alone, glibc mostly gives it back and gets it again: every page once.
    assert faults() < num_pages // 10

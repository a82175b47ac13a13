"""The parser for flags of the commands, which reports errors in one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from batchvlm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser that raises `ConfigError` instead of printing a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(message, hint=f"{self.prog} --help lists the flags")


def local_file(text: str) -> Path:
    """Parse a flag that names a local file to write.

    Raises:
        ArgumentTypeError: the value is a URL, which would become a folder named `s3:`.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is a URL; name a file of this machine, and copy that"
        )
    return Path(text)

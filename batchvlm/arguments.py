"""The parser for flags of the commands, which reports errors in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from batchvlm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """The parser of one command; it raises `ConfigError` instead of printing a page of usage.

    Args:
        command: the command's name.
        about: what it does, shown before the flags.
        more: further help, shown after the flags.
        usage: the line of usage; None for argparse's own.
    """

    def __init__(self, command: str, about: str, more: str, *, usage: str | None = None) -> None:
        super().__init__(
            prog=f"batchvlm {command}",
            usage=usage,
            description=about,
            epilog=more,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(message, hint=f"{self.prog} --help lists the flags")


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of a flag that takes a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {least} or more")
        return int(text)

    return parse


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

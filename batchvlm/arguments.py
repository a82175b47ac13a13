"""Flags of the commands: what is wrong with them is said in one line, as of settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from batchvlm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(message, hint=f"{self.prog} --help lists the flags")


def local_file(text: str) -> Path:
    """The `type` of a flag that names a file to write.

    Raises:
        ArgumentTypeError: it is an address, which would become a folder named `s3:`.
    """
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address; name a file of this machine, and copy that"
        )
    return Path(text)

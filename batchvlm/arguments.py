"""Flags of the commands: what is wrong with them is said in one line, as of settings."""

from __future__ import annotations

import argparse
from typing import NoReturn

from batchvlm.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError`."""
        raise ConfigError(message, hint=f"{self.prog} --help lists the flags")

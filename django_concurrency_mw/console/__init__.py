"""The console: what `manage.py concurrency` can do, one module for each of its subcommands.

Each module has `HELP` (one line), `add_arguments(parser)` and `run(options, out)`, which returns the exit code: 0 yes, 1 no.
What cannot be found out is a CommandError, whose exit code is 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

from django.core.management.base import CommandParser

from . import explain, holders, ping, policies, simulate
from .output import Output


class Subcommand(Protocol):
    """A module of this package."""

    HELP: str

    def add_arguments(self, parser: CommandParser) -> None:
        """Its own options."""

    def run(self, options: Mapping[str, Any], out: Output) -> int:
        """Do it. Returns 0 or 1. Raises: CommandError."""


SUBCOMMANDS: Final[Mapping[str, Subcommand]] = {
    "explain": explain,
    "holders": holders,
    "ping": ping,
    "policies": policies,
    "simulate": simulate,
}

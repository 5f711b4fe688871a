"""`manage.py concurrency`: the subcommands, their options and their exit codes."""

from __future__ import annotations

import sys
from argparse import SUPPRESS
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from ...console import SUBCOMMANDS
from ...console.output import Output


class Command(BaseCommand):
    """Exit codes: 0 yes, 1 no (as each subcommand means it), 2 it could not be found out."""

    help = "See what the concurrency limits do, explain a decision, find out who holds the slots, rehearse a change."
    requires_system_checks = ()  # they may be what somebody wants to understand

    def add_arguments(self, parser: CommandParser) -> None:
        each = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
        for name, module in SUBCOMMANDS.items():
            sub = each.add_parser(name, help=module.HELP, description=module.HELP)
            _take_djangos_own(sub)
            sub.add_argument("--json", action="store_true", help="one JSON document instead of text")
            module.add_arguments(sub)

    def handle(self, *args: Any, **options: Any) -> None:
        out = Output(self.stdout, as_json=options["json"])
        try:
            code = SUBCOMMANDS[options["subcommand"]].run(options, out)
        except CommandError as error:
            error.returncode = 2
            raise
        except Exception as error:  # of the site's own code, a store or a log: never "no", which is 1
            if options["traceback"]:
                raise
            raise CommandError(f"{type(error).__name__}: {error} (--traceback says where)", returncode=2) from error
        if code:
            sys.exit(code)


def _take_djangos_own(parser: CommandParser) -> None:
    """What every command takes may stand behind the subcommand, too; not given there, it is as before it."""
    for option in ("--settings", "--pythonpath"):
        parser.add_argument(option, default=SUPPRESS, help=SUPPRESS)
    parser.add_argument("-v", "--verbosity", type=int, default=SUPPRESS, help=SUPPRESS)
    for option in ("--traceback", "--no-color", "--force-color"):
        parser.add_argument(option, action="store_true", default=SUPPRESS, help=SUPPRESS)

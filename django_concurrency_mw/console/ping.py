"""Ping: do the stores do what requests need? A readiness probe."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from django.core.management.base import CommandParser

from ..exceptions import PermanentBackendError
from .config import configuration, stores
from .output import Output

HELP = "ask each store that policies use to take, renew and give back one slot; exit code 1 if one cannot"


def add_arguments(parser: CommandParser) -> None:
    """It has none."""


def run(options: Mapping[str, Any], out: Output) -> int:
    """Exit code 0: every store works."""
    answers = []
    for store in stores(configuration()):
        began, error = perf_counter(), None
        try:
            store.probe()
        except Exception as raised:  # whatever a store raises: that it cannot be used is the answer
            error = raised
        answers.append(
            {
                "backend": store.config.alias,
                "ok": error is None,
                "milliseconds": round(1000 * (perf_counter() - began), 2),
                "error": None if error is None else str(error) or repr(error),
                "cure": error.cure if isinstance(error, PermanentBackendError) else None,
            }
        )
    ready = all(answer["ok"] for answer in answers)
    if out.json:
        out.document({"ready": ready, "backends": answers})
        return 0 if ready else 1
    for answer in answers:
        if answer["ok"]:
            out.line(f"{answer['backend']}: works, {answer['milliseconds']} ms", "green")
        else:
            cure = f" Cure: {answer['cure']}" if answer["cure"] else ""
            out.line(f"{answer['backend']}: {answer['error']}{cure}", "red")
    if not answers:
        out.line("no policy, so no store is used")
    return 0 if ready else 1

"""Output: what a subcommand says, as tables and lines for people, or as one JSON document for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from django.core.management.base import CommandError, OutputWrapper


class Output:
    """`--json` or text. A subcommand asks `json` which of the two is wanted, and says nothing else in that case.

    Text goes through rich, which is an extra: without it only `--json` works. What other people wrote (keys, paths) is
    never read as markup.
    """

    def __init__(self, stream: OutputWrapper, *, as_json: bool) -> None:
        self.json = as_json
        self._stream = stream
        self.console: Any = None if as_json else _console(stream)

    def document(self, value: Any) -> None:
        """The one JSON document; `--watch` writes one a line."""
        self._stream.write(json.dumps(value, ensure_ascii=False, default=str))
        self._stream.flush()  # whoever reads a pipe with --watch waits for it

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line for people."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table for people. A column whose name begins with `>` is aligned to the right, one with `=` is never broken."""
        self.console.print(table(columns, rows, title))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Any:
    """The table that `Output.table` prints, for those who draw it again and again."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        justify: Any = "right" if name.startswith(">") else "left"
        made.add_column(name.lstrip(">="), justify=justify, overflow="fold", no_wrap=name.startswith("="))
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def near(place: str) -> str:
    """Where something is written, by the path from here if that is shorter."""
    path, colon, rest = place.partition(":")
    if not os.path.isabs(path):
        return place
    return min(place, f"{os.path.relpath(path)}{colon}{rest}", key=len)


def _console(stream: OutputWrapper) -> Any:
    try:
        from rich.console import Console
    except ImportError:
        raise CommandError(
            "Tables need rich: pip install 'django_concurrency_mw[cli]'. Without it there is --json.", returncode=2
        ) from None
    # Below Django's wrapper, which ends each piece of a line with a new line.
    below: Any = getattr(stream, "_out", stream)
    return Console(file=below, highlight=False)

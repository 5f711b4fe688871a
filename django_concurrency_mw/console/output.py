"""Output: what a subcommand says, as tables and lines for people, or as one JSON document for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from django.core.management.base import CommandError, OutputWrapper

#: Columns of a table where nobody says how many there are.
WIDE = 250


class Output:
    """`--json` or text. A subcommand asks `json` which of the two is wanted, and says nothing else in that case.

    Tables go through rich, which is an extra: without it there are lines and `--json`. What other people wrote (keys, paths)
    is never read as markup.
    """

    def __init__(self, stream: OutputWrapper, *, as_json: bool) -> None:
        self.json = as_json
        self._stream = stream
        self._console: Any = None

    @property
    def console(self) -> Any:
        """Of rich. Raises: CommandError where that is not installed."""
        if self._console is None:
            self._console = _console(self._stream)
        return self._console

    def document(self, value: Any) -> None:
        """The one JSON document; `--watch` writes one a line."""
        self._stream.write(json.dumps(value, default=str))
        self._stream.flush()  # whoever reads a pipe with --watch waits for it

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line for people."""
        if find_spec("rich") is None:
            self._stream.write(printable(text))
            return
        self.console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table for people. A column whose name begins with `>` is aligned to the right, one with `=` is never broken."""
        self.console.print(table(columns, rows, title))

    def note(self, text: str) -> None:
        """Something to keep in mind."""
        self.line(f"Note: {text}.", "yellow")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Any:
    """The table that `Output.table` prints, for those who draw it again and again."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(printable(title)) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in columns:
        justify: Any = "right" if name.startswith(">") else "left"
        made.add_column(name.lstrip(">="), justify=justify, overflow="fold", no_wrap=name.startswith("="))
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """With what a terminal might carry out written as `\\x1b`: paths and keys are the clients' own text."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


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
    # A pipe has no width: whatever reads it wants each row in one line.
    wide = None if below.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(file=below, highlight=False, width=wide)

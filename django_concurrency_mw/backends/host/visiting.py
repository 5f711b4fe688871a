"""A visit: how somebody who holds nothing there looks at the table, without being one of its processes.

Operators come so, at any time: a visit makes no file, wipes nothing, needs no process's number, and leaves nothing behind.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import Final, TypeVar

from ...exceptions import BackendError
from . import bells
from .access import LONGEST_NAP, TIMEOUT, StaysLocked
from .layout import Header, Layout
from .lines import serve
from .locking import try_lock
from .opening import find_file, is_at, look_into
from .table import Table

A = TypeVar("A")
R = TypeVar("R")
#: How often a file may be replaced while it is looked for.
TRIES: Final = 5


def visit(path: Path, layout: Layout, work: Callable[[Table, A, int], R], argument: A) -> R | None:
    """Do this with the table, as `Access.call` does. None: there is none that anybody could be in. Raises: BackendError."""
    for _ in range(TRIES):
        fd = find_file(path)
        if fd is None:
            return None
        try:
            _lock(fd, path)
            if not is_at(path, fd):
                continue
            table = look_into(fd, path, layout)
            if table is None:
                return None
            if table.words[Header.DIRTY]:
                table.rebuild()
            now = monotonic_ns()
            reply = work(table, argument, now)
            serve(table, now)
            return reply
        finally:
            os.close(fd)  # and with it the lock
            bells.ring()
    raise BackendError(f"{path} is replaced all the time")


def _lock(fd: int, path: Path) -> None:
    end = monotonic() + TIMEOUT
    while not try_lock(fd):
        if monotonic() > end:
            raise StaysLocked.of(path)
        time.sleep(LONGEST_NAP)

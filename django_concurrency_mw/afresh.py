"""Afresh: what a process must not inherit is made anew, in a forked child, and where threads have become greenlets since.

gunicorn's gevent worker patches the standard library in a process that may have loaded the site before. Locks and queues that
were made until then stop all greenlets at once, or shut out none of them, so they begin anew before the first request.
"""

from __future__ import annotations

import _thread
import os
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

_calls: list[Callable[[], object]] = []
#: What the locks of this process are made by; whoever patches replaces it.
_locks_by: Any = _thread.allocate_lock


def begin_with(call: Callable[[], object]) -> None:
    """Call it in a forked child, and where what locks are made of is not what it was."""
    _calls.append(call)
    os.register_at_fork(after_in_child=call)


def are_greenlets() -> bool:
    """Are this process's threads greenlets: is waiting somebody else's turn, however long that is?"""
    return not isinstance(_thread.allocate_lock, BuiltinFunctionType)


def begin_if_patched() -> None:
    """Asked when a process, or a fork of it, is about to use the limits for the first time, so that nothing is held yet."""
    global _locks_by
    if _thread.allocate_lock is not _locks_by:
        _locks_by = _thread.allocate_lock
        for call in _calls:
            call()

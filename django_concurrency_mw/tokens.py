"""Tokens: the names of holders, made here and never taken from a client.

Random per process and made anew in a forked child, so that no two processes of any machine share one.
"""

from __future__ import annotations

import os
from itertools import count

_prefix = os.urandom(8).hex()
_numbers = count(1)


def new_token() -> str:
    """A token that no other holder has: 16 hex digits of this process, a dash, a number."""
    return f"{_prefix}-{next(_numbers):x}"


def process_id() -> str:
    """What every token of this process begins with."""
    return _prefix


def process_of(token: str) -> str:
    """The `process_id` of the process that made this token."""
    return token.partition("-")[0]


def _forked() -> None:
    global _prefix
    _prefix = os.urandom(8).hex()


os.register_at_fork(after_in_child=_forked)

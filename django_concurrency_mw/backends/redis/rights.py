"""What the user of LOCATION may not do, of what requests can do without: it is asked by `manage.py check`.

What they cannot do without fails with the check's own take and release.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.core.checks import CheckMessage, Warning
from redis.exceptions import ResponseError

from ..base import probe_slot
from . import wire

#: Names no connection.
NOBODY = wire.pack(b"CLIENT", b"KILL", b"ID", b"9223372036854775807", b"ADDR", b"0.0.0.0:0")


def lacking(ask: Callable[[bytes], Any], keys: wire.Keys) -> tuple[list[str], bool]:
    """The ACL rules that are missing for what people and the rare cases need; and whether a lost connection can be fenced off.

    Raises: what `ask` does, but for what the server refuses.
    """

    def refused(command: bytes) -> bool:
        try:
            ask(command)
        except ResponseError as error:
            return not str(error).startswith("WRONGTYPE")
        return False

    key, slot = keys.peaks, probe_slot()
    tried = {
        "+script|load": wire.TAKE.load,
        "+zcount": keys.count([slot]),
        "+zscan": wire.pack(b"ZSCAN", key, b"0"),
        "+scan": wire.pack(b"SCAN", b"0", b"MATCH", wire.exactly(key)),
        "+set": wire.pack(b"SET", keys.process("nobody"), b"", b"XX"),
        "+mget": wire.pack(b"MGET", keys.process("nobody")),
        "+zrangebyscore": wire.pack(b"ZRANGEBYSCORE", key, b"(0", b"0"),
    }
    missing = [rule for rule, command in tried.items() if refused(command)]
    return missing, not refused(NOBODY)


def messages(place: str, unknown: bool, fences: bool, missing: list[str]) -> list[CheckMessage]:
    """W007 where a connection is not told who it is, or may not fence off a lost one; W024 for the rules that are missing."""
    found: list[CheckMessage] = []
    if unknown or not fences:
        hint = (
            "ACL SETUSER <user> +client|info +client|kill. Without them a lost connection may still take a slot that nobody "
            "knows, until its lease has ended; where the service allows them to nobody, silence this."
        )
        what = "does not tell a connection who it is" if unknown else "lets no connection end a lost one"
        found.append(Warning(f"{place}: the server {what}", hint=hint, id="django_concurrency_mw.W007"))
    if missing:
        rules = " ".join(missing)
        hint = (
            f"ACL SETUSER <user> {rules}. Requests do without; but a script that may not be loaded is sent whole by the first "
            "call that needs it, and the others are what `manage.py concurrency` needs."
        )
        message = f"{place}: the user of LOCATION may not do all that helps: {rules}"
        found.append(Warning(message, hint=hint, id="django_concurrency_mw.W024"))
    return found

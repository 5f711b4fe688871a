"""What the user of LOCATION has to be allowed; and what it may not do of what requests can do without, which is asked by
`manage.py check`. What they cannot do without fails with the check's own take and release.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from django.core.checks import CheckMessage, Warning
from redis.exceptions import ResponseError

from ..base import probe_slot
from . import wire

#: What an ACL user needs; `%s` is the prefix of its keys.
PERMISSIONS = (
    "ACL SETUSER <user> ~%s* +eval +evalsha +script|load +zadd +zcard +zcount +zscore +zrem +zrangebyscore +zremrangebyscore "
    "+zscan +scan +set +mget +pexpire +pttl +time +select +client|info +client|kill"
)
#: And on a Cluster.
OF_A_CLUSTER = " +cluster|slots +asking"
#: And where somebody may wait.
LISTENING = "ACL SETUSER <user> &%s* +publish +subscribe +pubsub|numsub +ping"
#: How a node that a slot is moving to is asked for what is there already.
ASKING = wire.pack(b"ASKING")
#: Names no connection.
NOBODY = wire.pack(b"CLIENT", b"KILL", b"ID", b"9223372036854775807", b"ADDR", b"0.0.0.0:0")


def permitted(keys: wire.Keys) -> str:
    """The line that allows all that the store does, but for the next."""
    return PERMISSIONS % _escaped(keys) + (OF_A_CLUSTER if keys.of_a_cluster else "")


def listening(keys: wire.Keys) -> str:
    """What an ACL user needs to be told when its turn has come."""
    return LISTENING % _escaped(keys)


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
    if keys.of_a_cluster:
        tried["+asking"] = ASKING
    missing = [rule for rule, command in tried.items() if refused(command)]
    return missing, not refused(NOBODY)


def messages(place: str, unknown: bool, fences: bool, missing: list[str]) -> list[CheckMessage]:
    """W007 where a connection is not told who it is, or may not fence off a lost one; W026 for the rules that are missing."""
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
            "call that needs it, while its slot moves an alias of a Cluster needs +asking, and the others are what `manage.py "
            "concurrency` and policies with `wait` need."
        )
        message = f"{place}: the user of LOCATION may not do all that helps: {rules}"
        found.append(Warning(message, hint=hint, id="django_concurrency_mw.W026"))
    return found


def _escaped(keys: wire.Keys) -> str:
    """The prefix of its keys and channels, as a pattern says it."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", keys.prefix.decode())

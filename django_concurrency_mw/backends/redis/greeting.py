"""The greeting: what every new connection sends first, in one packet, and what its replies mean. No I/O.

It asks who it is to the server, loads the scripts, fences off lost connections, and then carries out the releases that those
have left over: in this order, so that nothing a lost connection still has under way can overtake.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .errors import is_of_the_command, passes
from .leftovers import Client, Release, Work
from .wire import RENEW, TAKE, WAKE, pack


class Greeting:
    """For one connection. `instead_of` is one more lost connection, known to whoever connects."""

    def __init__(self, work: Work, instead_of: Client | None = None) -> None:
        self._work = work
        lost = work.clients if instead_of is None else [*work.clients, instead_of]
        commands = [pack(b"CLIENT", b"INFO"), TAKE.load, RENEW.load, WAKE.load]
        commands += [pack(b"CLIENT", b"KILL", b"ID", b"%d" % client.number, b"ADDR", client.address) for client in lost]
        commands += [release.packed for release in work.releases]
        self.packed = b"".join(commands)
        #: Replies to read; an error of the server's is one of them.
        self.replies = len(commands)

    def heard(self, replies: Sequence[Any]) -> tuple[Client | None, list[Release]]:
        """Who the connection is (None where it may not ask), and the releases that the server could not carry out now.

        Raises: ResponseError where it could not do the rest either; then the connection is of no use yet.
        """
        if passes(replies[0]) and not is_of_the_command(replies[0]):
            raise replies[0]
        releases = self._work.releases
        answers = replies[len(replies) - len(releases) :]
        return _client(replies[0]), [one for one, reply in zip(releases, answers, strict=True) if passes(reply)]


def _client(reply: Any) -> Client | None:
    """From CLIENT INFO: `id=4 addr=127.0.0.1:50322 laddr=...`; an address may be a path with blanks in it."""
    text = reply.encode() if isinstance(reply, str) else reply
    found = re.match(rb"id=(\d+) addr=(.*?) laddr=", text) if isinstance(text, bytes) else None
    return Client(int(found[1]), found[2]) if found else None

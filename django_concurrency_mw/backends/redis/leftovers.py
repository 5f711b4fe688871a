"""What lost connections have left to do: releases that no connection has been heard to carry out, and whom to fence off.

One per store, shared by its threads and its event loops: whoever connects next does it. A connection that was given up may
still have commands under way to the server, so its client id is killed first; what it had yet to read cannot overtake then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

#: Releases kept at most; what does not fit ends with its lease.
MOST = 20_000
#: Releases that one new connection carries out with its greeting.
AT_ONCE = 1000


class Release(NamedTuple):
    """A packed release, and the monotonic second at which the lease has ended by itself and nobody needs it any more."""

    packed: bytes
    until: float


class Client(NamedTuple):
    """A connection as the server knows it. The address belongs to it: a server that was restarted numbers its clients anew,
    and somebody else has the number then."""

    number: int
    address: bytes


class Work(NamedTuple):
    """What one connection has taken upon itself."""

    clients: list[Client]
    releases: list[Release]


class Leftovers:
    """Releases and lost connections; every operation is one of deque's, and so atomic."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when there is something to do that no connection of a request has to wait for."""
        self._wake = wake
        self.forget()

    def forget(self) -> None:
        """A forked child has nothing to carry on: its parent does."""
        self._releases: deque[Release] = deque(maxlen=MOST)
        self._clients: deque[Client] = deque(maxlen=1000)

    def __bool__(self) -> bool:
        return bool(self._releases)

    def __len__(self) -> int:
        return len(self._releases)

    def add(self, releases: Sequence[Release]) -> None:
        """To be carried out by the next connection."""
        if releases:
            self._releases.extend(releases)
            self._wake()

    def remind(self) -> None:
        """Something may have been put back that nobody else knows of."""
        if self._releases:
            self._wake()

    def fence(self, client: Client | None) -> None:
        """This connection was given up: nothing that it still has under way may be carried out."""
        if client is not None:
            self._clients.append(client)

    def pick_up(self) -> Work:
        """What a new connection has to do first. Given back with `put_back` if it cannot."""
        work = Work([], [])
        now = monotonic()
        while True:
            try:
                work.clients.append(self._clients.popleft())
            except IndexError:
                break
        while len(work.releases) < AT_ONCE:
            try:
                release = self._releases.popleft()
            except IndexError:
                break
            if release.until > now:
                work.releases.append(release)
        return work

    def put_back(self, work: Work) -> None:
        """The connection that was to do it did not come about."""
        self._clients.extendleft(reversed(work.clients))
        self._releases.extendleft(reversed(work.releases))

    def put_behind(self, refused: Sequence[Release]) -> None:
        """These could not be carried out now. First it is the turn of others, as one connection may not get so far."""
        self._releases.extend(refused)

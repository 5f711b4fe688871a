"""What lost connections have left to do: releases that no connection has been heard to carry out, and whom to fence off.

One per store, shared by its threads and its event loops: whoever connects next does it. A connection that was given up may
still have commands under way to the server, so its client id is killed first; what it had yet to read cannot overtake then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic

#: Releases kept at most; what does not fit ends with its lease.
MOST = 20_000
#: Seconds that a release is kept, where its lease does not end earlier; by then the keeper or the lease has done it.
KEEP = 60.0
#: Releases that one new connection carries out with its greeting.
AT_ONCE = 1000


class Leftovers:
    """Packed releases and client ids; every operation is one of deque's, and so atomic."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` is called when there is something to do that no connection of a request has to wait for."""
        self._wake = wake
        self.forget()

    def forget(self) -> None:
        """A forked child has nothing to carry on: its parent does."""
        self._releases: deque[tuple[bytes, float]] = deque(maxlen=MOST)
        self._clients: deque[int] = deque(maxlen=1000)

    def __bool__(self) -> bool:
        return bool(self._releases)

    def __len__(self) -> int:
        return len(self._releases)

    def add(self, releases: Sequence[bytes]) -> None:
        """To be carried out by the next connection."""
        now = monotonic()
        self._releases.extend((release, now) for release in releases)
        if releases:
            self._wake()

    def fence(self, client: int | None) -> None:
        """This connection was given up: nothing that it still has under way may be carried out."""
        if client is not None:
            self._clients.append(client)

    def pick_up(self) -> Work:
        """What a new connection has to do first. Given back with `put_back` if it cannot."""
        clients: list[int] = []
        releases: list[tuple[bytes, float]] = []
        oldest = monotonic() - KEEP
        while True:
            try:
                clients.append(self._clients.popleft())
            except IndexError:
                break
        while len(releases) < AT_ONCE:
            try:
                release = self._releases.popleft()
            except IndexError:
                break
            if release[1] > oldest:
                releases.append(release)
        return Work(clients, releases)

    def put_back(self, work: Work) -> None:
        """The connection that was to do it did not come about."""
        self._clients.extendleft(reversed(work.clients))
        self._releases.extendleft(reversed(work.releases))


class Work:
    """What one connection has taken upon itself."""

    __slots__ = ("clients", "releases")

    def __init__(self, clients: list[int], releases: list[tuple[bytes, float]]) -> None:
        self.clients, self.releases = clients, releases

"""Where the semaphores of an alias are: the one server that a connection has to be made to now.

A plain LOCATION says so itself. Sentinels and a Cluster are asked, and what they said is believed until a connection finds
that it is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Where(Protocol):
    """Shared by all connections of a store, its threads' and its event loops'."""

    #: Seconds between two looks; infinite where nobody needs them.
    look_every: float

    def keywords(self, deadline: float) -> Mapping[str, Any]:
        """What a new connection of a thread needs beyond the recipe's own keywords, such as host and port. Known, or asked for
        until `deadline` (monotonic seconds). Raises: redis.ConnectionError, redis.TimeoutError."""

    async def akeywords(self) -> Mapping[str, Any]:
        """The same on an event loop; the caller bounds its time."""

    def was_wrong(self, error: BaseException | None, conn: Any = None) -> bool:
        """This connection (None: one that is not known) was lost, refused, or told that its server is not the one (any more):
        READONLY, MOVED. Forget where it went to. Returns whether the next one may well go elsewhere at once."""

    def look(self, deadline: float) -> bool:
        """Ask whether what is known still holds, until `deadline`; in the keeper's thread. Returns whether that may be asked
        again soon: it did not keep the thread for nothing. Raises nothing."""

    def is_former(self, conn: Any) -> bool:
        """Does this connection go where nobody is to be asked any more?"""

    def forget(self) -> None:
        """In a forked child, and where threads have become greenlets: whoever asks just now is not here."""


class Fixed:
    """LOCATION is the server."""

    look_every = float("inf")

    def keywords(self, deadline: float) -> Mapping[str, Any]:
        return {}

    async def akeywords(self) -> Mapping[str, Any]:
        return {}

    def was_wrong(self, error: BaseException | None, conn: Any = None) -> bool:
        """There is no other."""
        return False

    def look(self, deadline: float) -> bool:
        """It is where it is."""
        return True

    def is_former(self, conn: Any) -> bool:
        return False

    def forget(self) -> None:
        """Nobody asks."""

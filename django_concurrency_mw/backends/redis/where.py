"""Where the semaphores of an alias are: the one server that a connection has to be made to now.

A plain LOCATION says so itself. Sentinels and a Cluster are asked, and what they said is believed until a connection finds
that it is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Where(Protocol):
    """Shared by all connections of a store, its threads' and its event loops'."""

    def keywords(self, deadline: float) -> Mapping[str, Any]:
        """What a new connection of a thread needs beyond the recipe's own keywords, such as host and port. Known, or asked for
        until `deadline` (monotonic seconds). Raises: redis.ConnectionError, redis.TimeoutError."""

    async def akeywords(self) -> Mapping[str, Any]:
        """The same on an event loop; the caller bounds its time."""

    def was_wrong(self, error: BaseException) -> bool:
        """A connection was lost, refused, or answered that it is not the one (any more): READONLY, MOVED. Ask again.

        Returns whether that may find another one now; not where it has just been asked.
        """


class Fixed:
    """LOCATION is the server."""

    def keywords(self, deadline: float) -> Mapping[str, Any]:
        return {}

    async def akeywords(self) -> Mapping[str, Any]:
        return {}

    def was_wrong(self, error: BaseException) -> bool:
        """There is no other."""
        return False

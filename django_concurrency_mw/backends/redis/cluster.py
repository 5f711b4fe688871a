"""Redis Cluster: which node serves the one hash slot that all keys of an alias stand in.

Any node knows: CLUSTER SLOTS, on a connection like all others, within the deadline of whoever wants to connect. What it said is
believed until a connection is lost or refused; a node that answers MOVED has said itself which one it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic, sleep
from typing import Any

from redis.crc import key_slot
from redis.exceptions import AuthenticationError, ConnectionError, RedisError, ResponseError

from .connecting import Recipe, areply, hang_up
from .redirects import Moved, Node, mapped
from .where import Fixed
from .wire import Keys, pack

SLOTS = pack(b"CLUSTER", b"SLOTS")
#: Seconds between two questions, at least, while nobody serves the slot.
PAUSE = 0.01
#: Nodes that are asked for one connection, at most.
MOST = 6
#: What a node, or the way to it, may fail with.
FAILS = (RedisError, OSError, EOFError, asyncio.TimeoutError)


class Unserved(ConnectionError):
    """By the word of one that was asked, nobody serves the slot; it may itself be no part of the Cluster (any more)."""


class Cluster(Fixed):
    """Shared without a lock: two that ask at once learn the same."""

    def __init__(self, recipe: Recipe, keys: Keys) -> None:
        self._recipe = recipe
        self.slot = key_slot(keys.prefix)
        self._node: Node | None = None
        #: Whom to ask next time, in this order.
        self._known: list[Node] = list(recipe.nodes)
        self._learned = self._asked = float("-inf")

    def keywords(self, deadline: float) -> Mapping[str, Any]:
        node = self._node
        if node is None:
            if (early := self._asked + PAUSE - monotonic()) > 0:
                sleep(early)
            node = self._ask(deadline)
        return node._asdict()

    async def akeywords(self) -> Mapping[str, Any]:
        node = self._node
        if node is None:
            if (early := self._asked + PAUSE - monotonic()) > 0:
                await asyncio.sleep(early)
            node = await self._aask()
        return node._asdict()

    def was_wrong(self, error: BaseException | None, conn: Any = None) -> bool:
        if self.is_former(conn):  # another one is known by now
            return True
        if isinstance(error, Moved):
            self._node, self._learned = error.node, monotonic()
            return True
        node, self._node = self._node, None
        if node is not None:  # it may be the one that does not know yet what has become of it
            self._known = [*[one for one in self._known if one != node], node]
        return monotonic() - max(self._learned, self._asked) > self._recipe.timeout

    def is_former(self, conn: Any) -> bool:
        node = self._node
        return node is not None and conn is not None and (conn.host, conn.port) != node

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ask(self, deadline: float) -> Node:
        asking = _Asking(self._candidates())
        for node in asking:
            now = monotonic()
            until = deadline if asking.last else now + (deadline - now) / 2
            conn: Any = None
            try:
                conn = self._recipe.connection(until, node)
                conn.connect()
                conn.send_packed_command([SLOTS], check_health=False)
                return self._heard(conn.read_response(disconnect_on_error=False), node)
            except FAILS as error:
                asking.failed(error)
            finally:
                if conn is not None:
                    conn.disconnect()
        raise asking.error()

    async def _aask(self) -> Node:
        asking = _Asking(self._candidates())
        left = 0.9 * self._recipe.timeout  # the caller has to connect within what is left
        for node in asking:
            left = left if asking.last else left / 2
            conn: Any = None
            try:
                async with asyncio.timeout(left):
                    conn = await self._recipe.async_connection(node)
                    await conn.connect()
                    await conn.send_packed_command([SLOTS], check_health=False)
                    reply = await areply(conn)
                if isinstance(reply, Exception):
                    raise reply
                return self._heard(reply, node)
            except FAILS as error:
                asking.failed(error)
            finally:
                if conn is not None:
                    await hang_up(conn)
        raise asking.error()

    def _candidates(self) -> list[Node]:
        self._asked = monotonic()
        nodes = list(dict.fromkeys([*self._known, *self._recipe.nodes]))
        self._known = [*nodes[MOST:], *nodes[:MOST]]  # if none of these answers, the others come first
        return nodes[:MOST]

    def _heard(self, reply: Any, asked: Node) -> Node:
        """Raises: Unserved."""
        found, others = None, []
        for first, last, *nodes in reply:
            heard = [mapped(_node(each, asked), self._recipe.address_remap) for each in nodes]
            others += heard
            if first <= self.slot <= last:
                found = heard[0]
        if found is None:
            raise Unserved(f"no node of the Cluster serves hash slot {self.slot} now")
        self._known = list(dict.fromkeys([asked, *others]))
        self._node, self._learned = found, monotonic()
        return found


class _Asking:
    """One round through the nodes: each in turn, and what they failed with. `last`: no other is left."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._errors: list[BaseException] = []
        self.last = False

    def __iter__(self) -> Iterator[Node]:
        for number, node in enumerate(self._nodes, 1):
            self.last = number == len(self._nodes)
            yield node

    def failed(self, error: BaseException) -> None:
        self._errors.append(error)

    def error(self) -> BaseException:
        """Of those that need somebody the first, as it is, or of those that answered; else one that says what the first was."""
        for kind in ((AuthenticationError, ResponseError), Unserved):
            for error in self._errors:
                if isinstance(error, kind):
                    return error
        first = self._errors[0]
        why = str(first) or type(first).__name__
        error = ConnectionError(f"no node of the Cluster could be asked ({len(self._errors)} tried): {why}")
        error.__cause__ = first
        return error


def _node(said: Sequence[Any], asked: Node) -> Node:
    """From `[host, port, id, [more]]`. No host: where the one that answers was reached; `?`: a name it has not."""
    host, port, *more = said
    host = _text(host)
    if host == "?" and len(more) > 1:
        details = more[1]  # a list of names and values by RESP 2, a map by RESP 3
        pairs = details.items() if isinstance(details, dict) else zip(details[::2], details[1::2], strict=False)
        host = {_text(name): _text(value) for name, value in pairs}.get("ip", "")
    return Node(host if host not in ("", "?") else asked.host, int(port))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value or "")

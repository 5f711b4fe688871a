"""What a node of a Redis Cluster says instead of an answer, as exceptions that say what to do. No I/O of its own.

MOVED and CLUSTERDOWN mean that nothing can be asked on this connection now, so they are lost connections: whoever has sent
something sends it again, in order, to the node that is found next. ASK is the answer to one command, whose keys are at another
node already: see `detour`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from redis.exceptions import ConnectionError, ResponseError

#: How redis-py names these where its parser knows them, which it does not before version 6; their text has no code then.
_CODES = {
    "MovedError": "MOVED",
    "AskError": "ASK",
    "ClusterDownError": "CLUSTERDOWN",
    "TryAgainError": "TRYAGAIN",
    "ClusterCrossSlotError": "CROSSSLOT",
}
#: What a script says that met a key there is none of here, or no more: it is at the other node, or will be. The second is of
#: Redis 7.2 and Valkey 8, where some of a command's keys are here, or where this is the new node. See `moves` in lines.lua.
NOT_HERE = ("access a non local key", "rehashing of the slot")


class Node(NamedTuple):
    """Where a node is reached; both are keywords of a connection, too."""

    host: str
    port: int


#: What makes of the host and port that a node tells those that are reached from here.
Remap = Callable[[tuple[str, int]], tuple[str, int]]


def mapped(node: Node, remap: Remap | None) -> Node:
    """Where a node of which another one told is reached from here."""
    if remap is None:
        return node
    host, port = remap((node.host, node.port))
    return Node(str(host), int(port))  # as a connection says where it goes, which is compared


class Moved(ConnectionError):
    """Nothing was carried out: the slot is at another node."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"the hash slot is served by {node.host}:{node.port}")
        self.node = node


class Down(ConnectionError):
    """Nothing was carried out: this node does not reach most of the others, or nobody serves the slot."""


class Ask(ResponseError):
    """Nothing was carried out: the slot is moving, and this command's keys are at the other node already (or do not exist)."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"ASK: the hash slot is moving to {node.host}:{node.port}, which could not be asked")
        self.node = node


def code(error: BaseException) -> str:
    """The first word of what the server said."""
    return _CODES.get(type(error).__name__) or str(error).partition(" ")[0]


def tries_again(error: BaseException | None) -> bool:
    """The keys of one command are at two nodes, or nowhere yet, while their slot moves: it goes by."""
    if not isinstance(error, ResponseError):
        return False
    return code(error) == "TRYAGAIN" or any(words in str(error) for words in NOT_HERE)


def redirection(error: ResponseError, host: str, remap: Remap | None) -> Exception | None:
    """What this error of the node at `host` means; None: it is none of these."""
    said = code(error)
    if said == "CLUSTERDOWN":
        return Down(str(error))
    if said not in ("MOVED", "ASK"):
        return None
    there, _, port = str(error).rpartition(" ")[2].rpartition(":")
    # No host: the one that was asked. (`?`: it has no host name, though it was told to announce that.)
    node = mapped(Node(there if there not in ("", "?") else host, int(port)), remap)
    return Moved(node) if said == "MOVED" else Ask(node)


def following(connection_class: Any, remap: Remap | None) -> Any:
    """The same kind of connection, of threads or of event loops, that knows what errors mean: see `understood`."""

    class Following(connection_class):  # type: ignore[misc]  # chosen at run time
        def meaning(self, error: ResponseError) -> Exception | None:
            return redirection(error, self.host, remap)

    return Following


def understood(conn: Any, error: ResponseError) -> ResponseError:
    """The error as what it means, if the connection is to a node. Asked of errors alone, as replies must cost nothing.

    Raises: Moved, Down.
    """
    meaning = getattr(conn, "meaning", None)
    meant: Exception | None = meaning(error) if meaning is not None else None
    if meant is None:
        return error
    if isinstance(meant, ResponseError):
        return meant
    raise meant from error


def raising(connection_class: Any) -> Any:
    """One of threads that raises what errors mean, for redis-py's ordinary clients."""

    class Raising(connection_class):  # type: ignore[misc]  # chosen at run time
        def read_response(self, *arguments: Any, **keywords: Any) -> Any:
            try:
                return super().read_response(*arguments, **keywords)
            except ResponseError as error:
                meant = understood(self, error)
                if meant is error:
                    raise
                raise meant from error

    return Raising

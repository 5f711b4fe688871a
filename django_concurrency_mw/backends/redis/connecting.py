"""How a connection is made: LOCATION and OPTIONS to redis-py's own connection class and keywords, and one deadline.

TLS, passwords, ACL users and unix sockets stay redis-py's. Its timeouts are per socket call, though, and a connection takes
several: here one deadline covers connecting, the handshake and the reply together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import redis
import redis.asyncio
from django.core.exceptions import ImproperlyConfigured
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, parse_url
from redis.exceptions import ConnectionError, RedisError, ResponseError
from redis.retry import Retry

from ...afresh import are_greenlets
from ..base import BackendConfig
from .errors import is_demoted
from .options import (
    DATABASE_0,
    SCHEMES,
    checked,
    keywords_of,
    seconds,
    startup_nodes,
    take_cluster,
    without_password,
    without_query,
)
from .redirects import Node, Remap, following, raising, understood
from .sockets import ReplySocket, in_time, left_until
from .where import Fixed, Where

DEFAULT_LOCATION = "redis://127.0.0.1:6379/0"
DEFAULT_TIMEOUT = 0.25
#: Seconds that a call by hand may take.
BY_HAND = 5.0


class Recipe:
    """What a store needs to make its connections. `timeout` is in seconds; `server` tells servers apart, for checks.

    Raises: ImproperlyConfigured for a LOCATION or an option that cannot work, by name; `at` is the place of the URL.
    """

    def __init__(self, config: BackendConfig, at: str = "") -> None:
        place = config.place
        at = at or f"{place}['LOCATION']"
        location = DEFAULT_LOCATION if config.location is None else config.location
        options = dict(config.options)
        #: Those to ask of a Cluster; none: LOCATION is the server.
        self.nodes: tuple[Node, ...] = ()
        #: Of a Cluster: what makes of an address that a node told one that is reached from here.
        self.address_remap: Remap | None = None
        if take_cluster(options, f"{place}['OPTIONS']"):
            location, self.nodes = startup_nodes(location, f"{place}['LOCATION']")
            self.address_remap = options.pop("address_remap", None)
        if not isinstance(location, str) or not location.startswith(SCHEMES):
            raise ImproperlyConfigured(
                f"{at}: expected a URL such as {DEFAULT_LOCATION!r} ({', '.join(SCHEMES)}), "
                f"got {without_password(location)}"
                + (
                    "; a list is for a Cluster, with OPTIONS['cluster'] = True"
                    if isinstance(location, (list, tuple))
                    else ""
                )
            )
        bare, asked = without_query(location, at)
        # Options may stand in the URL too; redis-py lets those win over keywords, and so do we, but checked like the others.
        options |= asked
        self.timeout = seconds(options.pop("socket_timeout", DEFAULT_TIMEOUT), f"{place}['OPTIONS']['socket_timeout']")
        known = redis.ConnectionPool.from_url(bare)
        more = checked(options, known.connection_class, f"{place}['OPTIONS']")
        # Integers read the same in RESP 2 and 3; 2 has the shorter handshake.
        wanted = {"protocol": 2, **options, **more}
        wanted |= {"decode_responses": False, "health_check_interval": 0, "socket_connect_timeout": self.timeout}
        self._quiet = _quiet(known.connection_class)
        threads = redis.ConnectionPool.from_url(
            bare, **wanted, **self._quiet, retry=Retry(NoBackoff(), 0), socket_timeout=self.timeout
        )
        if self.nodes and int(threads.connection_kwargs.get("db") or 0):
            raise ImproperlyConfigured(f"{place}['OPTIONS']['db']: {DATABASE_0}")
        kind = following(threads.connection_class, self.address_remap) if self.nodes else threads.connection_class
        self._plain_class = raising(kind) if self.nodes else kind
        _try_out(threads, place)
        self.class_: type[AbstractConnection] = _with_deadline(kind)
        self.keywords = dict(threads.connection_kwargs)
        loops = redis.asyncio.ConnectionPool.from_url(
            bare,
            **wanted,
            **_quiet(getattr(redis.asyncio.connection, known.connection_class.__name__)),
            retry=AsyncRetry(NoBackoff(), 0),
            socket_timeout=None,
        )
        self.async_class: Any = (
            following(loops.connection_class, self.address_remap) if self.nodes else loops.connection_class
        )
        self.async_keywords = dict(loops.connection_kwargs)
        self.where: Where = Fixed()
        #: Called when it is known, or known anew, where to connect to: others may be connected elsewhere.
        self.found: Callable[[], None] = lambda: None
        self.server = server_of(self.keywords)

    def connection(self, deadline: float, there: Node | None = None, **keywords: Any) -> Any:
        """A connection for threads, to be made within `deadline` (monotonic seconds). Raises: RedisError, OSError."""
        extra = self._found(self.where.keywords(deadline)) if there is None else there._asdict()
        conn: Any = self.class_(**{**self.keywords, **keywords, **extra})  # redis-py is untyped here
        conn.deadline = deadline
        return conn

    async def async_connection(self, there: Node | None = None) -> Any:
        """A connection for the running event loop. Raises: RedisError, OSError."""
        extra = self._found(await self.where.akeywords()) if there is None else there._asdict()
        return self.async_class(**{**self.async_keywords, **extra})

    def gave_up(self, conn: Any, error: BaseException | None = None) -> None:
        """This connection was lost, or did not come about; the error may be one that another server would not give."""
        if self.where.was_wrong(error, conn) and error is not None:
            error.elsewhere = True  # type: ignore[attr-defined]  # for is_final

    def client(self, there: Node | None = None, kind: type[redis.Redis] = redis.Redis) -> redis.Redis:
        """An ordinary client, for what is asked once in a while and by hand. The caller closes it."""
        extra = self.where.keywords(monotonic() + BY_HAND) if there is None else there._asdict()
        pool = redis.ConnectionPool(
            connection_class=self._plain_class,
            max_connections=1,
            **self._quiet,
            **{**self.keywords, **extra, "socket_timeout": BY_HAND},
        )
        return kind.from_pool(pool)  # so it is the client's own: else to close the client would close nothing

    def _found(self, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        self.found()
        return keywords


def _try_out(pool: redis.ConnectionPool, place: str) -> None:
    """Make a connection, which connects to nothing: by that redis-py says what it takes. Raises: ImproperlyConfigured."""
    try:
        pool.connection_class(**pool.connection_kwargs)
    except (RedisError, ValueError, TypeError, AttributeError) as error:
        raise ImproperlyConfigured(f"{place}['OPTIONS']: {' '.join(str(error).split())}") from None


def server_of(keywords: Mapping[str, Any]) -> tuple[str, int, int]:
    """Which server, and which of its databases, a connection with these keywords is to. Names are compared, not looked up."""
    database = int(keywords.get("db") or 0)
    path = keywords.get("path")
    if path:
        return str(path), 0, database
    host = str(keywords.get("host") or "localhost").lower()
    here = host in ("localhost", "127.0.0.1", "::1", "[::1]")
    return "localhost" if here else host, int(keywords.get("port") or 6379), database


def server_of_url(url: str, options: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """The same of a URL of another program's, whose query wins over its options; None where it cannot be read."""
    try:
        return server_of({**options, **parse_url(url)})  # type: ignore[no-untyped-call]  # redis-py's
    except (ValueError, TypeError):
        return None


def _quiet(connection_class: type) -> dict[str, Any]:
    """With RESP 3 redis-py asks the server, from its version 7 on, to tell of its own maintenance: one more round trip, for the
    good of a pool that is not there; and such a connection cannot be made to speak RESP 2, as the ear does."""
    if "maint_notifications_config" not in keywords_of(connection_class):
        return {}
    from redis.maint_notifications import MaintNotificationsConfig

    return {"maint_notifications_config": MaintNotificationsConfig(enabled=False)}


def _with_deadline(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    """The same kind of connection, with one deadline for all that happens on its socket."""

    class Bounded(connection_class):  # type: ignore[misc,valid-type]  # chosen at run time
        deadline = 0.0
        socket_timeout: Any

        def _connect(self) -> Any:
            step = self.socket_timeout if are_greenlets() else None

            def bound() -> float:
                left = left_until(self.deadline, step)
                self.socket_connect_timeout = self.socket_timeout = left  # the latter for the handshake of TLS
                return left

            self.bounded_socket = ReplySocket(in_time(bound, super()._connect), self.deadline, step)
            return self.bounded_socket

        def until(self, deadline: float) -> None:
            """Everything from here on has to be over at `deadline` (monotonic seconds)."""
            self.deadline = self.bounded_socket.deadline = deadline

    return Bounded


async def areply(conn: Any) -> Any:
    """One reply, on an event loop; an error of the server's is returned. Raises: whatever means that the connection is lost."""
    try:
        return await conn.read_response(disconnect_on_error=False)
    except ResponseError as error:
        return refusal(conn, error)


def refusal(conn: Any, error: ResponseError) -> Exception:
    """What an error of the server's means. Raises: ConnectionError where it means that the connection is lost."""
    if is_demoted(error):  # ask again where the master is
        raise ConnectionError(str(error)) from error
    return understood(conn, error)


def send(transport: asyncio.WriteTransport, packed: bytes) -> None:
    """Send it, on an event loop, and do not wait for that: redis-py's way takes a task, and would connect by itself. Whoever
    reads sees when the connection is lost."""
    if not transport.is_closing():
        transport.write(packed)


async def hang_up(conn: Any) -> None:
    """Close it at once, on an event loop."""
    writer = getattr(conn, "_writer", None)  # private: close() alone would wait for a black hole to drink its buffer
    if writer is not None:
        writer.transport.abort()
    await conn.disconnect(nowait=True)

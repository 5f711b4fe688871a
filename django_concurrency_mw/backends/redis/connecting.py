"""How a connection is made: LOCATION and OPTIONS to redis-py's own connection class and keywords, and one deadline.

TLS, passwords, ACL users and unix sockets stay redis-py's. Its timeouts are per socket call, though, and a connection takes
several: here one deadline covers connecting, the handshake and the reply together.
"""

from __future__ import annotations

import inspect
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl

import redis
import redis.asyncio
from django.core.exceptions import ImproperlyConfigured
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import AbstractConnection, parse_url
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, ResponseError
from redis.retry import Retry

from ...afresh import are_greenlets
from ..base import BackendConfig

DEFAULT_LOCATION = "redis://127.0.0.1:6379/0"
DEFAULT_TIMEOUT = 0.25
#: Of greenlets each step may take the time of a call, and a call so many of these in all.
STEPS = 20
SCHEMES = ("redis://", "rediss://", "unix://")
#: Part of the public face, and carried out by a later version.
LATER = ("sentinels", "master_name", "cluster")
#: What would break the exchange of raw replies, or takes the deadline out of our hands.
REFUSED = {
    "decode_responses": "the store reads raw replies",
    "retry": "a request retries nothing; ON_BACKEND_ERROR decides",
    "retry_on_timeout": "a request retries nothing; ON_BACKEND_ERROR decides",
    "retry_on_error": "a request retries nothing; ON_BACKEND_ERROR decides",
    "socket_connect_timeout": "socket_timeout is one deadline for connecting, handshake and reply together",
    "health_check_interval": "a dead connection is found by its use",
    "parser_class": "the store chooses it",
    "connection_pool": "the store keeps its own connections",
    "max_connections": "the store keeps as many connections as calls are under way at once",
}


class Recipe:
    """What a store needs to make its connections. `timeout` is in seconds.

    Raises: ImproperlyConfigured for a LOCATION or an option that cannot work, by name.
    """

    def __init__(self, config: BackendConfig) -> None:
        place = config.place
        location = DEFAULT_LOCATION if config.location is None else config.location
        if not isinstance(location, str) or not location.startswith(SCHEMES):
            raise ImproperlyConfigured(
                f"{place}['LOCATION']: expected a URL such as {DEFAULT_LOCATION!r} ({', '.join(SCHEMES)}), "
                f"got {_without_password(location)}"
            )
        bare, asked = _without_query(location, f"{place}['LOCATION']")
        # Options may stand in the URL too; redis-py lets those win over keywords, and so do we, but checked like the others.
        options = {**config.options, **asked}
        self.timeout = _timeout(options.pop("socket_timeout", DEFAULT_TIMEOUT), f"{place}['OPTIONS']['socket_timeout']")
        known = redis.ConnectionPool.from_url(bare)
        _check_options(options, _keywords(known.connection_class), f"{place}['OPTIONS']")
        # Integers read the same in RESP 2 and 3; 2 has the shorter handshake.
        wanted = {"protocol": 2, **options}
        wanted |= {"decode_responses": False, "health_check_interval": 0, "socket_connect_timeout": self.timeout}
        threads = redis.ConnectionPool.from_url(
            bare, **wanted, retry=Retry(NoBackoff(), 0), socket_timeout=self.timeout
        )
        self._plain_class = threads.connection_class
        self.class_: type[AbstractConnection] = _with_deadline(threads.connection_class)
        self.keywords = dict(threads.connection_kwargs)
        loops = redis.asyncio.ConnectionPool.from_url(
            bare, **wanted, retry=AsyncRetry(NoBackoff(), 0), socket_timeout=None
        )
        self.async_class: Any = loops.connection_class
        self.async_keywords = dict(loops.connection_kwargs)

    def client(self) -> redis.Redis:
        """An ordinary client, for what is asked once in a while and by hand. The caller closes it."""
        pool = redis.ConnectionPool(
            connection_class=self._plain_class, max_connections=1, **{**self.keywords, "socket_timeout": 5.0}
        )
        return redis.Redis(connection_pool=pool)


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


def _without_query(location: str, place: str) -> tuple[str, dict[str, Any]]:
    """The URL by itself, and the options in its query. Raises: ImproperlyConfigured."""
    bare, _, query = location.partition("?")
    try:
        by_itself, whole = parse_url(bare), parse_url(location)  # type: ignore[no-untyped-call]  # redis-py's
        if "@" in query:
            raise ValueError
    except ValueError:  # its message may repeat the password
        raise ImproperlyConfigured(
            f"{place}: {_without_password(location)} cannot be used: not a valid URL, or a value in its query is not (in a "
            "password `/ ? # @ :` have to be percent-encoded)"
        ) from None
    names = {name for name, _ in parse_qsl(query, keep_blank_values=True)}
    return bare, {
        name: whole.get(name, "") for name in names if name not in by_itself or whole.get(name) != by_itself[name]
    }


def _without_password(location: object) -> str:
    if not isinstance(location, str):
        return f"a {type(location).__name__}"
    return repr(re.sub(r"[?#].*", "", re.sub(r"//.*@", "//...@", location)))


def _timeout(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.001 <= value <= 3600:
        raise ImproperlyConfigured(f"{place}: expected seconds from 0.001 to 3600, got {value!r}")
    return float(value)


def _keywords(connection_class: type) -> set[str]:
    """Every keyword that this kind of connection takes, its bases' included."""
    names: set[str] = set()
    for cls in connection_class.__mro__:
        if "__init__" in vars(cls):
            for parameter in inspect.signature(vars(cls)["__init__"]).parameters.values():
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                    names.add(parameter.name)
    return names - {"self"}


def _check_options(options: Mapping[str, Any], known: set[str], place: str) -> None:
    wrong = []
    for name in options:
        if name in LATER:
            wrong.append(f"{place}[{name!r}]: {name} is not carried out by this version yet")
        elif name in REFUSED:
            wrong.append(f"{place}[{name!r}]: {name} cannot be set: {REFUSED[name]}")
        elif name not in known:
            near = get_close_matches(str(name), known, n=1)
            wrong.append(
                f"{place}[{name!r}]: redis-py's connection has no {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    if wrong:
        raise ImproperlyConfigured("\n".join(wrong))


class DeadlineSocket:
    """A socket whose every call has what is left until `deadline` (monotonic seconds), to within 5 percent.

    A greenlet that waits comes to its turn when all the others have had theirs, in a burst long after the reply has come: that
    time would be held against the server. So each of its calls has `step` seconds of its own (None: there are threads).
    """

    def __init__(self, inner: socket.socket, deadline: float, step: float | None) -> None:
        self._inner, self.deadline, self._step, self._set = inner, deadline, step, 0.0

    def recv(self, *arguments: Any) -> bytes:
        return in_time(self._bound, self._inner.recv, *arguments)  # type: ignore[no-any-return]  # what recv returns

    def recv_into(self, *arguments: Any) -> int:
        return in_time(self._bound, self._inner.recv_into, *arguments)  # type: ignore[no-any-return]  # and recv_into

    def sendall(self, *arguments: Any) -> None:
        self._bound()
        self._inner.sendall(*arguments)

    def settimeout(self, value: float | None) -> None:
        """redis-py sets the timeout of the call to come; ours is the deadline."""

    def _bound(self) -> float:
        left = left_until(self.deadline, self._step)
        if not 0.95 * self._set <= left <= 1.05 * self._set:  # setting it is a system call, and mostly it stands
            self._inner.settimeout(left)
            self._set = left
        return left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def left_until(deadline: float, step: float | None) -> float:
    """Seconds that the next call may take. Raises: TimeoutError where that is none."""
    left = deadline - monotonic()
    if step is not None and left > -STEPS * step:
        return step
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def in_time(bound: Callable[[], float], call: Callable[..., Any], *arguments: Any) -> Any:
    """Make this call, once more where it gives up too early: the timers of greenlets begin with the turn of all the others."""
    while True:
        left, began = bound(), monotonic()
        try:
            return call(*arguments)
        except TimeoutError as error:
            if error.errno is not None or monotonic() - began > 0.9 * left:  # the kernel's own comes once
                raise


def _with_deadline(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    """The same kind of connection, with one deadline for all that happens on its socket."""

    class Bounded(connection_class):  # type: ignore[misc,valid-type]  # chosen at run time
        deadline = 0.0

        def _connect(self) -> Any:
            step = self.socket_timeout if are_greenlets() else None

            def bound() -> float:
                self.socket_connect_timeout = left_until(self.deadline, step)
                return self.socket_connect_timeout

            self.bounded_socket = DeadlineSocket(in_time(bound, super()._connect), self.deadline, step)
            return self.bounded_socket

        def until(self, deadline: float) -> None:
            """Everything from here on has to be over at `deadline` (monotonic seconds)."""
            self.deadline = self.bounded_socket.deadline = deadline

    return Bounded


def passes(reply: object) -> bool:
    """Is this reply an error that goes by: busy, short of memory or disk, loading? What is forbidden or nonsense stays so."""
    if not isinstance(reply, ResponseError) or isinstance(reply, NoPermissionError):
        return False
    return not str(reply).startswith(
        ("WRONGTYPE", "unknown command", "ERR unknown command", "NOPERM", "CROSSSLOT")
    ) and ("unknown redis command" not in str(reply).lower())


def is_final(error: BaseException | None) -> bool:
    """Would another try within milliseconds find the same? Nobody listens, a certificate or a password is wrong, ..."""
    if isinstance(error, (AuthenticationError, BusyLoadingError, ResponseError)):
        return True
    while error is not None and (error.__cause__ is not None or error.__context__ is not None):
        error = error.__cause__ or error.__context__
    return isinstance(
        error, (ConnectionRefusedError, FileNotFoundError, PermissionError, socket.gaierror, ssl.SSLError)
    )

"""Where the master is, by the word of Redis Sentinel: asked when it is not known, believed until a connection finds it wrong.

One deadline for asking: each sentinel has its share of what is left, and one more share is kept for the connection itself, so
that a sentinel that is dead or does not answer costs no request its whole time. Whoever needs the address meanwhile waits for
the one answer; event loops ask in a thread, which is the same piece of code.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ConnectionError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from .errors import SentinelRefused, is_demoted, is_final
from .where import Where

#: Seconds for which an answer is not asked for again in the same call: whoever finds it wrong has just been told it.
FRESH = 0.1
#: Seconds between two looks. A master that is replaced as planned takes itself for one ten seconds longer, and answers: so long
#: some count there and some at the new one.
LOOK_EVERY = 1.0


class Sentinel(NamedTuple):
    """One of them: how people call it, and what makes a connection to it that has to be over at a deadline."""

    name: str
    connect: Callable[[float], Any]


class Known(NamedTuple):
    """A master's address, and since when it is known (monotonic seconds)."""

    host: str
    port: int
    since: float

    def is_of(self, conn: Any) -> bool:
        return (self.host, self.port) == (conn.host, conn.port)


class Sentinels(Where):
    """The master called `master_name`. `timeout`: seconds that an event loop has."""

    def __init__(self, master_name: str, sentinels: Sequence[Sentinel], timeout: float) -> None:
        self._master_name, self._timeout = master_name, timeout
        #: Who answered last stands first, who was wrong last.
        self._order = deque(sentinels)
        self._known: Known | None = None
        #: Believed if no sentinel answers: nothing was wrong with it but that a connection was lost.
        self._doubted: Known | None = None
        self.look_every = LOOK_EVERY
        self.forget()

    def forget(self) -> None:
        self._asking = threading.Lock()

    def keywords(self, deadline: float) -> Mapping[str, Any]:
        known = self._known or self._find(deadline)
        return {"host": known.host, "port": known.port}

    async def akeywords(self) -> Mapping[str, Any]:
        known = self._known
        if known is None:
            deadline = monotonic() + self._timeout
            known = await _in_a_thread(lambda: self._find(deadline))
        return {"host": known.host, "port": known.port}

    def was_wrong(self, error: BaseException | None, conn: Any = None) -> bool:
        known = self._known
        if known is None or (conn is not None and not known.is_of(conn)):
            return True  # another one is known by now, or asked for
        demoted = error is not None and (is_demoted(error) or is_demoted(error.__cause__))
        self._doubted = None if demoted or is_final(error) else known
        self._known = None
        if error is not None:  # who said so has not heard of it yet, is cut off, or has begun anew with an old file
            self._order.rotate(-1)
        return known.since < monotonic() - FRESH

    def look(self, deadline: float) -> bool:
        known = self._known
        if known is None or not self._asking.acquire(blocking=False):
            return True  # whoever needs it asks, or does so just now
        try:
            answer = self._ask(deadline)
            if self._known is known and answer[:2] != known[:2]:
                self._known = answer
        except (RedisError, OSError):
            return False
        finally:
            self._asking.release()
        return True

    def is_former(self, conn: Any) -> bool:
        known = self._known
        return known is not None and not known.is_of(conn)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _find(self, deadline: float) -> Known:
        """Known by now, or asked for. Raises: ConnectionError, TimeoutError, SentinelRefused."""
        if not self._asking.acquire(timeout=max(0.0, deadline - monotonic())):
            raise TimeoutError(f"no sentinel has said in time where the master {self._master_name!r} is")
        try:
            known = self._known  # somebody else has asked meanwhile
            if known is None:
                try:
                    known = self._ask(deadline)
                except (ConnectionError, SentinelRefused):
                    known = self._doubted
                    if known is None:
                        raise
                self._known = known
            return known
        finally:
            self._asking.release()

    def _ask(self, deadline: float) -> Known:
        order = list(self._order)
        said: list[str] = []
        refused: SentinelRefused | None = None
        last: Exception | None = None
        for number, sentinel in enumerate(order):
            share = (deadline - monotonic()) / (len(order) - number + 1)
            try:
                answer = _answer(sentinel.connect(monotonic() + share), self._master_name)
            except (AuthenticationError, AuthorizationError, ResponseError) as error:
                refused = refused or _refused(sentinel.name, error)
            except (RedisError, OSError) as error:
                last = error
                said.append(f"{sentinel.name}: {error}")
            else:
                if answer is not None:
                    self._first(sentinel)
                    return Known(*answer, monotonic())
                refused = refused or _unknown(sentinel.name, self._master_name)
        if refused is not None:
            raise refused
        raise ConnectionError(
            f"no sentinel says where the master {self._master_name!r} is: {'; '.join(said)}"
        ) from last

    def _first(self, sentinel: Sentinel) -> None:
        if self._order[0] is not sentinel:
            with contextlib.suppress(ValueError):
                self._order.remove(sentinel)
                self._order.appendleft(sentinel)


def _answer(conn: Any, master_name: str) -> tuple[str, int] | None:
    """Raises: RedisError, OSError."""
    try:
        conn.connect()
        # Unlike SENTINEL MASTER it names the new one as soon as it is promoted, when other replicas do not follow it yet.
        conn.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", master_name)
        reply = conn.read_response()
    finally:
        conn.disconnect()
    if not reply:
        return None
    host, port = (each.decode() if isinstance(each, bytes) else str(each) for each in reply)
    return host, int(port)


def _refused(name: str, error: Exception) -> SentinelRefused:
    text = f"the sentinel {name} refuses: {error}"
    if isinstance(error, ResponseError) and "unknown command" in str(error).lower():
        return SentinelRefused(text, "OPTIONS['sentinels'] are the URLs of Redis Sentinels, whose port is mostly 26379")
    return SentinelRefused(
        text,
        "put the user and the password of the sentinels into the URLs of OPTIONS['sentinels']; a user of theirs needs "
        "+sentinel|get-master-addr-by-name",
    )


def _unknown(name: str, master_name: str) -> SentinelRefused:
    return SentinelRefused(
        f"the sentinel {name} knows no master {master_name!r}",
        "OPTIONS['master_name'] is the name in the sentinels' `sentinel monitor <name> ...`",
    )


async def _in_a_thread(call: Callable[[], Known]) -> Known:
    """Not in the loop's executor, which the project's code may keep busy."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Known] = loop.create_future()

    def settle(known: Known | None, error: BaseException | None) -> None:
        if future.done():
            return
        if known is not None:
            future.set_result(known)
        else:
            future.set_exception(error or ConnectionError())

    def work() -> None:
        known, raised = None, None
        try:
            known = call()
        except BaseException as error:
            raised = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, known, raised)

    threading.Thread(target=work, name="concurrency-sentinel", daemon=True).start()
    return await future

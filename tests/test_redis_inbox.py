"""What comes in on an event loop's connection: in order, whoever reads it, and whatever becomes of the connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from time import monotonic
from typing import Any

import pytest
import redis.asyncio
from redis.exceptions import ConnectionError, ResponseError

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis import mux as mux_module
from django_concurrency_mw.backends.redis.connecting import areply, hang_up
from django_concurrency_mw.backends.redis.inbox import Inbox
from django_concurrency_mw.backends.redis.leftovers import Release, Work
from django_concurrency_mw.backends.redis.mux import Command, Mux
from django_concurrency_mw.backends.redis.redirects import Ask, Node
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import pack
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .proxy import Proxy
from .redis_server import RedisServer
from .striking import struck_at
from .support import SOON, await_until, wait_until


class Server:
    """The other end of one connection: it says what the test says, once redis-py has been greeted."""

    def __init__(self) -> None:
        self.writer: asyncio.StreamWriter | None = None
        self.greeted = False
        self.left = asyncio.Event()

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        try:
            while said := await reader.read(65_536):
                if not self.greeted:
                    hello = b"%1\r\n+proto\r\n:3\r\n" if b"HELLO" in said else b""
                    writer.write(hello + b"+OK\r\n" * ((b"\r\n" + said).count(b"\r\n*") - bool(hello)))
        except OSError:
            pass
        self.left.set()
        writer.close()

    def say(self, text: bytes) -> None:
        assert self.writer is not None
        self.writer.write(text)

    def hang_up(self) -> None:
        assert self.writer is not None
        self.writer.close()

    def reset(self) -> None:
        assert self.writer is not None
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


@asynccontextmanager
async def connected(protocol: int = 2) -> AsyncIterator[tuple[Any, Server]]:
    server = Server()
    async with await asyncio.start_server(server.meet, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        conn: Any = redis.asyncio.Connection(host="127.0.0.1", port=port, protocol=protocol)
        await conn.connect()
        server.greeted = True
        try:
            yield conn, server
        finally:
            await hang_up(conn)
            await asyncio.wait_for(server.left.wait(), SOON)


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main, SOON))


async def read_on(conn: Any, inbox: Inbox, heard: list[Any]) -> None:
    """As a mux does."""
    while True:
        await inbox.other()
        heard.append(await areply(conn))
        inbox.go_on()


SAID = b":1\r\n:-2\r\n+OK\r\n:3\r\n*2\r\n:4\r\n:5\r\n-ERR no\r\n-ERR nor\r\n$6\r\n:6\r\n:7\r\n*2\r\n:8\r\n+no\r\n*0\r\n:9\r\n"
MEANS = [1, -2, b"OK", 3, [4, 5], "no", "nor", b":6\r\n:7", [8, b"no"], [], 9]
PUSH = b">2\r\n+invalidate\r\n*1\r\n$1\r\nk\r\n"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("protocol", [2, 3])
def test_all_is_heard_in_order_in_whatever_pieces_it_comes(protocol: int, size: int) -> None:
    """What RESP 3 tells unasked, between replies, is no reply."""
    said = SAID.replace(b":3\r\n", PUSH + b":3\r\n").replace(b"-ERR nor", PUSH + b"-ERR nor") if protocol == 3 else SAID

    async def main() -> None:
        heard: list[Any] = []
        async with connected(protocol) as (conn, _):
            inbox = Inbox(conn, heard.extend)
            reading = asyncio.create_task(read_on(conn, inbox, heard))
            for at in range(0, len(said), size):
                conn._writer.transport.get_protocol().data_received(said[at : at + size])
                if at % 2:
                    await asyncio.sleep(0)
            assert await await_until(lambda: len(heard) >= len(MEANS))
            assert [str(one) if isinstance(one, ResponseError) else one for one in heard] == MEANS
            reading.cancel()

    run(main())


def test_what_is_no_number_keeps_all_behind_it_until_it_is_answered() -> None:
    async def main() -> None:
        heard: list[Any] = []
        async with connected() as (conn, server):
            inbox = Inbox(conn, heard.extend)
            server.say(b":1\r\n-ASK 1 h:1\r\n:2\r\n")
            await inbox.other()
            server.say(b":3\r\n")
            assert isinstance(await areply(conn), ResponseError)
            assert await await_until(lambda: inbox._unread == b":2\r\n:3\r\n")
            assert heard == [1]
            inbox.go_on()
            assert heard == [1, 2, 3]
            waiting = asyncio.create_task(inbox.other())
            await asyncio.sleep(0)
            assert not waiting.done(), "there is nothing to read"
            server.say(b"+OK\r\n")
            await waiting

    run(main())


class TestTheConnectionIsLost:
    def test_of_which_redis_py_hears(self) -> None:
        """What came before counts still; of what is cut off nobody hears."""

        async def main() -> None:
            heard: list[Any] = []
            async with connected() as (conn, server):
                inbox = Inbox(conn, heard.extend)
                server.say(b"-ERR no\r\n:1\r\n-ERR nor\r\n:2\r\n:3")
                await inbox.other()
                server.hang_up()
                assert await await_until(lambda: inbox._lost)
                with pytest.raises(ConnectionError, match=r"(?i)closed by server"):
                    await read_on(conn, inbox, heard)
                assert [str(one) for one in heard] == ["no", "1"]

        run(main())

    def test_before_anybody_reads(self) -> None:
        """Then the transport says no more of it."""

        async def main() -> None:
            async with connected() as (conn, server):
                server.hang_up()
                assert await await_until(conn._reader.at_eof)
                with pytest.raises(ConnectionError):
                    Inbox(conn, lambda numbers: None)

        run(main())

    def test_by_a_reset_before_anybody_reads(self) -> None:
        """Which is no end of the stream but an error of it."""

        async def main() -> None:
            async with connected() as (conn, server):
                server.reset()
                assert await await_until(lambda: conn._reader.exception() is not None)
                with pytest.raises(ConnectionError):
                    Inbox(conn, lambda numbers: None)

        run(main())

    def test_by_us_while_redis_py_sleeps(self) -> None:
        async def main() -> None:
            async with connected() as (conn, _):
                reading = asyncio.create_task(read_on(conn, Inbox(conn, lambda numbers: None), []))
                await asyncio.sleep(0)
                await conn.disconnect(nowait=True)
                with pytest.raises(ConnectionError):
                    await reading

        run(main())

    def test_by_a_reply_that_nobody_can_read(self) -> None:
        """A number, at once or behind what redis-py reads; and what redis-py alone finds to be none."""

        async def main(said: bytes) -> None:
            heard: list[Any] = []
            async with connected() as (conn, server):
                inbox = Inbox(conn, heard.extend)
                server.say(said)
                with pytest.raises(redis.RedisError, match="one" if b":" in said else None):
                    await read_on(conn, inbox, heard)
                if b":" in said:
                    await asyncio.wait_for(server.left.wait(), SOON)  # it is closed already
                    assert 1 not in heard

        for said in (b":one\r\n:1\r\n", b"+OK\r\n:one\r\n:1\r\n", b"?\r\n"):
            run(main(said))

    @pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
    def test_by_whatever_cuts_short_what_is_done_about_a_reply(self, error: type[BaseException]) -> None:
        """Nobody knows whose the next one is."""

        async def main() -> None:
            heard: list[Any] = []

            def hear(numbers: Sequence[int | list[int]]) -> None:
                heard.extend(numbers)
                raise error

            async with connected() as (conn, server):
                inbox = Inbox(conn, hear)
                # What is an interrupt is one.
                with pytest.raises(error) if error is KeyboardInterrupt else nullcontext():
                    inbox.data_received(b":1\r\n")
                inbox.data_received(b":2\r\n")
                with pytest.raises(ConnectionError):
                    await read_on(conn, inbox, heard)
                assert heard == [1]
                await asyncio.wait_for(server.left.wait(), SOON)

        run(main())


def test_nothing_is_handed_back_behind_what_was_cut_short() -> None:
    """It would be taken for the reply that was lost."""

    async def main() -> None:
        def hear(numbers: Sequence[int | list[int]]) -> None:
            raise KeyboardInterrupt

        async with connected() as (conn, _):
            inbox = Inbox(conn, hear)
            with pytest.raises(KeyboardInterrupt):
                inbox.data_received(b":1\r\n+OK\r\n")
            inbox.hand_back()
            with pytest.raises(ConnectionError):
                await areply(conn)

    run(main())


def test_handed_back_redis_py_reads_all_that_nobody_has_read() -> None:
    async def main() -> None:
        heard: list[Any] = []
        async with connected() as (conn, server):
            inbox = Inbox(conn, heard.extend)
            server.say(b":1\r\n-ERR no\r\n:2\r\n:3")
            assert await await_until(lambda: inbox._unread == b":2\r\n:3")
            inbox.hand_back()
            server.say(b"3\r\n:4\r\n")
            assert [str(await areply(conn)) for _ in range(4)] == ["no", "2", "33", "4"]
            assert heard == [1]
            server.hang_up()
            with pytest.raises(ConnectionError):
                await areply(conn)

    run(main())


def test_who_waits_until_it_can_write_is_told_when_it_can() -> None:
    """redis-py's way to write, which is there still."""

    async def main() -> None:
        async with connected() as (conn, _):
            inbox = Inbox(conn, lambda numbers: None)
            inbox.pause_writing()
            writing = asyncio.create_task(conn._writer.drain())
            await asyncio.sleep(0)
            assert not writing.done()
            inbox.resume_writing()
            await writing

    run(main())


@pytest.fixture
def store(redis_server: RedisServer, prefix: str) -> Iterator[RedisBackend]:
    """Its timeout is so long that what only the timers mend is not mended."""
    made = RedisBackend(BackendConfig("default", "redis", redis_server.url, prefix, {"socket_timeout": SOON}))
    yield made
    made.close()


def slot(policy: str = "p", limit: int = 1000) -> Slot:
    return Slot(policy, make_key("k"), limit, 60.0, new_token())


def mux_of(store: RedisBackend) -> Mux:
    (mux,) = store._muxes.values()
    return mux


class TestAStore:
    def test_the_server_closes_the_connection_before_anybody_reads(
        self, store: RedisBackend, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each time counts as a failure, whatever the one before had heard; the call has another connection."""
        greet = Mux._greet
        failures: list[int] = []

        def kill(mux: Mux) -> None:
            assert mux._client is not None
            with redis_server.client() as client:
                client.execute_command("CLIENT", "KILL", "ID", mux._client.number)

        async def greeted(mux: Mux, conn: Any, work: Work) -> list[Release]:
            refused = await greet(mux, conn, work)
            failures.append(mux._failures)
            if len(failures) < 4:
                kill(mux)
                assert await await_until(conn._reader.at_eof)
            return refused

        async def main() -> None:
            await store.atake([slot()])
            mux = mux_of(store)
            monkeypatch.setattr(Mux, "_greet", greeted)
            kill(mux)
            assert await await_until(lambda: mux._conn is None)
            assert isinstance(await store.atake([slot()]), Taken)
            assert failures == [0, 1, 2, 3]

        run(main())

    def test_errors_among_the_numbers_are_those_of_whom_they_are_for(
        self, store: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        """The script is forgotten: who asked by its name is asked for its text, among releases that were carried out."""

        async def main() -> None:
            first = [slot() for _ in range(20)]
            await asyncio.gather(*[store.atake([one]) for one in first])
            with redis_server.client() as client:
                client.script_flush()
            then = [slot() for _ in range(20)]
            asking = [asyncio.ensure_future(store.atake([one])) for one in then]
            await asyncio.sleep(0)
            await store.agive(first)
            replies = await asyncio.gather(*asking)
            assert sorted(reply.in_flight[0] for reply in replies) == list(range(1, 21))
            assert redis_server.held(prefix) == 20
            assert mux_of(store).connects == 1

        run(main())

    def test_a_server_that_says_more_than_it_was_asked_is_left(self, store: RedisBackend) -> None:
        async def main() -> None:
            await store.atake([slot()])
            mux = mux_of(store)
            assert mux._inbox is not None
            mux._inbox.transport.write(pack(b"DEL", b"nothing"))
            assert await await_until(lambda: mux._conn is None)
            assert isinstance(await store.atake([slot()]), Taken)
            assert mux.connects == 2

        run(main())

    def test_a_connection_is_given_up_that_is_silent_for_long_and_none_that_was_idle_or_is_busy(
        self, store: RedisBackend
    ) -> None:
        async def main() -> None:
            await store.atake([slot()])
            mux = mux_of(store)
            long_ago = mux.loop.time() - 10 * SOON
            mux._heard = long_ago

            def given_up() -> bool:
                assert mux._timer is not None
                assert mux._reading is not None
                mux._timer.cancel()
                mux._sweep()
                return mux._reading.cancelling() > 0

            soon, never = [mux.call(partial(pack, *words)) for words in ((b"DEL", b"nothing"), (b"WAIT", b"1", b"0"))]
            assert not given_up()
            assert await soon == 0
            mux._since = long_ago
            assert not given_up()
            mux._heard = long_ago
            never.cancel()
            assert given_up()
            assert await await_until(lambda: mux._conn is None)

        run(main())

    def test_who_was_not_answered_is_not_forgotten_where_hearing_is_cut_short(self, store: RedisBackend) -> None:
        async def main() -> None:
            await store.atake([slot()])
            mux = mux_of(store)
            waiters = [mux.call(lambda: pack(b"DEL", b"nothing")) for _ in range(3)]
            asked = list(mux._unanswered)
            asked[1].waiter = Interrupting()  # type: ignore[union-attr]  # it is a call
            with pytest.raises(KeyboardInterrupt):
                mux._hear([1, 2, 3])
            assert list(mux._unanswered) == asked[1:]
            assert waiters[0].result() == 1
            asked[1].waiter = waiters[1]  # type: ignore[union-attr]  # it is a call
            mux._unanswered.appendleft(asked[0])  # whose reply is still to come
            assert [await waiter for waiter in waiters[1:]] == [0, 0]

        run(main())

    @pytest.mark.parametrize("reply", [b"OK", ResponseError("no")])
    def test_who_was_not_answered_is_not_forgotten_where_answering_is_cut_short(
        self, store: RedisBackend, reply: Any
    ) -> None:
        """No time-out would come for it."""

        async def main() -> None:
            await store.atake([slot()])
            mux = mux_of(store)
            point, struck = 0, True
            while struck:
                point += 1
                waiter = mux.loop.create_future()
                mux._unanswered.append(Command(b"", mux.loop.time(), waiter, pack, ()))
                struck = struck_at(point, mux_module, lambda: mux._answer(reply), by_signals=True)
                assert waiter.done() or mux._unanswered
                mux._unanswered.clear()
                waiter.cancel()
                assert struck or waiter.exception() is reply or waiter.result() == reply
            assert point > 2

        run(main())

    def test_a_loop_that_ends_while_one_is_sent_on_takes_no_reply_for_another(
        self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its reply was read already, and what it was sent on for will not be known."""
        ended: list[asyncio.Future[Any]] = []

        async def sent_on(ask: Ask, packed: bytes) -> Any:
            await asyncio.Event().wait()

        async def main() -> None:
            one = slot()
            await store.atake([one])
            mux = mux_of(store)
            monkeypatch.setattr(mux_module, "areply", told_to_ask)
            monkeypatch.setattr(mux._detour, "call", sent_on)
            ended.append(mux.call(lambda: pack(b"NOSUCH")))
            await store.agive([one])
            assert await await_until(lambda: mux._on_its_way)

        run(main())
        assert isinstance(ended[0].exception(), ConnectionError)
        assert wait_until(lambda: not store.snapshot())

    def test_a_loop_that_ends_just_when_a_connection_is_of_no_use_takes_no_reply_for_another(
        self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error was read that says so, and whoever it was for was not carried out."""
        seen: list[Any] = []
        left: list[bytes] = []

        async def down(conn: Any) -> Any:
            seen.append(await areply(conn))
            if len(seen) == 1:
                owner = mux_of(store)._owner
                assert owner is not None
                owner.cancel()
                raise ConnectionError("CLUSTERDOWN")
            return seen[-1]

        async def main() -> None:
            some = [slot() for _ in range(2)]
            await store.atake(some)
            mux = mux_of(store)
            monkeypatch.setattr(mux_module, "areply", down)
            monkeypatch.setattr(mux._leftovers, "add", lambda releases: left.extend(one.packed for one in releases))
            mux.tell([Release(pack(b"NOSUCH"), monotonic() + SOON), *store._keys.give(some)])
            assert await await_until(lambda: mux._owner is None)

        run(main())
        assert left[0] == pack(b"NOSUCH")
        assert len(left) == 3

    @pytest.mark.parametrize("together", [False, True])
    def test_an_interrupt_anywhere_in_what_is_sent_leaves_no_slot_and_no_confusion(
        self, store: RedisBackend, redis_server: RedisServer, prefix: str, *, together: bool
    ) -> None:
        """From a signal's handler, behind which the loop goes on: the next one hears its own reply. A release, which whoever is
        interrupted gives once more, and a take, of which nobody needs to; written with it at once, or later with others."""

        async def main() -> None:
            held, point, struck = slot("held"), 0, True
            await store.atake([held])
            mux = mux_of(store)
            while struck:
                before, point = slot(), point + 1
                await store.atake([before])
                mux._crowded = together
                asked = store.atake([slot()])

                def send(before: Slot = before, asked: Any = asked) -> None:
                    store.give_on_loop([before])
                    asked.send(None)
                    if mux._inbox is not None:
                        mux._write(mux._inbox)

                struck = struck_at(point, mux_module, send, by_signals=True)
                asked.close()
                store.give_on_loop([before])
                assert await store.atake([held]) == Taken((True,), (1,))
                assert await store.atake([held, slot("none", 0)]) == Full((False, True), (1, 0))
            assert point > 10
            assert await await_until(lambda: redis_server.held(prefix) == 1)

        run(main())

    def test_a_loop_that_ends_hears_of_its_last_releases_at_once(
        self, proxy: Proxy, redis_server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One was sent on before. Nobody else has to carry them out."""
        store = RedisBackend(BackendConfig("default", "redis", proxy.url, prefix, {"socket_timeout": SOON}))

        async def sent_on(ask: Ask, packed: bytes) -> Any:
            return 7

        async def main() -> float:
            some = [slot() for _ in range(3)]
            await store.atake(some)
            mux = mux_of(store)
            with monkeypatch.context() as patched:
                patched.setattr(mux_module, "areply", told_to_ask)
                patched.setattr(mux._detour, "call", sent_on)
                assert await mux.call(lambda: pack(b"NOSUCH")) == 7
            proxy.delay = lambda: 0.05  # their replies come when nobody else runs any more
            await store.agive(some)
            return monotonic()

        ended = asyncio.run(main())
        assert monotonic() < ended + SOON / 2
        assert redis_server.held(prefix) == 0
        assert store._lines.connects == 0
        store.close()


async def told_to_ask(conn: Any) -> Any:
    await areply(conn)
    return Ask(Node("nowhere", 1))


class Interrupting:
    """A waiter in whose place something cuts short what is done."""

    def done(self) -> bool:
        return False

    def set_result(self, number: int) -> None:
        raise KeyboardInterrupt

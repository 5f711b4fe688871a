"""The connection of a thread: each reply is read once, by whoever is to read it, however it comes and whatever interrupts."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import monotonic
from types import FrameType
from typing import Any

import pytest
import redis
from redis.utils import HIREDIS_AVAILABLE

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis import sockets
from django_concurrency_mw.backends.redis.connecting import Recipe
from django_concurrency_mw.backends.redis.line import Line
from django_concurrency_mw.backends.redis.sockets import ReplySocket
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .redis_server import RedisServer
from .support import SOON, wait_until

#: What a server says, and what is read of it. An error is known by its text.
REPLIES: list[tuple[bytes, Any]] = [
    (b":1\r\n", 1),
    (b":0\r\n", 0),
    (b":-7\r\n", -7),
    (b"*2\r\n:5\r\n:-1\r\n", [5, -1]),
    (b"*0\r\n", []),
    (b"+OK\r\n", b"OK"),
    (b"$8\r\n:1\r\n:2\r\n\r\n", b":1\r\n:2\r\n"),
    (b"*2\r\n$1\r\na\r\n:1\r\n", [b"a", 1]),
    (b"-NOSCRIPT No matching script.\r\n", "No matching script."),
    (b"-OOM command not allowed\r\n", "command not allowed"),
]
#: As each of the protocols says it.
NOTHING = {2: (b"$-1\r\n", None), 3: (b"_\r\n", None)}
#: What comes by itself in RESP 3, and is nobody's reply.
PUSH = b">2\r\n+told\r\n:1\r\n"


class Talk:
    """A line to a server that says what a test wants it to."""

    def __init__(self, protocol: int = 2) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{self.listening.getsockname()[1]}"
        recipe = Recipe(BackendConfig("default", "redis", url, options={"protocol": protocol}))
        conn = recipe.connection(monotonic() + SOON)
        made = threading.Event()
        with ThreadPoolExecutor(1) as others:
            greeting = others.submit(_greet, self.listening, made)
            conn.connect()
            made.set()
            self.server = greeting.result(SOON)
        self.line = Line(conn)
        self.line.until(monotonic() + SOON)

    def close(self) -> None:
        self.line.conn.disconnect()
        self.server.close()
        self.listening.close()


def _greet(listening: socket.socket, made: threading.Event) -> socket.socket:
    """Say yes to everything, until the connection is made."""
    server, _ = listening.accept()
    server.settimeout(0.005)
    while not made.is_set():
        with suppress(TimeoutError):
            for command in re.findall(rb"(?m)^\*\d+\r\n\$\d+\r\n(\w+)", server.recv(65536)):
                server.sendall(b"%1\r\n+proto\r\n:3\r\n" if command == b"HELLO" else b"+OK\r\n")
    server.settimeout(SOON)
    return server


@contextmanager
def talk(protocol: int = 2) -> Iterator[Talk]:
    one = Talk(protocol)
    try:
        yield one
    finally:
        one.close()


def _is(reply: Any, value: Any) -> bool:
    return value in str(reply) if isinstance(reply, Exception) else bool(reply == value)


@pytest.mark.parametrize("protocol", [2, 3])
def test_each_reply_is_read_once_and_in_order_however_it_comes(protocol: int) -> None:
    """Cut anywhere, with time-outs between the parts, and with what nobody has asked for between the replies."""
    dice = random.Random(protocol)
    # redis-py 5 takes one for the reply where hiredis reads.
    pushed = protocol == 3 and not (HIREDIS_AVAILABLE and redis.__version__.startswith("5."))
    with talk(protocol) as one:
        for _ in range(150 if LONG else 30):
            chosen = dice.choices([*REPLIES, NOTHING[protocol]], k=dice.randint(1, 8))
            stream = b"".join([(PUSH if pushed and dice.random() < 0.3 else b"") + said for said, _ in chosen])
            got: list[Any] = []
            while stream:
                cut = dice.randint(1, len(stream))
                one.server.sendall(stream[:cut])
                stream = stream[cut:]
                one.line.until(monotonic() + (0.002 if stream else SOON))
                with suppress(redis.TimeoutError):  # but for the last part, after which none is missing
                    while len(got) < len(chosen):
                        got.append(one.line.read())
            assert len(got) == len(chosen)
            wrong = [(reply, said) for reply, said in zip(got, chosen, strict=True) if not _is(reply, said[1])]
            assert not wrong


@contextmanager
def pair(said: bytes = b"") -> Iterator[tuple[ReplySocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(SOON)
        theirs.sendall(said)
        yield ReplySocket(ours, monotonic() + SOON, None), theirs


@pytest.mark.parametrize(
    ("said", "due", "last"),
    [
        (b":1\r\n", 1, 1),
        (b":1\r\n:-20\r\n", 2, -20),
        (b"*2\r\n:1\r\n:2\r\n", 1, [1, 2]),
        (b":1\r\n:0\r\n*2\r\n:1\r\n:-2\r\n", 3, [1, -2]),
        (b":1\r\n*0\r\n", 2, []),
    ],
)
def test_all_that_are_numbers_are_taken_off_at_once(said: bytes, due: int, last: Any) -> None:
    with pair(said) as (ours, theirs):
        assert ours.last(due) == last
        theirs.sendall(b":9\r\n")
        assert ours.last(1) == 9


@pytest.mark.parametrize(
    ("said", "due"),
    [
        (b":1\r\n:2\r\n:3\r\n", 2),
        (b":1\r\n-ERR\r\n", 2),
        (b"-ERR\r\n:1\r\n", 2),
        (b"*1\r\n:1\r\n:2\r\n", 2),
        (b":1\r\n*1\r\n:1\r\n", 3),
        (b":1\r\n*1\r\n:1\r\n", 1),
        (b":1\r\n*3\r\n:1\r\n:2\r\n", 2),
        (b"*2\r\n:1\r\n+a\r\n", 1),
        (b"*-1\r\n", 1),
        (b":1\r\n:", 2),
        (b"$2\r\n:1\r\n", 1),
        (b"nonsense\r\n", 1),
        (b":no\r\n", 1),
    ],
)
def test_what_is_not_taken_off_is_all_there_for_who_reads_it(said: bytes, due: int) -> None:
    with pair(said) as (ours, theirs):
        assert ours.last(due) is None
        theirs.shutdown(socket.SHUT_WR)
        whole = b""
        while data := ours.recv(3):
            whole += data
        assert said.startswith(whole)
        assert len(said) - len(whole) < len(b"*3\r\n:1\r\n:2\r\n") + 1, (
            "only what is no whole reply is never handed out"
        )


def test_redis_py_is_handed_one_reply_at_a_time() -> None:
    with pair(b"$3\r\nabc\r\n+OK\r\n:1\r\n") as (ours, _):
        buffer = bytearray(64)
        assert (ours.recv_into(buffer), bytes(buffer[:9])) == (9, b"$3\r\nabc\r\n")
        assert [ours.recv(2), ours.recv(2), ours.recv(64)] == [b"+O", b"K\r", b"\n"]
        assert ours.number() == 1


def test_a_closed_connection_is_lost_with_whatever_came_of_a_reply() -> None:
    for said in (b"", b":1", b"$5\r\nab", b"*2\r\n:1\r\n"):
        with talk() as one:
            one.server.sendall(b":7\r\n" + said)
            one.server.shutdown(socket.SHUT_WR)
            assert one.line.read() == 7
            with pytest.raises(redis.ConnectionError, match="closed"):
                one.line.read()


def test_what_no_server_says_is_an_error_and_not_an_answer() -> None:
    for said in (b":one\r\n", b"*x\r\n", b"nonsense\r\n"):
        with talk() as one:
            one.server.sendall(said)
            with pytest.raises((redis.RedisError, ValueError)):
                one.line.read()


def test_a_reset_and_a_silence_are_redis_pys_errors() -> None:
    with talk() as one:
        one.line.until(monotonic() + 0.01)
        with pytest.raises(redis.TimeoutError, match=r"reading from 127\.0\.0\.1"):
            one.line.read()
        one.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.server.close()
        one.line.until(monotonic() + SOON)
        with pytest.raises(redis.ConnectionError):
            one.line.read()


class TestSending:
    def test_more_than_the_kernel_takes_at_once_arrives_whole(self) -> None:
        with talk() as one:
            sent = os.urandom(4_000_000)
            heard = bytearray()

            def listen() -> None:
                while len(heard) < len(sent) and (data := one.server.recv(65536)):
                    heard.extend(data)

            listening = threading.Thread(target=listen)
            one.line.until(monotonic() + SOON)
            listening.start()
            one.line.send(sent)
            listening.join(SOON)
            assert bytes(heard) == sent

    def test_a_server_that_reads_no_more_is_given_up_in_time(self) -> None:
        """Half a command may have been sent: nobody may send another one behind that."""
        with talk() as one:
            one.line.until(monotonic() + 0.05)
            with pytest.raises(redis.TimeoutError):
                one.line.send(bytes(50_000_000))
            assert _is_closed(one.line)

    def test_nothing_is_written_to_a_descriptor_that_is_somebody_elses_by_now(self) -> None:
        """And it does not connect by itself, to a server that knows nothing of what is owed."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        with talk() as one:
            number = one.line.socket.fileno()
            one.line.conn.disconnect()
            os.dup2(write, number)
            one.line.until(monotonic() + 0.2)
            with pytest.raises(redis.ConnectionError):
                one.line.send(b"PING\r\n")
            with pytest.raises(BlockingIOError):
                os.read(read, 1)
            one.listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.listening.accept()
            for each in (read, write, number):
                os.close(each)


def _is_closed(line: Line) -> bool:
    return bool(line.socket.fileno() < 0)


@pytest.fixture
def store(redis_server: RedisServer, prefix: str) -> Iterator[RedisBackend]:
    made = RedisBackend(BackendConfig("default", "redis", redis_server.url, prefix, {"socket_timeout": 5}))
    yield made
    made.close()
    assert wait_until(lambda: not made._delivering and not made._leftovers)


def slot(policy: str, limit: int = 1000) -> Slot:
    return Slot(policy, make_key("k"), limit, 60.0, new_token())


def count(store: RedisBackend, policy: str) -> int:
    """Asked on the line that was used last, so that all that was sent there has been carried out."""
    reply = store.take([slot(policy, 0)])
    assert isinstance(reply, Full)
    return reply.in_flight[0]


def test_a_connection_that_the_kernel_gives_up_is_replaced(
    store: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host has gone, say. That is a TimeoutError too, and no signal handler's: the call has another connection."""
    store.take([slot("warm")])
    receive = sockets.DeadlineSocket.recv
    given_up: list[int] = []

    def gone(self: Any, size: int) -> bytes:
        if not given_up:
            given_up.append(size)
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return receive(self, size)

    monkeypatch.setattr(sockets.DeadlineSocket, "recv", gone)
    assert store.take([slot("a")]) == Taken((True,), (1,))
    assert store._lines.connects == 2


class TestInterrupted:
    def test_a_time_out_of_somebody_elses_gives_the_line_up(
        self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch, redis_server: RedisServer, prefix: str
    ) -> None:
        """A signal handler of the project's raises what a socket does. What was read just then is lost, so no reply of that
        connection may be read any more."""
        store.take([slot("warm")])
        (line,) = store._lines._free
        receive = sockets.DeadlineSocket.recv

        here = threading.get_ident()

        def interrupted(self: Any, size: int) -> bytes:
            received = receive(self, size)
            if threading.get_ident() != here:  # the keeper's, perhaps when there is no handler any more
                return received
            signal.raise_signal(signal.SIGUSR1)
            raise AssertionError("the handler raises")

        def handler(*arguments: object) -> None:
            raise TimeoutError("the request's time is over")

        former = signal.signal(signal.SIGUSR1, handler)
        try:
            with monkeypatch.context() as patched:
                patched.setattr(sockets.DeadlineSocket, "recv", interrupted)
                with pytest.raises(BackendError):
                    store.take([slot("cut")])
        finally:
            signal.signal(signal.SIGUSR1, former)
        assert line not in store._lines._free
        assert _is_closed(line)
        assert count(store, "warm") == 1
        assert wait_until(lambda: redis_server.held(prefix) == 1)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
    def test_an_interrupt_anywhere_leaves_no_slot_and_no_confusion(
        self, store: RedisBackend, redis_server: RedisServer, prefix: str, error: type[BaseException]
    ) -> None:
        """Before any bytecode of a take or a give: whoever comes next reads its own reply, and what the interrupted one gives
        back is gone. One slot, and two, whose reply is an array; each with a release before it that is still to be heard."""
        held = slot("held")
        store.take([held])
        steps = 1 if LONG else 23
        for number_of, asked in enumerate([["a"], ["a", "b"]]):
            point = 1 + number_of
            while True:
                wanted = [slot(policy) for policy in asked]
                before = slot("before")
                store.take([before])
                store.give([before])
                over = _interrupted(error, point, lambda wanted=wanted: (store.take(wanted), store.give(wanted)))
                store.give(wanted)  # as whoever was interrupted does
                assert store.take([held]) == Taken((True,), (1,))
                assert store.take([slot("other", 0), slot("held", 0)]) == Full((True, True), (0, 1))
                if over:
                    break
                point += steps
            assert point > 10 * steps
        assert wait_until(lambda: redis_server.held(prefix) == 1)


def _interrupted(error: type[BaseException], point: int, call: Callable[[], object]) -> bool:
    """Call it, with this error before the bytecode of that number inside the store. Returns whether it has fewer."""
    seen, here = 0, os.path.join("backends", "redis", "")

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen
        if here not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == point:
                raise error("interrupted")
        return trace

    former = sys.gettrace()
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        call()
    except (error, BackendError):
        pass
    finally:
        sys.settrace(former)
    return seen < point

"""The Redis store on a real server: exact, nothing lost, and no more on the wire than it needs."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import trustme
from asgiref.sync import async_to_sync
from django.core.exceptions import ImproperlyConfigured

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis import mux as mux_module
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import MOST_TERMS, Keys, member
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .proxy import Proxy, between
from .redis_server import RedisServer
from .support import SOON, await_until, exit_code, wait_until


@pytest.fixture
def store(redis_server: RedisServer, prefix: str) -> Iterator[RedisBackend]:
    yield from made(redis_server.url, prefix)


@pytest.fixture
def through_proxy(proxy: Proxy, prefix: str) -> Iterator[RedisBackend]:
    yield from made(proxy.url, prefix)


#: Seconds of an impatient store.
BRIEF = 0.25


@contextmanager
def impatient(store: RedisBackend) -> Iterator[None]:
    """It waits BRIEF, for what the test is about alone: before that a busy machine may answer later."""
    recipe = store._recipe
    patient = recipe.timeout

    def wait(seconds: float) -> None:
        recipe.timeout = seconds
        for mux in store._muxes.values():
            mux._timeout = seconds
            if mux._timer is not None:  # it would look after that time only
                mux._timer.cancel()
                mux._timer = None

    wait(BRIEF)
    try:
        yield
    finally:
        wait(patient)


def made(url: str, prefix: str, **options: Any) -> Iterator[RedisBackend]:
    # A busy machine may answer late; what a deadline is about has its own tests, through_proxy.
    options = {"socket_timeout": 5, **options}
    store = RedisBackend(BackendConfig("default", "redis", url, prefix, options))
    yield store
    store.close()


#: How often all connections are killed under load.
KILLS = 200 if LONG else 40


def many(number: int, enough: Callable[[], bool], seconds: float = 60) -> Iterator[int]:
    """So many times, and on until it is enough: a busy machine does the same, but slower. Ends after that time all the same."""
    end = monotonic() + seconds
    for turn in count():
        if (turn >= number and enough()) or monotonic() > end:
            return
        yield turn


def slot(
    policy: str = "p", key: str = "k", limit: int = 1, ttl: float = 60.0, token: str = "", block: bool = True
) -> Slot:
    return Slot(policy, make_key(key), limit, ttl, token or new_token(), block, "/path/")


def taken(store: RedisBackend, one: Slot) -> bool:
    try:
        return isinstance(store.take([one]), Taken)
    except BackendError:
        return False


def drained(server: RedisServer, prefix: str) -> bool:
    return wait_until(lambda: server.held(prefix) == 0)


def test_what_is_kept_packed_is_of_those_terms_alone() -> None:
    """A limit that a callable names anew each time takes no more memory than that."""
    base, keys = Slot("p", make_key("k"), 1, 60.0, "token"), Keys("prefix")
    changes: list[dict[str, Any]] = [{}, {"limit": 2}, {"ttl": 9.0}, {"block": False}, {"cost": 2}, {"waits": True}]
    for changed in [*changes, *changes]:
        one = replace(base, **changed, memo=[])
        assert keys.take([one]) == Keys("prefix").take([one])
    for limit in range(MOST_TERMS + 2):
        keys.take([replace(base, limit=limit, memo=[])])
        assert len(keys._packed) <= MOST_TERMS


class TestOneScript:
    """What the take script promises; what all stores promise is in test_steps and test_contract."""

    def test_a_keys_expiry_only_grows(self, store: RedisBackend, redis_server: RedisServer, prefix: str) -> None:
        store.take([slot(limit=3, ttl=100)])
        store.take([slot(limit=3, ttl=2)])
        client = redis_server.client()
        (key,) = client.scan_iter(f"{{{prefix}}}:1:*")
        assert client.pttl(key) > 90_000
        store.take([slot(limit=3, ttl=200)])
        assert client.pttl(key) > 190_000

    def test_asking_twice_counts_once_where_there_is_room(self, store: RedisBackend) -> None:
        """A command whose reply was lost is sent again."""
        one, two = slot("a", limit=3), slot("b", limit=3)
        for slots in [one], [one], [one, two], [one, two]:
            assert store.take(slots) == Taken((True,) * len(slots), (1,) * len(slots))

    def test_of_several_each_counts_by_its_own_cost(self, store: RedisBackend) -> None:
        def dear() -> Slot:
            return Slot("a", make_key("k"), 5, 60.0, new_token(), True, cost=3)

        assert store.take([dear(), slot("b")]) == Taken((True, True), (3, 1))
        assert store.take([slot("b", limit=9), dear()]) == Full((False, True), (1, 3))
        assert store.take([dear(), slot("b", limit=9)]) == Full((True, False), (3, 1))

    def test_a_shadow_policy_beside_one_that_is_like_it_in_all_else(self, store: RedisBackend) -> None:
        full, free = slot("a"), slot("b")
        store.take([full])
        assert store.take([slot("a", block=False), free]) == Taken((False, True), (1, 1))
        assert sorted(holder.token for holder in store.snapshot()) == sorted([full.token, free.token])

    def test_each_holder_has_its_own_end(self, store: RedisBackend, redis_server: RedisServer) -> None:
        store.take([slot(limit=2, ttl=60)])
        store.take([slot(limit=2, ttl=0.05)])
        assert wait_until(lambda: isinstance(store.take([slot(limit=2)]), Taken))
        assert isinstance(store.take([slot(limit=2)]), Full)

    def test_a_lapsed_holder_is_not_renewed(self, store: RedisBackend) -> None:
        short, long = slot(limit=2, ttl=0.05), slot(limit=2)
        store.take([short])
        store.take([long])
        assert wait_until(lambda: len(store.snapshot()) == 1)
        assert list(store.renew([(short, 60), (long, 60)])) == [False, True]
        assert [holder.token for holder in store.snapshot()] == [long.token]

    def test_the_servers_clock_counts(self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host whose clock is an hour wrong takes and holds like any other."""
        wrong = Slot("p", make_key("k"), 1, 60.0, new_token(), since=1.0)
        store.take([wrong])
        assert isinstance(store.take([slot()]), Full)
        (holder,) = store.snapshot()
        assert 50 < holder.lease_left <= 60

    def test_one_round_trip_for_three_policies_and_three_zrem_in_one_packet(
        self, redis_server: RedisServer, proxy: Proxy, through_proxy: RedisBackend
    ) -> None:
        store = through_proxy
        store.take([slot("warm")])  # the greeting of a new connection
        with redis_server.client() as client:
            client.config_resetstat()
            proxy.record = True
            three = [slot("a"), slot("b"), slot("c")]
            assert isinstance(store.take(three), Taken)
            store.give(three)
            assert wait_until(
                lambda: redis_server.client().info("commandstats").get("cmdstat_zrem", {}).get("calls") == 3
            )
            stats = client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] == 1
        assert len(proxy.sent) == 2
        assert proxy.sent[0].count(b"EVALSHA") == 1
        assert proxy.sent[1].count(b"ZREM") == 3
        inside = {"evalsha", "time", "zcard", "zadd", "pttl", "pexpire", "zrem"}
        # Of the test's own clients. Redis 6.2 names no subcommands.
        theirs = {"info", "config", "config|resetstat", "hello", "client", "client|setinfo"}
        ours = {name.removeprefix("cmdstat_") for name in stats} - theirs
        assert ours == inside, "something else was sent"

    def test_a_flushed_script_is_not_noticed(self, store: RedisBackend, redis_server: RedisServer) -> None:
        store.take([slot()])
        redis_server.client().script_flush()
        assert isinstance(store.take([slot()]), Full)
        redis_server.client().script_flush()

        async def main() -> None:
            assert isinstance(await store.atake([slot()]), Full)
            redis_server.client().script_flush()
            assert isinstance(await store.atake([slot()]), Full)

        asyncio.run(main())

    def test_user_text_cannot_steer_the_hash_tag_or_the_member(
        self, store: RedisBackend, redis_server: RedisServer
    ) -> None:
        nasty = Slot("p", make_key("{x}\n\x00\r\n*3\r\n" + "ü" * 1000), 1, 60.0, new_token(), path="/a\nb\ud800")
        assert isinstance(store.take([nasty]), Taken)
        assert isinstance(store.take([nasty]), Taken)
        (holder,) = store.snapshot()
        assert holder.token == nasty.token
        assert (holder.key, holder.path) == (nasty.key.text[:120].replace("\n", " "), "/a b?")
        assert len(member(nasty)) < 1000
        store.give([nasty])
        assert store.snapshot() == []

    def test_nothing_is_left_of_many_keys(self, store: RedisBackend, redis_server: RedisServer, prefix: str) -> None:
        async def main() -> None:
            async def some(first: int) -> None:
                for number in range(first, first + 500):
                    one = slot(key=str(number))
                    assert isinstance(await store.atake([one]), Taken)
                    await store.agive([one])

            await asyncio.gather(*(some(first) for first in range(0, 20_000 if LONG else 8_000, 500)))

        asyncio.run(main())
        assert wait_until(lambda: list(redis_server.client().scan_iter(f"{{{prefix}}}*")) == [])

    def test_evicting_takes_all_of_a_holders_slots(self, store: RedisBackend) -> None:
        one = [slot("a", token="t-1"), slot("b", token="t-1"), slot("a", "other", token="t-2")]
        store.take(one)
        assert store.evict("t-1")
        assert not store.evict("t-1")
        assert [holder.token for holder in store.snapshot()] == ["t-2"]


class TestThreads:
    def test_the_stack_grows_to_the_calls_at_once_not_to_the_threads(self, store: RedisBackend) -> None:
        def work() -> None:
            one = slot(limit=100)
            store.take([one])
            store.give([one])

        for _ in range(50):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert store._lines.connects == 1

    def test_what_asks_by_hand_closes_its_connection(self, store: RedisBackend, redis_server: RedisServer) -> None:
        """No garbage collection has to come by for that: it might find the socket first, which is a ResourceWarning."""
        with store._recipe.client() as by_hand:
            number = by_hand.client_id()
        with redis_server.client() as server:
            assert wait_until(lambda: str(number) not in {one["id"] for one in server.client_list()}), by_hand

    def test_a_connection_that_died_idle_is_replaced_unseen(
        self, store: RedisBackend, redis_server: RedisServer
    ) -> None:
        for _ in range(50):
            one = slot()
            assert isinstance(store.take([one]), Taken)
            store.give([one])
            redis_server.client().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert store._lines.connects >= 50

    def test_killed_again_and_again_under_load_no_call_fails_and_nothing_is_left(
        self, store: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        ended = threading.Event()
        errors: list[BaseException] = []
        admitted = [0] * 8

        def work(number: int) -> None:
            while not ended.is_set():
                one = slot(limit=1000)
                try:
                    store.take([one])
                    admitted[number] += 1
                    store.give([one])
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()

        def all_through(before: list[int]) -> bool:
            return bool(errors) or all(now > then + 1 for now, then in zip(admitted, before, strict=True))

        try:
            with redis_server.client() as client:
                for _ in many(KILLS, lambda: sum(admitted) > 500):
                    before = list(admitted)
                    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                    # A call is tried once more: that try is over before the next kill.
                    assert wait_until(lambda before=before: all_through(before))  # type: ignore[misc]
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert errors == []
        assert sum(admitted) > 500
        assert drained(redis_server, prefix), redis_server.held(prefix)

    def test_a_late_reply_leaves_no_slot(
        self, through_proxy: RedisBackend, proxy: Proxy, redis_server: RedisServer, prefix: str
    ) -> None:
        """The server has taken the slot, and its answer comes after the time-out."""
        through_proxy.take([slot("warm")])
        proxy.delay = lambda: 0.4
        start = monotonic()
        with impatient(through_proxy), pytest.raises(BackendError):
            through_proxy.take([slot("late")])
        assert monotonic() - start < 5 * BRIEF
        proxy.delay = lambda: 0.0
        assert wait_until(lambda: [h.policy for h in through_proxy.snapshot()] == ["warm"])
        assert wait_until(lambda: taken(through_proxy, slot("late")))

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("where", ["sendall", "last"])
    def test_what_interrupts_a_call_leaves_no_slot_and_no_confusion(
        self, store: RedisBackend, redis_server: RedisServer, prefix: str, error: type[BaseException], where: str
    ) -> None:
        """gunicorn's worker timeout raises SystemExit wherever the thread is."""
        store.take([slot("warm", limit=10)])
        (line,) = store._lines._free
        whole = getattr(line.socket, where)

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            whole(*args, **kwargs)
            raise error

        setattr(line.socket, where, interrupted)
        with pytest.raises(error):
            store.take([slot("cut")])
        for number in range(3):
            assert store.take([slot("warm", limit=10)]) == Taken((True,), (2 + number,))
        assert wait_until(lambda: {holder.policy for holder in store.snapshot()} == {"warm"})

    def test_idle_lines_are_heard_and_closed(self, store: RedisBackend, redis_server: RedisServer) -> None:
        one = slot()
        store.take([one])
        store.give([one])
        (line,) = store._lines._free
        assert len(line.owed) == 1
        line.used -= 2
        store._lines.tend()
        assert len(line.owed) == 0
        assert len(store._lines) == 1
        before = redis_server.sockets()
        line.used -= 100
        store._lines.tend()
        assert len(store._lines) == 0
        assert wait_until(lambda: redis_server.sockets() <= before - 1)

    def test_a_release_without_a_line_at_hand_is_left_to_the_keeper(
        self, store: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        one = slot()
        store.take([one])
        store._lines._free.clear()
        start_thread, threads = threading.get_ident(), []
        connect = store._lines._open

        def seen(*args: Any, **kwargs: Any) -> Any:
            threads.append(threading.get_ident())
            return connect(*args, **kwargs)

        store._lines._open = seen  # type: ignore[method-assign]  # to see who connects
        store.give([one])
        assert drained(redis_server, prefix)
        assert threads
        assert start_thread not in threads

    def test_a_forked_child_uses_connections_of_its_own(self, store: RedisBackend, redis_server: RedisServer) -> None:
        one = slot(limit=2)
        store.take([one])
        parents = store._lines._free[0].client
        pid = os.fork()
        if pid == 0:
            ok = isinstance(store.take([slot(limit=2)]), Taken) and store._lines._free[0].client != parents
            os._exit(0 if ok else 1)
        assert exit_code(pid) == 0
        assert store.take([slot(limit=3)]) == Taken((True,), (3,))


class TestOneDeadline:
    """`socket_timeout` covers connecting, the handshake and the reply together, in both halves."""

    def measure(self, store: RedisBackend, half: str, patience: Any = impatient) -> float:
        take = store.take if half == "threads" else partial(_take_on_a_loop, store)
        start = monotonic()
        with patience(store), pytest.raises(BackendError):
            take([slot()])
        return monotonic() - start

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_a_slow_network(self, through_proxy: RedisBackend, proxy: Proxy, half: str) -> None:
        """100 ms each way: a handshake of several steps alone would take half a second, each step within its timeout."""
        proxy.delay = lambda: 0.1
        assert self.measure(through_proxy, half) < 5 * BRIEF

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_a_black_hole(self, through_proxy: RedisBackend, proxy: Proxy, half: str) -> None:
        proxy.black_hole = True
        assert 0.8 * BRIEF < self.measure(through_proxy, half) < 5 * BRIEF

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_a_port_that_refuses_is_known_at_once(self, prefix: str, half: str) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            store = next(made(f"redis://127.0.0.1:{taken.getsockname()[1]}/0", prefix))
            assert self.measure(store, half, nullcontext) < 2, "of the five seconds that it has"


def _take_on_a_loop(store: RedisBackend, slots: Sequence[Slot]) -> Any:
    async def main() -> Any:
        return await store.atake(slots)

    return asyncio.run(main())


class TestLoops:
    def test_who_is_alone_is_sent_at_once_and_all_that_follow_together(
        self, store: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent: list[bytes] = []
        real = mux_module.send

        def send(conn: Any, packed: bytes) -> None:
            sent.append(packed)
            real(conn, packed)

        async def main() -> None:
            await store.atake([slot("warm")])
            monkeypatch.setattr(mux_module, "send", send)
            some = [slot(limit=9) for _ in range(9)]
            tasks = [asyncio.create_task(store.atake([one])) for one in some]
            await asyncio.sleep(0)
            assert [packed.count(b"EVALSHA") for packed in sent] == [1]
            await asyncio.gather(*tasks)
            assert [packed.count(b"EVALSHA") for packed in sent] == [1, 8]
            await store.agive(some)
            await store.atake([slot("last")])
            assert [packed.count(b"ZREM") for packed in sent[2:]] == [9]
            await asyncio.gather(*[store.atake([slot(limit=99)]) for _ in range(9)])
            sent.clear()
            await asyncio.gather(*[store.atake([slot(limit=99)]) for _ in range(9)])
            assert [packed.count(b"EVALSHA") for packed in sent] == [9], "there were several before"
            await store.atake([slot("last")])
            sent.clear()
            tasks = [asyncio.create_task(store.atake([slot("alone")])) for _ in range(2)]
            await asyncio.sleep(0)
            assert [packed.count(b"EVALSHA") for packed in sent] == [1], "who was alone before him was"
            await asyncio.gather(*tasks)

        asyncio.run(main())

    def test_a_thousand_at_once_share_one_connection(self, redis_server: RedisServer, prefix: str) -> None:
        (store,) = [next(made(redis_server.url, prefix, socket_timeout=5))]

        async def main() -> None:
            before = redis_server.sockets()

            async def one() -> None:
                mine = slot(limit=2000)
                assert isinstance(await store.atake([mine]), Taken)
                await asyncio.sleep(0.05)
                await store.agive([mine])

            await asyncio.gather(*(one() for _ in range(1000)))
            assert redis_server.sockets() <= before + 1
            assert [mux.connects for mux in store._muxes.values()] == [1]

        asyncio.run(main())
        assert drained(redis_server, prefix)

    def test_three_thousand_random_cancels_leave_nothing(
        self, redis_server: RedisServer, proxy: Proxy, prefix: str
    ) -> None:
        """Through a network of 0 to 10 ms each way, a cancel at any moment of the request."""
        (store,) = [next(made(proxy.url, prefix, socket_timeout=5))]
        proxy.delay = between(0, 0.01)
        admitted = [0]

        async def request() -> None:
            mine = slot(limit=10_000)
            try:
                await store.atake([mine])
                admitted[0] += 1
                await asyncio.sleep(random.uniform(0, 0.02))
            finally:
                await store.agive([mine])

        async def main() -> None:
            for _ in many(30, lambda: admitted[0] > 100):
                tasks = [asyncio.create_task(request()) for _ in range(100)]
                for task in tasks:
                    asyncio.get_running_loop().call_later(random.uniform(0, 0.05), task.cancel)
                await asyncio.wait(tasks)
            await asyncio.sleep(0.1)

        asyncio.run(main())
        assert admitted[0] > 100
        assert proxy.connections <= 2
        assert drained(redis_server, prefix), redis_server.held(prefix)

    def test_cut_again_and_again_with_packets_under_way(
        self, redis_server: RedisServer, proxy: Proxy, prefix: str
    ) -> None:
        (store,) = [next(made(proxy.url, prefix, socket_timeout=1))]
        proxy.delay = between(0, 0.002)
        admitted = [0]

        async def main() -> None:
            ended = False

            async def work() -> None:
                while not ended:
                    mine = slot(limit=10_000)
                    try:
                        await store.atake([mine])
                        admitted[0] += 1
                    except BackendError:
                        await asyncio.sleep(0.01)
                    finally:
                        await store.agive([mine])

            tasks = [asyncio.create_task(work()) for _ in range(20)]
            for _ in many(100 if LONG else 45, lambda: admitted[0] > 100):
                await asyncio.sleep(random.uniform(0, 0.05))
                await asyncio.get_running_loop().run_in_executor(None, proxy.cut)
            ended = True
            await asyncio.wait(tasks)
            await asyncio.sleep(0.5)

        asyncio.run(main())
        assert admitted[0] > 100
        assert drained(redis_server, prefix), redis_server.held(prefix)

    def test_what_a_lost_connection_still_had_under_way_does_not_overtake(
        self, redis_server: RedisServer, proxy: Proxy, prefix: str
    ) -> None:
        """Cut on the client's side: the acquire would reach the server after the release that the next connection sends,
        had that one not fenced off the lost one first."""
        (store,) = [next(made(proxy.url, prefix, socket_timeout=1))]

        async def main() -> None:
            warm, mine = slot("warm"), slot("under way")
            await store.atake([warm])
            proxy.delay = lambda: 0.4
            asking = asyncio.create_task(store.atake([mine]))
            await asyncio.sleep(0.1)
            proxy.delay = lambda: 0.0
            asking.cancel()
            await asyncio.get_running_loop().run_in_executor(None, proxy.cut_clients)
            await store.agive([mine, warm])
            assert await await_until(lambda: redis_server.held(prefix) == 0)
            await asyncio.sleep(0.5)  # what was under way would have arrived

        asyncio.run(main())
        assert redis_server.held(prefix) == 0
        assert proxy.connections == 2

    def test_killed_again_and_again_under_load_no_call_fails(self, redis_server: RedisServer, prefix: str) -> None:
        (store,) = [next(made(redis_server.url, prefix, socket_timeout=5))]
        admitted = [0]

        async def main() -> None:
            ended = False

            async def work() -> None:
                while not ended:
                    mine = slot(limit=10_000)
                    await store.atake([mine])
                    admitted[0] += 1
                    await store.agive([mine])

            tasks = [asyncio.create_task(work()) for _ in range(20)]
            with redis_server.client() as client:
                for _ in many(KILLS, lambda: admitted[0] > 200):
                    await asyncio.sleep(0.005)
                    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            ended = True
            await asyncio.gather(*tasks)

        asyncio.run(main())
        assert admitted[0] > 200
        assert drained(redis_server, prefix), redis_server.held(prefix)

    def test_a_late_reply_leaves_no_slot(
        self, through_proxy: RedisBackend, proxy: Proxy, redis_server: RedisServer
    ) -> None:
        """Nobody but the store itself can release it in time: behind the acquire, on its connection."""

        def takes() -> int:
            with redis_server.client() as client:
                return int(client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))

        def held() -> list[str]:
            return [holder.policy for holder in through_proxy.snapshot()]

        async def main() -> None:
            await through_proxy.atake([slot("warm")])
            before = takes()
            proxy.delay = lambda: 0.4
            with impatient(through_proxy), pytest.raises(BackendError):
                await through_proxy.atake([slot("late")])
            proxy.delay = lambda: 0.0
            assert await await_until(lambda: takes() > before), "it was not carried out"
            for _ in range(200):  # while the loop is still running
                if await asyncio.to_thread(held) == ["warm"]:
                    return
                await asyncio.sleep(0.05)

        asyncio.run(main())
        assert held() == ["warm"]

    def test_200_loops_leave_no_socket(self, store: RedisBackend, redis_server: RedisServer, prefix: str) -> None:
        async def request() -> None:
            mine = slot(limit=10_000)
            assert isinstance(await store.atake([mine]), Taken)
            await store.agive([mine])

        before = redis_server.sockets()
        for _ in range(200):
            async_to_sync(request)()
        gc.collect()
        assert wait_until(lambda: redis_server.sockets() <= before)
        assert len(store._muxes) <= 1
        assert drained(redis_server, prefix)

    @pytest.mark.parametrize("when", ["it has just connected", "it is just told to try again"])
    def test_a_loop_that_ends_at_any_moment_is_not_held_up(
        self, store: RedisBackend, redis_server: RedisServer, when: str
    ) -> None:
        """The cancel comes in the very step in which what the connection waits for is there."""

        async def main() -> None:
            await store.atake([slot(limit=5)])
            (mux,) = store._muxes.values()
            owner, greet = mux._owner, mux._greet
            assert owner is not None

            async def greeted(conn: Any, work: Any) -> Any:
                reply = await greet(conn, work)
                if when == "it has just connected":
                    mux.loop.call_soon(owner.cancel)
                return reply

            mux._greet = greeted  # type: ignore[method-assign]  # to know when
            if when == "it is just told to try again":
                mux._failed = lambda *args, **kwargs: setattr(mux, "_next_try", mux.loop.time() + 60)  # type: ignore[method-assign]
            waiting = asyncio.ensure_future(store.atake([slot(limit=5)]))
            await asyncio.sleep(0)
            await mux._conn.disconnect(nowait=True)
            if when == "it is just told to try again":
                assert await await_until(lambda: mux._next_try > mux.loop.time())
                await asyncio.sleep(0.01)
                mux.retry_now()
                await asyncio.sleep(0)
                owner.cancel()
            done, _ = await asyncio.wait([owner], timeout=SOON)
            assert done == {owner}
            await asyncio.wait([waiting], timeout=2)

        asyncio.run(main())

    def test_a_loop_that_ends_at_once_leaves_its_releases_to_the_next_connection(
        self, proxy: Proxy, redis_server: RedisServer, prefix: str
    ) -> None:
        """Its last release cannot be sent any more: the network is gone when the loop ends, which waits for it so long."""
        (store,) = [next(made(proxy.url, prefix, socket_timeout=1))]

        async def request() -> None:
            mine = slot(limit=10_000)
            await store.atake([mine])
            proxy.black_hole = True
            await store.agive([mine])

        asyncio.run(request())
        assert redis_server.held(prefix) == 1
        proxy.cut()
        proxy.black_hole = False
        one = slot("other")
        assert isinstance(store.take([one]), Taken)
        store.give([one])
        assert drained(redis_server, prefix)


class TestLocations:
    def test_a_unix_socket(self, tmp_path: Any, prefix: str) -> None:
        path = f"{tempfile.gettempdir()}/concurrency-{os.getpid()}.sock"
        server = RedisServer("--unixsocket", path)
        try:
            self.works(f"unix://{path}?db=0", prefix)
        finally:
            server.stop()

    def test_a_password_and_an_acl_user(self, prefix: str) -> None:
        server = RedisServer()
        try:
            client = server.client()
            client.execute_command(
                "ACL", "SETUSER", "limiter", "on", ">pass", f"~{{{prefix}}}*", "+@all", "-@dangerous", "+client"
            )
            client.execute_command("CONFIG", "SET", "requirepass", "secret")
            self.works(f"redis://:secret@127.0.0.1:{server.port}/0", prefix)
            self.works(f"redis://limiter:pass@127.0.0.1:{server.port}/0", prefix)
            store = next(made(f"redis://:wrong@127.0.0.1:{server.port}/0", prefix))
            with pytest.raises(BackendError):
                store.take([slot()])
        finally:
            server.stop()

    def test_tls_with_a_certificate_that_is_checked(
        self, redis_server: RedisServer, prefix: str, tmp_path: Path
    ) -> None:
        authority = trustme.CA()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        proxy = Proxy(redis_server.port, tls=context)
        url = proxy.url.replace("redis://", "rediss://")
        try:
            self.works(url, prefix, ssl_ca_certs=str(tmp_path / "ca.pem"))
            store = next(made(url, prefix))
            with pytest.raises(BackendError, match="certificate verify failed"):
                store.take([slot()])
        finally:
            proxy.stop()

    @pytest.mark.parametrize("protocol", [2, 3])
    def test_either_protocol(self, redis_server: RedisServer, prefix: str, protocol: int) -> None:
        self.works(redis_server.url, prefix, protocol=protocol)

    def works(self, url: str, prefix: str, **options: Any) -> None:
        store = next(made(url, prefix, **options))
        one = slot()
        assert isinstance(store.take([one]), Taken)
        store.give([one])

        async def main() -> None:
            assert isinstance(await store.atake([one]), Taken)
            await store.agive([one])

        asyncio.run(main())
        store.close()


@pytest.mark.parametrize(
    ("location", "options", "says"),
    [
        ("http://x", {}, "expected a URL"),
        (["redis://x"], {}, "expected a URL"),
        ("redis://127.0.0.1:port/0", {}, "cannot be used"),
        (None, {"socket_timeut": 1}, "did you mean 'socket_timeout'"),
        (None, {"decode_responses": True}, "raw replies"),
        (None, {"retry_on_timeout": True}, "retries nothing"),
        (None, {"sentinels": []}, "expected a list of URLs"),
        (["redis://x"], {}, "a list is for a Cluster"),
        ([], {"cluster": True}, "an empty list"),
        ("unix:///redis.sock", {"cluster": True}, "expected URLs of nodes"),
        (
            ["redis://x", "redis://:secret@y"],
            {"cluster": True},
            r"differs from the first URL in more than host and port",
        ),
        (["redis://x", "rediss://y"], {"cluster": True}, "TLS are those of all nodes"),
        (["redis://x/1"], {"cluster": True}, "database 0 only"),
        ("redis://x", {"cluster": True, "db": 2}, "database 0 only"),
        ("redis://x?db=2", {"cluster": True}, "database 0 only"),
        ("redis://x", {"cluster": 1}, "expected True or False"),
        ("redis://x", {"cluster": True, "address_remap": "10.0.0.1"}, "expected a callable"),
        ("redis://x", {"cluster": True, "host": "y"}, r"\['host'\]: the URLs in LOCATION say"),
        ("redis://x", {"cluster": True, "port": 1}, r"\['port'\]: the URLs in LOCATION say"),
        ("redis://x", {"address_remap": None}, "for a Cluster alone"),
        (None, {"sentinels": ["redis://x"], "master_name": "m", "cluster": True}, "a Cluster has no sentinels"),
        ("redis://x", {"sentinels": ["redis://x"], "master_name": "m", "cluster": 1}, "a Cluster has no sentinels"),
        (None, {"socket_timeout": 0}, "expected seconds"),
        (None, {"socket_timeout": "1"}, "expected seconds"),
        ("redis://:secret@x/abc", {}, "its database is no number"),
        (["redis://:secret@x/abc"], {"cluster": True}, "its database is no number"),
        (None, {"db": "1x"}, r"\['db'\]: expected a number, got '1x'"),
        (None, {"db": True}, r"\['db'\]: expected a number"),
        (None, {"db": -1}, r"\['db'\]: expected a number"),
        ("redis://", {"port": "x"}, r"\['port'\]: expected a number"),
        (None, {"protocol": 4}, r"\['OPTIONS'\]: protocol must be"),
        (None, {"username": "u", "password": "secret", "credential_provider": object()}, "cannot be passed along"),
    ],
)
def test_what_cannot_work_is_refused_by_name(location: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=says) as raised:
        RedisBackend(BackendConfig("other", "redis", location, "p", options))
    assert "['other']" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_braces_in_the_prefix_are_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="KEY_PREFIX"):
        RedisBackend(BackendConfig("default", "redis", None, "a{b}"))


def test_digits_are_a_number() -> None:
    store = RedisBackend(BackendConfig("other", "redis", "redis://x", "p", {"db": "3", "protocol": "3"}))
    assert store.server == ("x", 6379, 3)


def test_an_empty_prefix_is_refused_on_a_cluster_alone() -> None:
    RedisBackend(BackendConfig("default", "redis", None, ""))
    with pytest.raises(ImproperlyConfigured, match=r"KEY_PREFIX.*cannot be empty"):
        RedisBackend(BackendConfig("default", "redis", "redis://x", "", {"cluster": True}))


def test_without_redis_py_the_error_says_what_to_install(run_python: Callable[..., Any]) -> None:
    done = run_python(
        "-c",
        "import sys; sys.modules['redis'] = None\n"
        "import django; django.setup()\n"
        "from django_concurrency_mw.backends import BackendConfig, get_backend\n"
        "get_backend('default', {'default': BackendConfig('default', 'redis')})",
        env={"DJANGO_SETTINGS_MODULE": "tests.settings"},
    )
    assert "ImproperlyConfigured" in done.stderr
    assert "pip install 'django_concurrency_mw[redis]'" in done.stderr

"""The Redis store after a fault: what was held is given back in the end, and nobody waits, retries or grows for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Any

import pytest
import redis
from django.core.exceptions import ImproperlyConfigured
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.greeting import Greeting
from django_concurrency_mw.backends.redis.leftovers import Work
from django_concurrency_mw.backends.redis.line import Line, nothing
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import pack
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keeper import SETTLE_FOR, Keeper, keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot, Taken
from django_concurrency_mw.tokens import new_token

from .conftest import Run
from .proxy import Proxy
from .redis_server import RedisServer
from .servers import free_port
from .support import SOON, await_until, wait_until

REDIS = "django_concurrency_mw.backends.redis"
Make = Callable[..., RedisBackend]


@pytest.fixture
def make(redis_server: RedisServer, proxy: Proxy, prefix: str) -> Iterator[Make]:
    """A store of the test's prefix, by default on the server of all tests. When the test is over, so is the fault, and all
    that was left over is delivered."""
    made = []

    def make(url: str = redis_server.url, **options: Any) -> RedisBackend:
        # A busy machine may answer late; a test that is about the deadline sets it.
        store = RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 5, **options}))
        made.append(store)
        return store

    yield make
    proxy.black_hole = proxy.drop_replies = False
    for store in made:
        store.close()
        assert delivered(store)


@pytest.fixture(scope="module")
def busy_server() -> Iterator[RedisServer]:
    """A server that says BUSY after 50 ms of one script."""
    server = RedisServer("--lua-time-limit", "50")
    yield server
    server.stop()


@contextlib.contextmanager
def busy(server: RedisServer) -> Iterator[None]:
    """A script spins there, so that everything else is answered with BUSY."""
    once = Retry(NoBackoff(), 0)  # a client that asks again would begin again

    def spin() -> None:
        with server.client(socket_timeout=60, retry=once) as client, contextlib.suppress(redis.ResponseError):
            client.eval("while true do end", 0)

    def says_busy() -> bool:
        with server.client() as client:
            try:
                client.ping()
            except redis.ResponseError:
                return True
            return False

    spinning = threading.Thread(target=spin)
    spinning.start()
    try:
        assert wait_until(says_busy)
        yield
    finally:
        with server.client() as client:
            client.script_kill()
        spinning.join()


@pytest.fixture
def quick_tending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle connections are looked at all the time, and count as idle at once."""
    monkeypatch.setattr(f"{REDIS}.store.TEND_EVERY", 0.05)
    monkeypatch.setattr(f"{REDIS}.lines.HEAR_AFTER", 0.0)


def slot(policy: str = "p", limit: int = 1000, ttl: float = 60.0) -> Slot:
    return Slot(policy, make_key("k"), limit, ttl, new_token())


def policies(store: RedisBackend) -> list[str]:
    """The policy of each slot that is held."""
    return sorted(holder.policy for holder in store.snapshot())


def delivered(store: RedisBackend) -> bool:
    """Is nothing left over?"""
    return wait_until(lambda: not store._delivering and not store._leftovers)


def drained(server: RedisServer, prefix: str) -> bool:
    return wait_until(lambda: server.held(prefix) == 0)


def new_lines(store: RedisBackend, number: int) -> list[Line]:
    """Connections that were idle for longer than it takes to be looked at. They are not in the stack."""
    lines = [store._lines._connect(monotonic() + 2) for _ in range(number)]
    for line in lines:
        line.used -= 2
    return lines


def hear_idle(store: RedisBackend) -> None:
    """Look after the connections now, as if they had been idle for long."""
    for line in list(store._lines._free):
        line.used -= 2
    store._lines.tend()


def will_deliver(store: RedisBackend) -> bool:
    """Has the keeper put off the delivery, to try it again?"""
    return any(call == store._deliver for _, _, call in list(keeper._calls))


def seconds_later(module: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on so many seconds have passed for that module."""
    monkeypatch.setattr(f"{REDIS}.{module}.monotonic", lambda: monotonic() + seconds)


HOLDS_AT_ITS_END = """
import asyncio
import os

import django

django.setup()
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.policies import Policy

store = RedisBackend(BackendConfig("default", "redis", os.environ["URL"], os.environ["PREFIX"], {"socket_timeout": 5}))
one = Slot("p", make_key("k"), 1, 60.0, "token")
lease = Lease()


async def main():
    lease.expect(store, [Policy("p", parse_key("global"), 1)], [one])
    await store.atake([one])
    lease.confirm([one], [one])


asyncio.run(main())
print("held", len(store.snapshot()))
"""


class TestAtExit:
    def test_a_process_of_loops_alone_gives_back_what_it_holds(
        self, run_python: Run, redis_server: RedisServer, prefix: str
    ) -> None:
        """It has no connection of threads, so the release is left over and the keeper would have to deliver it."""
        done = run_python(
            "-c",
            HOLDS_AT_ITS_END,
            env={"DJANGO_SETTINGS_MODULE": "tests.settings", "URL": redis_server.url, "PREFIX": prefix},
        )
        assert (done.stdout, done.stderr) == ("held 1\n", "")
        assert redis_server.held(prefix) == 0

    def test_the_flush_does_what_is_due_and_starts_no_thread(self) -> None:
        """At an exit no thread can be started from Python 3.12 on, and one that was would end half way."""
        mine = Keeper()
        threads: list[int] = []

        class Lease:
            is_asking = False

            def __bool__(self) -> bool:
                return True

            def release(self) -> None:
                mine.at(0, lambda: threads.append(threading.get_ident()))

        mine.watch(Lease(), float("inf"))
        mine.flush()
        assert threads == [threading.get_ident()]
        assert mine._thread is None

    def test_the_flush_waits_for_what_the_thread_is_doing(self) -> None:
        mine = Keeper()
        started, go, ended = threading.Event(), threading.Event(), threading.Event()

        def deliver() -> None:
            started.set()
            go.wait(SOON)
            ended.set()

        mine.at(0, deliver)
        assert started.wait(SOON)
        timer = threading.Timer(0.1, go.set)
        timer.start()
        mine.flush()
        assert ended.is_set()
        timer.join()

    def test_the_flush_lets_those_hear_who_are_just_asking(self) -> None:
        """Their take may overtake what gives it back, and only they know when it is answered."""
        mine = Keeper()

        class Asking:
            is_asking = True

            def __init__(self) -> None:
                self.released = threading.Event()

            def __bool__(self) -> bool:
                return True

            def release(self) -> None:
                self.released.set()
                mine.forget(self)

        lease, given, never = Asking(), threading.Event(), Asking()

        def ask() -> None:
            lease.released.wait(SOON)
            lease.is_asking = False
            given.set()

        thread = threading.Thread(target=ask)
        thread.start()
        mine.watch(lease, float("inf"))
        mine.flush()
        assert given.is_set()
        thread.join()
        mine.watch(never, float("inf"))
        began = monotonic()
        mine.flush()  # one that will never hear holds up no exit for long
        assert SETTLE_FOR <= monotonic() - began < 10 * SETTLE_FOR
        assert never.released.is_set()


class TestIdleLines:
    def test_what_one_owes_is_bounded(self, make: Make) -> None:
        """A process that takes on its event loops and gives back in threads never calls on such a connection."""
        store = make()
        store.take([slot("kept")])
        (line,) = store._lines._free
        most = 0
        for _ in range(5000):
            store.give([slot()])
            most = max(most, len(line.owed))
        assert most <= 64
        assert isinstance(store.take([slot("other")]), Taken)
        assert policies(store) == ["kept", "other"]
        assert store._lines.connects == 1

    @pytest.mark.usefixtures("quick_tending")
    def test_they_are_closed_where_all_calls_were_gives(
        self, make: Make, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(f"{REDIS}.lines.CLOSE_AFTER", 0.0)
        store, before = make(), redis_server.sockets()
        store.give([slot()])  # without a connection at hand, so the keeper makes one
        assert wait_until(lambda: store._lines.connects == 1)
        assert wait_until(lambda: redis_server.sockets() <= before)

    def test_a_black_hole_is_waited_for_once(self, make: Make, proxy: Proxy) -> None:
        """The keeper tends in the thread that renews the leases."""
        store = make(proxy.url, socket_timeout=0.25)
        lines = new_lines(store, 16)
        proxy.black_hole = True
        for line in lines:
            line.owed.append((nothing, 1))
            line.send(pack(b"PING"))
        store._lines._free.extend(lines)
        start = monotonic()
        store._lines.tend()
        assert monotonic() - start < 5 * 0.25
        proxy.black_hole = False
        proxy.cut()

    def test_slow_answers_share_one_deadline(self, make: Make, redis_server: RedisServer) -> None:
        """40 that answer one after the other, each well within the timeout after the one before: 4 s in all."""
        store = make(socket_timeout=0.25)
        lines = new_lines(store, 40)
        for number, line in enumerate(lines, 1):
            line.owed.append((nothing, 1))
            line.send(pack(b"BLPOP", b"nothing", b"%.1f" % (0.1 * number)))
        store._lines._free.extend(lines)
        store._lines.tend()
        assert sum(len(line.owed) for line in lines) > 20
        assert set(store._lines._free) == set(lines)
        with redis_server.client() as client:
            for line in lines:
                assert line.client is not None
                client.client_unblock(line.client.number)


class TestRefusedReleases:
    """BUSY goes by, so the release is put back and the keeper delivers it; what is forbidden or nonsense is not repeated."""

    @pytest.mark.parametrize("heard_by", ["tend", "take", "give"])
    def test_busy_for_a_thread(self, make: Make, busy_server: RedisServer, prefix: str, heard_by: str) -> None:
        store = make(busy_server.url)
        many = [slot() for _ in range(65 if heard_by == "give" else 1)]
        for one in many:
            store.take([one])
        with busy(busy_server):
            for one in many:  # the 65th hears the oldest replies
                store.give([one])
            if heard_by == "tend":
                hear_idle(store)
            elif heard_by == "take":
                with pytest.raises(BackendError, match="BUSY"):
                    store.take([slot()])
            assert wait_until(lambda: bool(store._leftovers) and will_deliver(store))
        hear_idle(store)
        assert drained(busy_server, prefix)

    def test_busy_for_a_loop(self, make: Make, busy_server: RedisServer, prefix: str) -> None:
        store = make(busy_server.url)

        async def main() -> None:
            one = slot()
            await store.atake([one])
            with busy(busy_server):
                await store.agive([one])
                assert await await_until(lambda: bool(store._leftovers) and will_deliver(store))

        asyncio.run(main())
        assert drained(busy_server, prefix)

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_busy_for_the_greeting(self, make: Make, busy_server: RedisServer, half: str) -> None:
        """A call connects and picks up a release before the keeper sees it, so nobody else knows of that. It has no
        connection then: that could not be told from others, nor has it fenced off those that were lost."""
        store, left_over, lost = make(busy_server.url), slot("left over"), make(busy_server.url)
        lost.take([left_over])
        (line,) = lost._lines._free
        store._leftovers.put_back(Work([], store._keys.give([left_over])))
        store._leftovers.fence(line.client)
        with busy(busy_server), pytest.raises(BackendError):
            take_in(half, store, slot("new"))
        assert wait_until(lambda: policies(store) == [])
        with busy_server.client() as client:
            assert line.client is not None
            assert str(line.client.number) not in {known["id"] for known in client.client_list()}
        lost._lines._free.clear()
        line.conn.disconnect()

    @pytest.mark.parametrize("half", ["threads", "loop", "keeper"])
    @pytest.mark.parametrize("why", ["NOPERM", "WRONGTYPE"])
    def test_what_stays_refused_is_not_repeated(
        self, make: Make, redis_server: RedisServer, prefix: str, why: str, half: str
    ) -> None:
        store, one = make(f"redis://{prefix}:pass@127.0.0.1:{redis_server.port}/0"), slot()
        with redis_server.client() as client:
            rules = ["+@all", "-zrem"] if why == "NOPERM" else ["+@all"]
            client.acl_setuser(prefix, enabled=True, passwords=["+pass"], keys=["*"], commands=rules)

        def spoil() -> None:
            if why == "WRONGTYPE":
                with redis_server.client() as client:
                    (key,) = client.scan_iter(f"{{{prefix}}}:1:*")
                    client.set(key, "no sorted set")

        async def main() -> None:
            await store.atake([one])
            spoil()
            await store.agive([one])
            (mux,) = store._muxes.values()
            assert await await_until(lambda: not mux._unanswered)

        if half == "loop":
            asyncio.run(main())
            connects = 0
        else:
            (store if half == "threads" else make()).take([one])
            spoil()
            store.give([one])
            connects = 1
            if half == "threads":
                hear_idle(store)
            else:
                assert wait_until(lambda: store._lines.connects == 1 and not store._delivering)
        assert not store._leftovers
        assert not store._delivering
        assert store._lines.connects == connects


def take_in(half: str, store: RedisBackend, one: Slot) -> None:
    """In a thread, or on an event loop."""
    if half == "threads":
        store.take([one])
    else:
        asyncio.run(store.atake([one]))


class TestLostConnections:
    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_a_stranger_with_the_number_of_a_lost_one_lives(self, make: Make, half: str) -> None:
        """A server that was restarted counts its clients from the start again."""
        server = RedisServer()
        store = make(server.url)

        async def take(one: Slot) -> Any:
            return await (store.atake([one]) if half == "loop" else asyncio.to_thread(store.take, [one]))

        async def main() -> None:
            for _ in range(50):  # so that the number is still free after the restart
                with server.client() as client:
                    client.ping()
            await take(slot())
            (lost,) = [*(line.client for line in store._lines._free), *(mux._client for mux in store._muxes.values())]
            assert lost is not None
            server.restart()
            with contextlib.ExitStack() as strangers:
                for _ in range(200):
                    stranger = strangers.enter_context(server.client(single_connection_client=True))
                    if stranger.client_id() == lost.number:
                        break
                assert stranger.client_id() == lost.number
                assert isinstance(await take(slot()), Taken)
                assert stranger.client_id() == lost.number, "it was cut, and has connected anew"

        try:
            asyncio.run(main())
        finally:
            server.stop()

    @pytest.mark.parametrize("reconnect", ["gets no answer", "breaks"])
    def test_an_acquire_is_undone_whose_second_connection_fails(
        self, make: Make, proxy: Proxy, redis_server: RedisServer, prefix: str, reconnect: str
    ) -> None:
        """The first one died when the server had taken the slot and its reply was under way."""
        store = make(proxy.url, socket_timeout=0.5)
        store.take([slot("kept")])
        failed: list[BackendError] = []

        def ask() -> None:
            try:
                store.take([slot("lost")])
            except BackendError as error:
                failed.append(error)

        proxy.drop_replies = True
        asking = threading.Thread(target=ask)
        asking.start()
        assert wait_until(lambda: redis_server.held(prefix) == 2)
        if reconnect == "breaks":
            break_connections(store)
        else:
            proxy.black_hole = True
        proxy.cut_clients()
        asking.join()
        assert len(failed) == 1
        proxy.black_hole = proxy.drop_replies = False
        assert wait_until(lambda: policies(store) == ["kept"])


def break_connections(store: RedisBackend) -> None:
    """The next connection cannot even be made, for a reason that no Redis client gives."""
    broken = threading.Event()

    def breaks_once(connection_class: Callable[..., Any]) -> Any:
        def make(**keywords: Any) -> Any:
            if broken.is_set():
                return connection_class(**keywords)
            broken.set()
            raise ValueError("out of the blue")

        return make

    recipe = store._recipe
    recipe.class_, recipe.async_class = breaks_once(recipe.class_), breaks_once(recipe.async_class)


class BreaksOnce(CredentialProvider):
    """A credential provider of a project, whose own source is away for a moment."""

    def __init__(self) -> None:
        self.asked = 0

    def get_credentials(self) -> tuple[str, str]:
        self.asked += 1
        if self.asked == 1:
            raise ValueError("out of the blue")
        return ("default", "any")

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


class TestErrorsThatNobodyExpects:
    @pytest.fixture(params=["class", "credentials"])
    def store(self, request: pytest.FixtureRequest, make: Make) -> RedisBackend:
        """One whose first connection breaks."""
        if request.param == "credentials":
            return make(credential_provider=BreaksOnce())
        store = make()
        break_connections(store)
        return store

    def test_the_keeper_goes_on_delivering(
        self, store: RedisBackend, make: Make, redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        one = slot()
        make().take([one])
        store.give([one])
        assert drained(redis_server, prefix)
        assert "out of the blue" in caplog.text
        assert delivered(store)

    def test_a_take_fails_as_a_store_that_is_away(self, store: RedisBackend) -> None:
        with pytest.raises(BackendError, match="out of the blue"):
            store.take([slot()])
        assert isinstance(store.take([slot()]), Taken)

    def test_a_loop_connects_again_within_the_deadline(self, store: RedisBackend, make: Make) -> None:
        """And the release that it had picked up is delivered."""
        left_over = slot("left over")
        make().take([left_over])
        store._leftovers.put_back(Work([], store._keys.give([left_over])))
        assert isinstance(asyncio.run(store.atake([slot("new")])), Taken)
        assert wait_until(lambda: policies(store) == ["new"])

    @pytest.mark.usefixtures("quick_tending")
    def test_tending_goes_on(self, make: Make, redis_server: RedisServer, prefix: str) -> None:
        store, lost, heard = make(), slot(), slot()

        def breaks(*arguments: Any, **keywords: Any) -> Any:
            raise ValueError("out of the blue")

        with keeper._working:  # it looks at them when all is prepared
            before, broken, behind = new_lines(store, 3)
            store._lines._free.append(before)
            for one in (lost, heard):
                store.take([one])
            store._lines._free.append(broken)
            broken.socket.sendall = lambda data: None
            broken.socket.number = breaks
            store.give([lost])
            store._lines._free.append(behind)
            store.give([heard])
            assert [len(line.owed) for line in store._lines._free] == [0, 1, 1]
        assert wait_until(lambda: not behind.owed)
        assert drained(redis_server, prefix)
        with keeper._working:
            assert {before, behind} <= set(store._lines._free)
            assert broken not in store._lines._free
        broken.conn.disconnect()

    def test_what_is_asked_by_hand_fails_as_a_store_that_is_away(self, make: Make) -> None:
        nobody = make(f"redis://127.0.0.1:{free_port()}/0")
        for call in (partial(nobody.evict, "token"), nobody.snapshot):
            with pytest.raises(BackendError):
                call()


class TestOptionsInTheUrl:
    @pytest.mark.parametrize(
        ("query", "says"),
        [
            ("foo=1", "no 'foo'"),
            ("foo=", "no 'foo'"),
            ("socket_timeut=1", "did you mean 'socket_timeout'"),
            ("socket_timeout=0", "expected seconds"),
            ("socket_timeout=", "expected seconds"),
            ("decode_responses=True", "raw replies"),
            ("retry_on_timeout=1", "retries nothing"),
            ("health_check_interval=5", "found by its use"),
            ("max_connections=3", "as many connections"),
            ("socket_connect_timeout=3", "one deadline"),
            ("cluster=1", "not into the URL"),
        ],
    )
    def test_they_are_refused_by_name(self, query: str, says: str) -> None:
        location = f"redis://:hush@127.0.0.1:6379/0?{query}"
        with pytest.raises(ImproperlyConfigured, match=says) as raised:
            RedisBackend(BackendConfig("other", "redis", location, "p"))
        assert f"['other']['OPTIONS'][{query.partition('=')[0]!r}]" in str(raised.value)
        assert "hush" not in whole_text(raised.value)

    @pytest.mark.parametrize(
        "location",
        ["redis://:hush@127.0.0.1:port/0", "redis://user:hush@h:1x/0?foo=1", "http://:hush@h", ["redis://:hush@h"]],
    )
    def test_a_password_is_not_printed(self, location: Any) -> None:
        with pytest.raises(ImproperlyConfigured, match=r"\['other'\]\['LOCATION'\]") as raised:
            RedisBackend(BackendConfig("other", "redis", location, "p"))
        assert "hush" not in whole_text(raised.value)

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_the_timeout_is_the_one_deadline(self, make: Make, proxy: Proxy, half: str) -> None:
        """It wins over the one in OPTIONS, as redis-py has it."""
        store = make(f"{proxy.url}?socket_timeout=0.25", socket_timeout=5)
        assert store._recipe.async_keywords["socket_timeout"] is None
        proxy.black_hole = True
        start = monotonic()
        with pytest.raises(BackendError):
            take_in(half, store, slot())
        assert monotonic() - start < 5 * 0.25

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_what_is_good_counts(self, make: Make, redis_server: RedisServer, prefix: str, half: str) -> None:
        take_in(half, make(f"redis://127.0.0.1:{redis_server.port}?db=3&protocol=3"), slot())
        with redis_server.client(db=3) as client:
            assert len(list(client.scan_iter(f"{{{prefix}}}:1:*"))) == 1


def whole_text(error: BaseException | None) -> str:
    """What a traceback says of it and of what it came from."""
    said = ""
    while error is not None:
        said += f"{error!r} {error}\n"
        error = error.__cause__ or error.__context__
    return said


class TestReleasesHaveAnEnd:
    """A lease of 10 minutes is given back after an outage of 100 s; one of 50 s has ended by itself meanwhile."""

    def test_of_threads(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        store, both = make(), [slot("long", ttl=600), slot("short", ttl=50)]
        make().take(both)
        with keeper._working:  # it looks at them when the time has passed
            store.give(both)
            seconds_later("leftovers", 100, monkeypatch)
        assert wait_until(lambda: policies(store) == ["short"])

    def test_of_a_loop(self, make: Make, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
        store, both = make(proxy.url), [slot("long", ttl=600), slot("short", ttl=50)]

        def heal() -> None:
            proxy.cut()
            proxy.black_hole = False

        async def main() -> None:
            await store.atake(both)
            proxy.black_hole = True
            await store.agive(both)
            seconds_later("mux", 100, monkeypatch)
            await asyncio.to_thread(heal)
            assert await await_until(lambda: policies(store) == ["short"])
            (mux,) = store._muxes.values()
            assert await await_until(lambda: not mux._unanswered)

        asyncio.run(main())
        assert policies(store) == ["short"]

    # The loop's own socket is left to the garbage collection.
    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("found_by", ["the next loop", "tending"])
    def test_a_loop_that_is_closed_without_a_word_leaves_them_to_others(
        self, make: Make, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, found_by: str
    ) -> None:
        """Its tasks are not cancelled, and one of them waits for a slot."""
        monkeypatch.setattr(f"{REDIS}.store.TEND_EVERY", 0.05 if found_by == "tending" else 3600)
        store, one = make(proxy.url), slot("one")
        loop = asyncio.new_event_loop()
        loop.run_until_complete(store.atake([one]))
        proxy.black_hole = True
        asking = loop.create_task(store.atake([slot("asked")]))
        loop.run_until_complete(store.agive([one]))
        loop.close()
        proxy.cut()
        proxy.black_hole = False
        expected = []
        if found_by == "the next loop":
            asyncio.run(store.atake([slot("next")]))
            expected = ["next"]
        assert wait_until(lambda: policies(store) == expected)
        assert not [known for known in store._muxes if known is loop]
        del loop, asking
        gc.collect()


class TestHalfHeard:
    def test_what_was_refused_is_kept_when_the_next_reply_does_not_come(
        self, make: Make, busy_server: RedisServer, prefix: str
    ) -> None:
        """BUSY for the first release is read, and then the connection is gone."""
        store, first, second = make(busy_server.url), slot(), slot()
        store.take([first])
        store.take([second])
        with busy(busy_server):
            store.give([first])
            store.give([second])
            (line,) = store._lines._free
            read, replies = line.conn.read_response, iter([True, False])

            def once(**kwargs: Any) -> Any:
                if next(replies):
                    return read(**kwargs)
                raise redis.ConnectionError("cut")

            line.conn.read_response = once
            hear_idle(store)
        assert drained(busy_server, prefix)

    def test_each_refused_release_is_put_back_once(self, make: Make, busy_server: RedisServer, prefix: str) -> None:
        store, many = make(busy_server.url), [slot() for _ in range(10)]
        for one in many:
            store.take([one])
        with busy(busy_server), keeper.at_work():  # which delivers some of them while others are put back
            store.give(many)
            hear_idle(store)
            assert len(store._leftovers) == 10
        assert drained(busy_server, prefix)

    def test_a_line_that_never_answers_is_given_up(
        self, make: Make, proxy: Proxy, redis_server: RedisServer, prefix: str
    ) -> None:
        """Its release was lost on the way. It must not stand before the others for ever."""
        store, one = make(proxy.url), slot()
        store.take([one])
        store._recipe.timeout = 0.1
        proxy.drop_replies = True
        store.give([one])
        hear_idle(store)
        assert len(store._lines) == 1
        hear_idle(store)
        assert len(store._lines) == 0
        proxy.drop_replies = False
        assert drained(redis_server, prefix)

    def test_close_leaves_no_connection_open(self, make: Make, proxy: Proxy) -> None:
        store = make(proxy.url, socket_timeout=0.1)
        store._lines._free.extend(new_lines(store, 3))
        for line in store._lines._free:
            line.owed.append((nothing, 1))
        store.close()
        assert len(store._lines) == 0


class TestTheFlush:
    def test_what_its_own_work_leaves_to_do_at_once_is_done(self) -> None:
        """Giving back what was owed needs a connection, which is made by a call that is due at once."""
        own, done = Keeper(), []

        class Store:
            def give(self, slots: Any) -> None:
                own.at(0, lambda: (done.append("delivered"), own.at(0, lambda: done.append("once more")))[0])

        own.give_later(Store(), [slot()], monotonic() + 60)
        own.at(60, lambda: own.at(0, lambda: done.append("tended")))
        own.at(60, lambda: own.at(60, lambda: done.append("far away")))
        own.flush()
        assert sorted(done) == ["delivered", "once more", "tended"]


class TestUnusual:
    # The loop's own socket is left to the garbage collection.
    @pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    def test_a_loop_closed_while_an_acquire_is_unanswered(
        self, make: Make, proxy: Proxy, redis_server: RedisServer, prefix: str
    ) -> None:
        """The server has carried it out; nobody was told, and its undo is left to others."""
        store = make(proxy.url)

        async def connect() -> None:
            await store.agive([slot()])
            one = slot()
            await store.atake([one])
            await store.agive([one])

        async def ask() -> None:
            proxy.drop_replies = True
            await store.atake([slot(ttl=600)])

        loop = asyncio.new_event_loop()
        loop.run_until_complete(connect())
        task = loop.create_task(ask())
        loop.run_until_complete(asyncio.sleep(0.05))
        assert wait_until(lambda: redis_server.held(prefix) == 1)
        loop.close()
        task.get_coro().close()  # type: ignore[union-attr]  # as a garbage collection does
        store._drop_ended()
        proxy.drop_replies = False
        assert drained(redis_server, prefix)
        del loop, task
        gc.collect()

    def test_a_client_behind_a_path_with_blanks(self) -> None:
        reply = b"id=7 addr=/tmp/h k.sock:0 laddr=/tmp/h k.sock:0 fd=8"
        client, refused = Greeting(Work([], [])).heard([reply, b"", b""])
        assert client == (7, b"/tmp/h k.sock:0")
        assert refused == []

    @pytest.mark.parametrize(
        "location",
        [
            "redis://:secret/pw@host",
            "redis://:sec@retpw@127.0.0.1:6379x",
            "redis://h:6379x/0?password=secret",
            "http://h/?password=secret",
            ["redis://:secret@h"],
            "redis://:secretpw#x@h",
            "redis://h:123?secretpw@h",
        ],
    )
    def test_no_message_tells_a_password(self, location: Any) -> None:
        with pytest.raises(ImproperlyConfigured) as caught:
            RedisBackend(BackendConfig("default", "redis", location, "p", {}))
        error: BaseException | None = caught.value
        while error is not None:
            assert "secret" not in str(error)
            assert "retpw" not in str(error)
            error = None if error.__suppress_context__ else error.__context__

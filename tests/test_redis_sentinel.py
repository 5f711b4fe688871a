"""The master is where the sentinels say, and requests bear what happens to it, to them, and to the way there."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import redis
import trustme
from django.core.exceptions import ImproperlyConfigured

from django_concurrency_mw import ConcurrencyLimitExceeded, conf, hold
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.redis.sentinel import Sentinels
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.held import NEVER
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.limiter import store_of
from django_concurrency_mw.outcomes import Queued, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .proxy import Proxy
from .redis_server import RedisServer
from .redis_trio import MASTER_NAME, SentinelServer, Trio, trio
from .servers import free_port
from .support import Limits, await_until, exit_code, wait_until, works, works_again
from .test_waiting import Client


@pytest.fixture(scope="module")
def three() -> Iterator[Trio]:
    """Whoever breaks it mends it."""
    with trio("--user", "app", "on", ">pw", "~*", "&*", "+@all") as made:
        yield made


@pytest.fixture
def make(prefix: str) -> Iterator[Callable[..., RedisBackend]]:
    stores: list[RedisBackend] = []

    def made(sentinels: list[str], location: str | None = None, **options: Any) -> RedisBackend:
        options = {"socket_timeout": 2, "sentinels": sentinels, "master_name": MASTER_NAME, **options}
        stores.append(RedisBackend(BackendConfig("default", "redis", location, prefix, options)))
        return stores[-1]

    yield made
    for store in stores:
        store.close()


Make = Callable[..., RedisBackend]


LOOK_EVERY = "django_concurrency_mw.backends.redis.sentinel.LOOK_EVERY"


@pytest.fixture
def watched(three: Trio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A sentinel whose connections are counted: those of calls."""
    monkeypatch.setattr(LOOK_EVERY, 3600)
    proxy = Proxy(three.sentinels[0].port)
    yield proxy
    proxy.stop()


@contextmanager
def sentinel(*lines: str) -> Iterator[SentinelServer]:
    """One by itself: it says what it was told, and makes nobody a master."""
    server = SentinelServer(free_port(), list(lines))
    try:
        yield server
    finally:
        server.stop()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def url(server: RedisServer | Proxy, by: str = "redis://") -> str:
    return f"{by}127.0.0.1:{server.port}"


def slot(policy: str = "p", limit: int = 100, ttl: float = 60.0) -> Slot:
    return Slot(policy, make_key("k"), limit, ttl, new_token())


def where(store: RedisBackend) -> Sentinels:
    assert isinstance(store._recipe.where, Sentinels)
    return store._recipe.where


def next_look(store: RedisBackend) -> float:
    """The monotonic second."""
    (due,) = [due for due, _, call in keeper._calls if call == store._tend]
    return due


class TestAsking:
    def test_the_master_is_found_by_threads_and_loops_and_asked_for_once(
        self, three: Trio, watched: Proxy, make: Make, prefix: str
    ) -> None:
        store = make([url(watched)])
        works(store)
        store._lines.refresh()
        works(store)
        assert watched.connections == 1
        assert wait_until(lambda: three.master.held(prefix) == 0)

    def test_who_needs_it_at_the_same_moment_shares_one_answer(self, watched: Proxy, make: Make) -> None:
        store = make([url(watched)])
        watched.delay = lambda: 0.05
        threads = [threading.Thread(target=store.take, args=([slot()],)) for _ in range(12)]
        for thread in threads:
            thread.start()
        works(store, "loop")
        for thread in threads:
            thread.join()
        assert watched.connections == 1

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_a_sentinel_that_never_answers_and_one_that_is_dead_cost_a_share_of_the_deadline(
        self, three: Trio, make: Make, half: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hole = f"redis://127.0.0.1:{silent.getsockname()[1]}"
            store = make([hole, f"redis://127.0.0.1:{free_port()}", three.urls[0]])
            works(store, half)
            # Who answered is the first to be asked next time.
            assert where(store)._order[0].name == three.urls[0].removeprefix("redis://")

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_without_any_sentinel_a_call_fails_within_its_deadline(self, make: Make, half: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hole = f"redis://127.0.0.1:{silent.getsockname()[1]}"
            store = make([hole, f"redis://127.0.0.1:{free_port()}"], socket_timeout=0.3)
            began = monotonic()
            with pytest.raises(BackendError) as raised:
                works(store, half)
            assert monotonic() - began < 5 * 0.3
            assert not isinstance(raised.value, PermanentBackendError)

    def test_the_keeper_looks_every_second(self, three: Trio, make: Make) -> None:
        """From the first connection on; but less often while no sentinel answers: it has other things to do."""
        store, cut_off = make(three.urls), make([f"redis://127.0.0.1:{free_port()}"])
        with keeper.at_work():
            works(store, "threads")
            assert next_look(store) <= monotonic() + 1
            where(cut_off)._known = where(store)._known
            for one in (store, cut_off):
                keeper.cancel(one._tend)
                one._tend()
            assert next_look(store) <= monotonic() + 1
            assert next_look(cut_off) > next_look(store) + 1

    def test_the_dead_are_named(self, make: Make) -> None:
        port = free_port()
        with pytest.raises(BackendError, match=f"no sentinel says where the master 'limits' is: 127.0.0.1:{port}: "):
            make([f"redis://:hunter2@127.0.0.1:{port}"]).take([slot()])

    def test_without_any_sentinel_the_last_answer_is_believed(self, three: Trio, watched: Proxy, make: Make) -> None:
        """A connection was lost, and nothing says that the master is another one."""
        store = make([url(watched)])
        works(store)
        watched.shut()
        with three.master.client() as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        works(store)

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_one_that_names_a_dead_server_for_ever_is_not_the_only_one_to_be_asked(
        self, three: Trio, make: Make, half: str
    ) -> None:
        """One that was started anew from its first file, or that is cut off from the others."""
        with sentinel(f"sentinel monitor {MASTER_NAME} 127.0.0.1 {free_port()} 2") as stale:
            store = make([url(stale), three.urls[0]])

            def finds_it() -> bool:
                try:
                    works(store, half)
                except BackendError:
                    return False
                return True

            assert wait_until(finds_it, 10)

    def test_a_child_finds_it_whatever_its_parent_was_doing(self, three: Trio, make: Make) -> None:
        store = make(three.urls)
        with where(store)._asking:  # a thread that is not in the child asks just now
            pid = os.fork()
            if pid == 0:
                try:
                    works(store)
                except BaseException:
                    os._exit(1)
                os._exit(0)
        assert exit_code(pid) == 0

    @pytest.mark.parametrize(
        "name", [pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6")), "localhost"]
    )
    def test_what_they_say_may_be_an_ipv6_address_or_a_name(self, make: Make, prefix: str, name: str) -> None:
        server = RedisServer("--bind", "127.0.0.1", "-::1")
        try:
            lines = ["sentinel resolve-hostnames yes", "sentinel announce-hostnames yes"]
            with sentinel(*lines, f"sentinel monitor {MASTER_NAME} {name} {server.port} 1") as asked:
                store = make([url(asked)])
                works(store)
                assert store._recipe.where.keywords(0) == {"host": name, "port": server.port}
            host = f"[{name}]" if ":" in name else name
            options = {"socket_timeout": 2}
            plain = RedisBackend(BackendConfig("d", "redis", f"redis://{host}:{server.port}/0", prefix, options))
            works(plain)
            plain.close()
        finally:
            server.stop()

    def test_users_and_passwords_of_the_sentinels_and_of_the_master(self, prefix: str, make: Make) -> None:
        server = RedisServer()
        try:
            with server.client() as client:
                client.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "+@all")
                client.config_set("requirepass", "of-master")
            monitored = f"sentinel monitor {MASTER_NAME} 127.0.0.1 {server.port} 1"
            acl = "user asks on >s3cret +sentinel|get-master-addr-by-name"
            with sentinel(monitored, f"sentinel auth-pass {MASTER_NAME} of-master", acl) as asked:
                urls = [f"redis://asks:s3cret@127.0.0.1:{asked.port}"]
                for location in ("redis://:of-master@", f"redis://app:pw@{MASTER_NAME}/3", "redis://app:pw@/3"):
                    works(make(urls, location))
                works(make(urls, None, username="app", password="pw", db=3))
                with pytest.raises(PermanentBackendError) as raised:
                    make([f"redis://asks:wrong@127.0.0.1:{asked.port}"], "redis://app:pw@").take([slot()])
                assert "into the URLs of OPTIONS['sentinels']" in raised.value.cure
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("what", "cure"),
    [
        ("name", "OPTIONS['master_name'] is the name in the sentinels'"),
        ("password", "into the URLs of OPTIONS['sentinels']"),
        ("no sentinel", "OPTIONS['sentinels'] are the URLs of Redis Sentinels"),
        ("away", "Start it, or correct"),
    ],
)
@pytest.mark.parametrize("half", ["threads", "loop"])
def test_what_is_wrong_with_them_is_said_with_its_cure(
    three: Trio, make: Make, half: str, what: str, cure: str
) -> None:
    """By a request, and by `manage.py check`, which has both halves' words for it."""
    at = {
        "name": three.urls,
        "password": [f"redis://nobody:hunter2@127.0.0.1:{three.sentinels[0].port}"],
        "no sentinel": [url(three.servers[0])],
        "away": [f"redis://:hunter2@127.0.0.1:{free_port()}"],
    }[what]
    store = make(at, master_name="nobodys" if what == "name" else MASTER_NAME)
    with pytest.raises(BackendError) as raised:
        works(store, half)
    assert cure in getattr(raised.value, "cure", cure)
    (message,) = store.check()
    assert str(message.id)[-4:] == ("W006" if what == "away" else "E005")
    assert cure in str(message.hint)
    assert "hunter2" not in f"{raised.value} {message}"


class TestTheMasterIsAnother:
    @pytest.fixture
    def store(self, make: Make, three: Trio) -> RedisBackend:
        return make(three.urls)

    def switch(self, three: Trio) -> RedisServer:
        """The replica is the master; the former master has not heard of it yet, as sentinels tell it some ten seconds later."""
        former = three.master
        three.fail_over()
        return former

    def demote(self, three: Trio, former: RedisServer) -> None:
        """What the sentinels do to it then, without closing its connections."""
        with former.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", str(three.master_port))
        assert wait_until(three.is_whole, 60)

    @pytest.mark.parametrize("half", ["threads", "loop"])
    def test_a_demoted_one_costs_no_request_anything(
        self, three: Trio, store: RedisBackend, prefix: str, half: str
    ) -> None:
        """It answers READONLY on the connections that there are. What was given back meanwhile goes to the new master."""
        kept, given = slot(), slot()

        def before() -> None:
            assert isinstance(store.take([kept]), Taken)
            assert isinstance(store.take([given]), Taken)

        def after() -> None:
            store.give([given])
            assert store.take([slot("other")]) == Taken((True,), (1,))

        async def on_a_loop() -> None:
            assert isinstance(await store.atake([kept]), Taken)
            assert isinstance(await store.atake([given]), Taken)
            await asyncio.get_running_loop().run_in_executor(None, move)
            await store.agive([given])
            assert await store.atake([slot("other")]) == Taken((True,), (1,))

        def move() -> None:
            assert wait_until(lambda: three.replica.held(prefix) == 2)  # replicated
            self.demote(three, self.switch(three))

        with keeper.at_work():  # which would find out before
            if half == "loop":
                asyncio.run(on_a_loop())
            else:
                before()
                move()
                after()
        assert wait_until(lambda: three.master.held(prefix) == 2)
        assert store.counts([kept]) == [1]

    def test_who_waits_is_told_by_the_new_one(self, three: Trio, store: RedisBackend, prefix: str) -> None:
        holder, waiter = Client(store, "a"), Client(store, "a")
        holder.ask()
        assert isinstance(waiter.ask(), Queued)
        with three.replica.client() as client:
            assert wait_until(lambda: bool(client.exists(store._keys.waiter(waiter.slots[0].token.encode()))))
        self.demote(three, self.switch(three))
        assert isinstance(waiter.ask(), Queued)
        ear = store._ear
        assert wait_until(lambda: ear._conn is not None and ear._hears and ear._conn.port == three.master_port)
        waiter.bell.wait(0)
        holder.give()
        waiter.hear()
        assert isinstance(waiter.ask(), Taken)
        waiter.give()
        waiter.bell.close()

    def test_one_that_takes_itself_for_it_still_is_left(self, three: Trio, store: RedisBackend, prefix: str) -> None:
        """By threads and loops, when the keeper looks; and who was counted there alone is counted again."""

        async def main() -> None:
            await store.atake([slot("loop")])
            store.take([slot("thread")])
            assert wait_until(lambda: three.replica.held(prefix) == 2)
            with keeper.at_work():
                former = self.switch(three)
                lost = slot("lost")
                store.take([lost])
                assert (former.held(prefix), three.master.held(prefix)) == (3, 2)
                store._follow()
            (mux,) = store._muxes.values()
            assert await await_until(lambda: mux._conn is None)
            await store.atake([slot("loop")])
            store.take([slot("thread")])
            assert (former.held(prefix), three.master.held(prefix)) == (3, 4)
            assert store.renew([(lost, 60)]) == [False]
            assert store.restore([Restore(lost, 60, NEVER)]) == [True]
            assert store.counts([lost]) == [1]
            store.give([lost])
            assert wait_until(lambda: three.master.held(prefix) == 4)
            self.demote(three, former)

        asyncio.run(main())

    def test_a_dead_one_is_asked_for_again_within_the_same_call(self, three: Trio, watched: Proxy, make: Make) -> None:
        """Where the sentinels know its successor by then."""
        store = make([url(watched)])
        works(store)
        old = where(store)._known
        assert old is not None
        where(store)._known = old._replace(port=free_port(), since=0.0)
        store._lines._free.clear()
        works(store, "threads")
        where(store)._known = old._replace(port=free_port(), since=0.0)
        works(store, "loop")
        assert watched.connections == 3

    def test_a_dead_one_that_they_still_name_fails_the_call_at_once(self, make: Make) -> None:
        with sentinel(f"sentinel monitor {MASTER_NAME} 127.0.0.1 {free_port()} 1") as asked:
            proxy = Proxy(asked.port)
            try:
                store = make([url(proxy)], socket_timeout=5)
                began = monotonic()
                for half in ("threads", "loop"):
                    with pytest.raises(BackendError):
                        works(store, half)
                assert monotonic() - began < 5
                assert proxy.connections < 20
            finally:
                proxy.stop()


class Load:
    """Threads and a loop that take, stay a moment, and give back; and what became of each."""

    def __init__(self) -> None:
        self.states: Counter[str] = Counter()
        self.inside = self.most = 0
        self.errors: list[BaseException] = []
        self.affected: list[float] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._in_a_thread) for _ in range(6)]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._on_a_loop())))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join(30)

    def count(self, state: str) -> None:
        with self._lock:
            self.states[state] += 1
            if state in ("local", "unprotected"):
                self.affected.append(monotonic())

    def move(self, by: int) -> None:
        with self._lock:
            self.inside += by
            self.most = max(self.most, self.inside)

    def _in_a_thread(self) -> None:
        while not self.ended.is_set():
            try:
                with hold("limited") as concurrency:
                    self.move(1)
                    self.count(concurrency.policies[0].state)
                    sleep(0.004)
                    self.move(-1)
            except ConcurrencyLimitExceeded as full:
                self.count(full.rejection.reason)
                sleep(0.01)
            except BaseException as error:
                self.errors.append(error)
                return

    async def _on_a_loop(self) -> None:
        async def work() -> None:
            while not self.ended.is_set():
                try:
                    async with hold("limited") as concurrency:
                        self.move(1)
                        self.count(concurrency.policies[0].state)
                        await asyncio.sleep(0.004)
                        self.move(-1)
                except ConcurrencyLimitExceeded as full:
                    self.count(full.rejection.reason)
                    await asyncio.sleep(0.01)
                except BaseException as error:
                    self.errors.append(error)
                    return

        await asyncio.gather(*(work() for _ in range(6)))

    def held_more(self, by: int = 150) -> bool:
        before = self.states["held"]
        return wait_until(lambda: bool(self.errors) or self.states["held"] >= before + by, 60)


def cut_off(three: Trio, master: RedisServer) -> None:
    """From the sentinels and from its replica, which are the default user, and from nobody else."""
    with master.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "off")
        with suppress(redis.ConnectionError):
            client.execute_command("CLIENT", "KILL", "USER", "default", "SKIPME", "no")


def counted(server: RedisServer) -> int:
    """Scripts that the server has run."""
    with server.client(username="app", password="pw") as client:
        said: Any = client.info("commandstats")
    return sum(said[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in said)


def left(server: RedisServer) -> bool:
    """Does nobody count there any more?"""
    before = counted(server)
    sleep(0.2)
    return counted(server) == before


@pytest.mark.parametrize("what", ["killed", "replaced", *(["cut off"] if LONG else [])] * (5 if LONG else 1))
def test_a_failover_under_load_is_an_outage_like_any_other(
    what: str, three: Trio, limits: Limits, prefix: str, record_property: Callable[[str, object], None]
) -> None:
    """Nobody gets an exception. ON_BACKEND_ERROR decides until the new master is there, and nothing stays held.

    One that is replaced, or cut off from all but us, takes itself for the master on and on: it is left all the same."""
    ttl, most = 3.0, 5
    limits(
        {"policies": {"limited": {"key": "global", "max_concurrent": most, "ttl": ttl}}},
        BACKENDS={
            "default": {
                "BACKEND": "redis",
                "KEY_PREFIX": prefix,
                "LOCATION": "redis://app:pw@",
                "OPTIONS": {**three.options, "socket_timeout": 1},
            }
        },
    )
    config = conf.current()
    store = store_of(config.table.policies[0], config)
    load = Load()
    try:
        assert load.held_more()
        began = monotonic()
        former = three.kill_master() if what == "killed" else three.master
        if what == "replaced":
            three.fail_over()
        elif what == "cut off":
            cut_off(three, former)
        assert wait_until(lambda: three.master_port != former.port, 30)
        switched = monotonic() - began
        if what != "killed":
            assert wait_until(lambda: left(former))
            print("left", monotonic() - began - switched)
            with former.client(username="app", password="pw") as client:
                client.execute_command("ACL", "SETUSER", "default", "on")
                client.execute_command("REPLICAOF", "127.0.0.1", str(three.master_port))  # as they do later
        assert works_again(store, 30)
        assert load.held_more()
    finally:
        load.stop()
        three.mend()
    affected = [at - began for at in load.affected]
    record_property(
        "failover", f"{what}: {len(affected)} requests, {switched:.2f} s, until {max(affected, default=0):.2f} s"
    )
    print(
        what, dict(load.states), "most", load.most, "switched", switched, "affected until", max(affected, default=0.0)
    )
    assert load.errors == []
    assert load.most <= 2 * most, "a new master that had lost all holders would admit no more than once more"
    assert set(load.states) <= {"held", "local", "full"}
    assert wait_until(lambda: store.snapshot() == [], 5 * ttl)


@pytest.mark.parametrize(
    ("location", "options", "says"),
    [
        (None, {"master_name": None}, r"\['sentinels'\]: they need OPTIONS\['master_name'\]"),
        (None, {"sentinels": None}, r"\['master_name'\]: it needs OPTIONS\['sentinels'\]"),
        (None, {"sentinels": []}, "expected a list of URLs such as .* got an empty one"),
        (None, {"sentinels": "redis://a:26379"}, "expected a list of URLs such as .* got a str"),
        (None, {"sentinels": [("a", 26379)]}, "expected a list of URLs"),
        (None, {"sentinels": ["a:26379"]}, r"\['sentinels'\]\[0\]: expected a URL, redis://host:26379"),
        (None, {"sentinels": ["redis://a", "unix:///s"]}, r"\['sentinels'\]\[1\]: expected a URL"),
        (None, {"sentinels": ["redis://a/1"]}, "a sentinel has no databases"),
        (None, {"sentinels": ["redis://:26379"]}, "a sentinel needs a host"),
        (None, {"sentinels": ["redis://:hunter2@a:port"]}, r"\['sentinels'\]\[0\]: .* cannot be used"),
        (None, {"sentinels": ["redis://a?pasword=hunter2"]}, "did you mean 'password'"),
        (None, {"sentinels": ["rediss://a"], "ssl_ca_certs": "/nowhere"}, "it is about TLS|is about TLS"),
        (None, {"sentinels": ["rediss://a?ssl_ca_certs=/nowhere"]}, "no such file"),
        (None, {"master_name": "my master"}, "expected a name of letters"),
        (None, {"master_name": 1}, "expected a name of letters"),
        (None, {"host": "a"}, r"\['host'\]: the sentinels say where"),
        (None, {"cluster": True}, r"\['cluster'\]: a Cluster has no sentinels"),
        ("redis://u:hunter2@elsewhere/0", {}, r"\['LOCATION'\]: .*redis://user:password@limits/0"),
        ("redis://limits:6379/0", {}, "leave out the host and the port"),
        ("unix:///run/redis.sock", {}, "no unix:// socket"),
        ("redis://?master_name=limits", {}, "it stands in OPTIONS, beside sentinels"),
        (["redis://a"], {}, "expected a URL"),
        (None, {"decode_responses": True}, "raw replies"),
        (None, {"sentinel": 1}, "did you mean|has no 'sentinel'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    location: Any, options: dict[str, Any], says: str
) -> None:
    whole = {"sentinels": ["redis://a"], "master_name": MASTER_NAME, **options}
    whole = {name: value for name, value in whole.items() if value is not None}
    with pytest.raises(ImproperlyConfigured, match=says) as raised:
        RedisBackend(BackendConfig("other", "redis", location, "p", whole))
    assert "['other']" in str(raised.value)
    assert "hunter2" not in str(raised.value)


def test_where_it_counts_is_told_without_a_connection(make: Make) -> None:
    """By the master's name and its sentinels, in whatever order and letters they are written."""
    one = make(["redis://a", "redis://u:p@B:26379", "rediss://[::1]:1"])
    other = make(["rediss://[::1]:1", "redis://b", "redis://A:26379"])
    assert one.server == other.server == ("the master limits of [::1]:1, a:26379, b:26379", 0, 0)
    assert one.count_place() == other.count_place()
    assert one.server != make(["redis://a"], "redis://limits/2").server != make(["redis://a"]).server


def test_the_sentinels_have_the_tls_of_options(make: Make, prefix: str, tmp_path: Path, three: Trio) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    of_sentinel, of_master = Proxy(three.sentinels[0].port, tls=context), Proxy(three.master_port, tls=context)
    try:
        with sentinel(f"sentinel monitor {MASTER_NAME} 127.0.0.1 {of_master.port} 1") as asked:
            of_sentinel.target_port = asked.port
            ca = str(tmp_path / "ca.pem")
            works(make([url(of_sentinel, "rediss://")], "rediss://", ssl_ca_certs=ca))
            works(make([url(asked)], "rediss://", ssl_ca_certs=ca))
            with pytest.raises(PermanentBackendError) as raised:
                make([url(of_sentinel, "rediss://")]).take([slot()])
            assert "ssl_ca_certs" in raised.value.cure
    finally:
        of_sentinel.stop()
        of_master.stop()

"""What Redis's errors mean to us, provoked on real servers: which go by, which need somebody, and which are one key's alone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest
from django.core.checks import CheckMessage
from redis import Redis as RedisClient
from redis.exceptions import RedisError, ResponseError

from django_concurrency_mw import checks, health, notices
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.redis.errors import classed
from django_concurrency_mw.backends.redis.leftovers import Client
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import Keys
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.held import NEVER
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token, process_id

from .redis_server import RedisServer
from .support import Limits, everything, wait_until, works_again
from .test_health import Site, errors
from .test_health import site as site
from .test_health import told as told
from .test_renewals import look, only
from .test_steps import drive as drive


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_EVERY", 0.02)
    notices.forget()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One that these tests may break; each mends it again."""
    server = RedisServer("--lua-time-limit", "10")
    yield server
    server.stop()


@pytest.fixture
def made(prefix: str) -> Iterator[Callable[..., RedisBackend]]:
    stores: list[RedisBackend] = []

    def make(url: str, socket_timeout: float = 5) -> RedisBackend:
        options = {"socket_timeout": socket_timeout}
        stores.append(RedisBackend(BackendConfig("default", "redis", url, prefix, options)))
        return stores[-1]

    yield make
    for store in stores:
        assert works_again(store)
        store.close()


Make = Callable[..., RedisBackend]


def slot(policy: str = "p", limit: int = 100, ttl: float = 60.0) -> Slot:
    return Slot(policy, make_key("k"), limit, ttl, new_token())


def command(client: Any, *words: str) -> Any:
    """What redis-py has no typed method for."""
    return client.execute_command(*words)


# -- what may be wrong ---------------------------------------------------------------------------------------------------
#
# Each yields the URL to use while it is, then mends it, and yields once more.

Fault = Callable[[RedisServer], Iterator[str]]


@contextmanager
def broken(fault: Fault, server: RedisServer) -> Iterator[tuple[str, Callable[[], None]]]:
    """The URL, and what mends it."""
    steps = fault(server)
    url = next(steps)
    mended: list[str] = []

    def mend() -> None:
        if not mended:
            mended.append(next(steps))

    try:
        yield url, mend
    finally:
        mend()
        assert next(steps, None) is None


def no_password(server: RedisServer) -> Iterator[str]:
    with server.client() as client:
        client.config_set("requirepass", "secret")
        yield server.url
        client.config_set("requirepass", "")
        yield ""


def wrong_password(server: RedisServer) -> Iterator[str]:
    with server.client() as client:
        command(client, "ACL", "SETUSER", "limiter", "reset", "on", ">right", "allkeys", "+@all")
        yield f"redis://limiter:hunter2@127.0.0.1:{server.port}/0"
        command(client, "ACL", "SETUSER", "limiter", ">hunter2")
        yield ""


def weak_user(server: RedisServer, *rules: str) -> Iterator[str]:
    with server.client() as client:
        command(client, "ACL", "SETUSER", "weak", "reset", "on", ">pass", *rules)
        yield f"redis://weak:pass@127.0.0.1:{server.port}/0"
        command(client, "ACL", "SETUSER", "weak", "allkeys", "+@all")
        yield ""


def no_scripts(server: RedisServer) -> Iterator[str]:
    yield from weak_user(server, "allkeys", "+@all", "-@scripting")


def no_command_inside(server: RedisServer) -> Iterator[str]:
    yield from weak_user(server, "allkeys", "+@all", "-zadd")


def other_keys(server: RedisServer) -> Iterator[str]:
    yield from weak_user(server, "~other:*", "+@all")


def no_release(server: RedisServer) -> Iterator[str]:
    yield from weak_user(server, "allkeys", "+@all", "-zrem")


def no_cleaning(server: RedisServer) -> Iterator[str]:
    """Takes work as long as there is room."""
    yield from weak_user(server, "allkeys", "+@all", "-zremrangebyscore")


def renamed(name: str) -> Fault:
    """The server's own configuration; the cure is another server."""

    def fault(server: RedisServer) -> Iterator[str]:
        other = RedisServer("--rename-command", name, "")
        yield other.url
        other.stop()
        other = RedisServer(port=other.port)
        yield ""
        other.stop()

    fault.__name__ = f"renamed_{name.lower()}"
    return fault


def read_only(server: RedisServer) -> Iterator[str]:
    with server.client() as client:
        command(client, "REPLICAOF", "127.0.0.1", "1")
        yield server.url
        command(client, "REPLICAOF", "NO", "ONE")
        yield ""


def out_of_memory(server: RedisServer) -> Iterator[str]:
    with server.client() as client:
        client.set("ballast", "x" * 2_000_000)
        client.config_set("maxmemory", "1mb")
        yield server.url
        client.config_set("maxmemory", "0")
        client.delete("ballast")
        yield ""


def busy(server: RedisServer) -> Iterator[str]:
    def endless() -> None:
        with server.client() as client, pytest.raises(ResponseError):
            client.eval("while true do end", 0)

    def is_busy() -> bool:
        try:
            return not command(client, "PING")
        except ResponseError as error:
            return str(error).startswith("BUSY")

    thread = threading.Thread(target=endless)
    with server.client() as client:
        thread.start()
        assert wait_until(is_busy)
        yield server.url
        client.script_kill()
        thread.join()
        yield ""


def snapshots_fail(server: RedisServer) -> Iterator[str]:
    """Its folder is gone."""
    with server.client() as client:
        shutil.rmtree(server.folder, ignore_errors=True)
        client.config_set("save", "3600 1000000")
        client.bgsave()
        assert wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
        yield server.url
        client.config_set("save", "")
        yield ""


def loading(server: RedisServer) -> Iterator[str]:
    """One that says so to everything, as no data set here is large enough to show it; and then has loaded it."""
    loaded = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionResetError):
            while not loaded.is_set() and (data := connection.recv(65536)):
                # Each command has one line that begins with a star.
                stars = sum(line.startswith(b"*") for line in data.split(b"\r\n"))
                connection.sendall(b"-LOADING Redis is loading the dataset in memory\r\n" * stars)

    def accept() -> None:
        while not loaded.is_set():
            connection, _ = listening.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield f"redis://127.0.0.1:{port}/0"
        loaded.set()
        socket.create_connection(("127.0.0.1", port)).close()
        accepting.join()
    other = RedisServer(port=port)
    yield ""
    other.stop()


def nobody_there(server: RedisServer) -> Iterator[str]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        yield f"redis://127.0.0.1:{port}/0"
    other = RedisServer(port=port)
    yield ""
    other.stop()


#: Seconds that a request waits for a server which sends event loops in search of a master until then.
PATIENCE = 0.5
PASSWORD, USER, SERVER = "`username` and `password`", "the ACL user of LOCATION may not", "do not rename the commands"
PERMANENT: dict[Fault, str] = {
    no_password: PASSWORD,
    wrong_password: PASSWORD,
    no_scripts: USER,
    no_command_inside: USER,
    other_keys: USER,
    renamed("EVALSHA"): SERVER,
    renamed("ZADD"): SERVER,
}
PASSING: list[Fault] = [read_only, out_of_memory, busy, snapshots_fail, loading, nobody_there]


def name(value: Any) -> str | None:
    return getattr(value, "__name__", None) if callable(value) else ""


@pytest.mark.parametrize(("fault", "cure"), PERMANENT.items(), ids=name)
def test_what_needs_somebody(
    server: RedisServer,
    site: Site,
    made: Make,
    told: list[bool],
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
    cure: str,
) -> None:
    """It opens the breaker like anything that is about the whole store, and says what to do, once."""
    with broken(fault, server) as (url, mend):
        store = made(url)
        assert site.state(store) == "local"
        assert isinstance(store.failure, PermanentBackendError)
        assert cure in store.failure.cure
        probes = Probes(store)
        assert wait_until(lambda: probes.number >= 3)
        assert site.state(store) == "local"
        assert told == [False]
        (said,) = errors(caplog)
        assert f"This does not go away by itself: {store.failure.cure}" in said
        assert "hunter2" not in caplog.text
        mend()
        assert wait_until(lambda: told == [False, True])
        assert site.state(store) == "held"


@pytest.mark.parametrize("fault", PASSING, ids=name)
def test_what_goes_by(
    server: RedisServer, site: Site, made: Make, told: list[bool], caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    with broken(fault, server) as (url, mend):
        store = made(url, PATIENCE if fault is read_only else 5)
        assert site.state(store) == "local"
        failure = store.failure
        assert isinstance(failure, BackendError)
        assert not isinstance(failure, PermanentBackendError)
        assert failure.whole
        probes = Probes(store)
        assert wait_until(lambda: probes.number >= 3)
        assert told == [False]
        assert len(errors(caplog)) == 1
        assert "by itself" not in caplog.text
        mend()
        assert wait_until(lambda: told == [False, True])
        assert site.state(store) == "held"


class Probes:
    """How many probes of a store there have been from now on."""

    def __init__(self, store: RedisBackend) -> None:
        self.number = 0
        probe = store.probe

        def counted() -> None:
            self.number += 1
            probe()

        store.probe = counted  # type: ignore[method-assign]  # to count


@pytest.mark.parametrize("fault", [read_only, out_of_memory, busy, snapshots_fail], ids=name)
def test_what_is_given_back_meanwhile(server: RedisServer, site: Site, made: Make, prefix: str, fault: Fault) -> None:
    """It is carried out when that can be; when memory is short, at once."""
    store = made(server.url, PATIENCE if fault is read_only else 5)
    for _ in range(3):
        assert site.state(store) == "held"
    assert server.held(prefix) == 3
    with broken(fault, server) as (_, mend):
        assert site.state(store) == "local"
        site.end()
        if fault is out_of_memory:
            assert wait_until(lambda: server.held(prefix) == 0)
        mend()
        assert works_again(store)
        store.close()  # to hear at once what was refused
        assert wait_until(lambda: server.held(prefix) == 0)


def test_a_replica_is_not_stormed_with_connections(server: RedisServer, site: Site, made: Make) -> None:
    """Somewhere else there may be a master by now; but not at every try."""
    store = made(server.url, PATIENCE)
    probes = Probes(store)
    with broken(read_only, server):
        site.ask(store)
        assert wait_until(lambda: probes.number >= 5)
        with keeper._working:
            assert store._lines.connects <= 3 * (probes.number + 1)


class TestOneKeyOfAnotherType:
    def spoil(self, server: RedisServer, store: RedisBackend, policy: str = "p") -> None:
        """Another program writes to the key of this policy's semaphore."""
        with server.client() as client:
            (key,) = client.scan_iter(store._keys.prefix + f"{policy}:*".encode())
            client.set(key, "mine")

    def test_the_others_go_on(
        self,
        server: RedisServer,
        site: Site,
        made: Make,
        told: list[bool],
        prefix: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(
            "django_concurrency_mw.stand_ins.REGISTER_AFTER", NEVER
        )  # what cannot be registered is an error of its own
        store = made(server.url)
        assert site.state(store) == "held"
        self.spoil(server, store)
        for _ in range(2):
            assert site.state(store) == "local"
            assert site.state(store, name="q") == "held"
        assert store.failure is None
        assert told == []
        (said,) = errors(caplog)
        assert f"another program keeps a key of its own under {{{prefix}}}:1:" in said
        assert [holder.policy for holder in store.snapshot()] == ["q", "q"]
        assert store.evict(store.snapshot()[0].token)

    def test_leases_of_the_others_are_renewed(self, server: RedisServer, site: Site, made: Make) -> None:
        store = made(server.url)
        for policy in ("q", "p", "r"):
            assert site.state(store, name=policy) == "held"
        self.spoil(server, store)
        leases = list(site.leases)
        for lease in leases:
            only(lease).ends -= 30
        look(*leases)
        assert all(50 < only(lease).ends - monotonic() <= 60 for lease in leases), "not 30"
        assert not any(only(lease).lost for lease in leases), "who knows"
        assert store.failure is None

    def test_and_counted_again(self, server: RedisServer, site: Site, made: Make) -> None:
        """With one that cannot be counted there among them."""
        store = made(server.url)
        assert site.state(store) == "held"
        self.spoil(server, store)
        for policy in ("q", "p", "r"):
            site.ask(store, name=policy)
        leases = site.leases[1:]
        with server.client() as client:
            for policy in ("q", "r"):
                client.delete(*client.scan_iter(store._keys.prefix + f"{policy}:*".encode()))
        look(*leases)
        assert sorted(holder.policy for holder in store.snapshot()) == ["q", "r"]
        assert (only(leases[1]).local, only(leases[1]).lost) == (True, False)
        assert store.failure is None


@pytest.mark.parametrize("database", [0, 3])
def test_the_permissions_that_the_cure_names_suffice(
    server: RedisServer, made: Make, database: int, prefix: str
) -> None:
    """For everything that the store ever does; what it was refused, the server's own log would have."""
    with server.client() as client:
        command(client, "ACL", "SETUSER", "bare", "reset", "on", ">pass", "+ping")
        store = made(f"redis://bare:pass@127.0.0.1:{server.port}/{database}")
        with pytest.raises(PermanentBackendError) as raised:
            store.take([slot()])
        line = re.search(r"ACL SETUSER <user> (.+)$", raised.value.cure)
        assert line is not None
        command(client, "ACL", "SETUSER", "bare", *line[1].split(" "))
        with suppress(ResponseError):  # what redis-py asks for by itself, and does without; not every server has it
            command(client, "ACL", "SETUSER", "bare", "+client|setinfo")
        command(client, "ACL", "LOG", "RESET")
        one, two, lapsed, lost = slot(), slot("q"), slot(limit=1, ttl=0.001), slot()

        def in_threads() -> None:
            assert isinstance(store.take([one, two]), Taken)
            assert isinstance(store.take([slot(limit=1)]), Full)
            assert store.renew([(one, 60)]) == [True]
            assert store.restore([Restore(lost, 60, NEVER), Restore(one, 60, NEVER)]) == [True, True]
            store.note({"p": 2, "q": 1})
            assert store.peaks() == {"p": 2, "q": 1}
            store.reset_peaks()
            assert store.peaks() == {}
            assert store.counts([slot(), slot("q")]) == [2, 1]
            assert {holder.token for holder in store.snapshot()} == {one.token, two.token, lost.token}
            assert {holder.pid for holder in store.snapshot()} == {os.getpid()}
            assert store.evict(two.token)
            assert store.restore([Restore(two, 60, NEVER)]) == [False]
            store.give([one, lost])
            assert wait_until(lambda: store.snapshot() == [])
            store.take([lapsed])
            assert wait_until(lambda: isinstance(store.take([slot(limit=1)]), Taken))
            store.probe()
            assert store.check() == []
            store._forget()
            assert store.renew([(one, 60)]) == [False], "with a script that it has to send"

        async def on_a_loop() -> None:
            assert isinstance(await store.atake([one, two]), Taken)
            await store.agive([one, two])
            assert isinstance(await store.atake([slot("r")]), Taken)

        in_threads()
        asyncio.run(on_a_loop())
        client.script_flush()
        store.take([slot("s")])

        with server.client() as victim:
            info: Any = command(victim, "CLIENT", "INFO")
            address = re.search(r" addr=(\S+)", str(info))
            number = int(victim.client_id())
            assert number in ids(server)
            assert address is not None
            store._leftovers.fence(Client(number, address[1].encode()))
            store._lines.refresh()
            assert wait_until(lambda: number not in ids(server)), "it could not be fenced off"
        assert all(line.client is not None for line in store._lines._free)
        refused = [(entry["object"], entry["reason"]) for entry in client.acl_log() if entry["username"] == "bare"]
        # INFO is asked by the check alone, for a piece of advice.
        assert set(refused) <= {("info", "command")}
        command(client, "ACL", "DELUSER", "bare")


class TestForPeople:
    """What operators ask for, while something is wrong."""

    @pytest.fixture
    def full(self, server: RedisServer) -> Iterator[Callable[[int], None]]:
        """Call it with the bytes that are left, which may be less than none."""
        with server.client() as client:
            yield lambda left: client.config_set("maxmemory", client.info("memory")["used_memory"] + left)
            client.config_set("maxmemory", 0)

    @pytest.mark.parametrize("cost", [1, 3])
    def test_evicting_works_without_memory_and_lasts(
        self, server: RedisServer, made: Make, full: Callable[[int], None], cost: int
    ) -> None:
        store, one, other = made(server.url), replace(slot(), cost=cost, memo=[]), slot()
        store.take([one])
        store.take([other])
        full(-500_000)
        with pytest.raises(BackendError):
            store.take([slot()])
        assert store.counts([one]) == [cost + 1]
        assert store.evict(one.token) is True
        assert store.counts([one]) == [1]
        assert [holder.token for holder in store.snapshot()] == [other.token]
        with server.client() as client:
            assert client.zscore(store._keys.tombstones, one.token)
            client.config_set("maxmemory", 0)
        assert store.restore([Restore(one, 60, NEVER)]) == [False]

    def test_a_note_without_memory_is_an_error_and_keeps_what_stands(
        self, server: RedisServer, made: Make, full: Callable[[int], None]
    ) -> None:
        store = made(server.url)
        store.note({"p": 2})
        full(-500_000)
        with pytest.raises(BackendError):
            store.note({"p": 3})
        assert store.peaks() == {"p": 2}
        store.reset_peaks()
        assert store.peaks() == {}

    def test_they_expire_and_each_note_pushes_that_out(self, server: RedisServer, made: Make) -> None:
        store = made(server.url)
        store.note({"p": 2})
        with server.client() as client:
            keys = sorted(client.scan_iter(store._keys.prefix + b"*"))
            assert keys == [store._keys.peaks, store._keys.process(process_id())]
            for key, seconds in zip(keys, (30 * 86_400, 600), strict=True):
                assert 1000 * (seconds - 9) < client.pttl(key) <= 1000 * seconds
                client.pexpire(key, 5)
                store.note({"p": 1})
                assert 1000 * (seconds - 9) < client.pttl(key) <= 1000 * seconds
            assert client.get(keys[1]) == f"{os.uname().nodename}\n{os.getpid()}".encode()

    def test_a_user_of_old_has_no_processes_and_all_the_rest(self, server: RedisServer, made: Make) -> None:
        """Without SET and MGET, which no request needs."""
        with server.client() as client:
            command(client, "ACL", "SETUSER", "old", "reset", "on", ">pass", "allkeys", "+@all", "-set", "-mget")
        store, one = made(f"redis://old:pass@127.0.0.1:{server.port}/0"), slot()
        store.take([one])
        store.note({"p": 1})
        assert store.peaks() == {"p": 1}
        (holder,) = store.snapshot()
        assert (holder.token, holder.host, holder.pid) == (one.token, "", None)

    @pytest.mark.parametrize("ask", ["counts", "peaks", "note", "reset_peaks"])
    def test_what_fails_is_classed(self, server: RedisServer, made: Make, ask: str) -> None:
        calls: dict[str, Callable[[RedisBackend], object]] = {
            "counts": lambda store: store.counts([slot()]),
            "peaks": lambda store: store.peaks(),
            "note": lambda store: store.note({"p": 1}),
            "reset_peaks": lambda store: store.reset_peaks(),
        }
        with broken(wrong_password, server) as (url, _):
            with pytest.raises(PermanentBackendError) as raised:
                calls[ask](made(url))
            assert "right user and password" in raised.value.cure
            assert "hunter2" not in str(raised.value)
        with pytest.raises(BackendError) as away:
            calls[ask](made("redis://127.0.0.1:1/0"))
        assert not isinstance(away.value, PermanentBackendError)

    def test_a_key_of_another_type_is_said_and_is_nobody_else_s(self, server: RedisServer, made: Make) -> None:
        store, one = made(server.url), slot("odd")
        with server.client() as client:
            client.set(store._keys.semaphore(one).split()[1], "text")
        with pytest.raises(PermanentBackendError, match="WRONGTYPE") as raised:
            store.counts([slot(), one])
        assert raised.value.whole is False


def test_the_permissions_name_the_keys_of_this_prefix_alone(server: RedisServer) -> None:
    keys = Keys("odd[1]*")
    error = classed(ResponseError("NOPERM"), keys)
    assert isinstance(error, PermanentBackendError)
    (rule,) = re.findall(r" ~(\S+) ", error.cure)
    with server.client() as client:
        client.set("{odd[1]*}:1:p:k", 1)
        client.set("{odd1-other}:1:p:k", 1)
        assert list(client.scan_iter(rule)) == [b"{odd[1]*}:1:p:k"]
        client.delete("{odd[1]*}:1:p:k", "{odd1-other}:1:p:k")


@pytest.mark.parametrize(
    ("error", "cure", "whole"),
    [
        (ResponseError("CROSSSLOT Keys in request don't hash to the same slot"), "Redis Cluster", True),
        (ResponseError("NOPERM this user has no permissions"), USER, True),
        (ResponseError("NOAUTH Authentication required."), PASSWORD, True),
        (ResponseError("WRONGPASS invalid username-password pair"), PASSWORD, True),
        (ResponseError("Error running script: @user_script:1: WRONGTYPE Operation against"), "another program", False),
        (ResponseError("a value that has WRONGTYPES in it"), "", True),
        (RedisError(), "", True),
        (TimeoutError("no answer"), "", True),
    ],
)
def test_by_their_words(error: Exception, cure: str, whole: bool) -> None:
    """As other versions of the server and of redis-py may put it."""
    found = classed(error, Keys("p"))
    assert isinstance(found, PermanentBackendError) is bool(cure)
    assert cure in getattr(found, "cure", "")
    assert found.whole is whole
    assert str(found)


class TestCheck:
    """`manage.py check` asks each store once."""

    def found(self, limits: Limits, url: str, prefix: str, **options: Any) -> list[CheckMessage]:
        options = {"socket_timeout": 5, **options}
        limits(
            everything(),
            BACKENDS={"default": {"BACKEND": "redis", "LOCATION": url, "KEY_PREFIX": prefix, "OPTIONS": options}},
        )
        return checks.check_stores()

    def test_nothing_to_say(self, limits: Limits, server: RedisServer, prefix: str) -> None:
        """And no connection is left, nor a key."""

        def connected() -> set[str]:
            """Those of earlier tests may just be closing."""
            with server.client() as client:
                return {known["id"] for known in client.client_list()} - {str(client.client_id())}

        before = connected()
        assert self.found(limits, server.url, prefix) == []
        assert wait_until(lambda: connected() <= before)
        assert wait_until(lambda: list(server.client().scan_iter(f"{{{prefix}}}*")) == [])

    @pytest.mark.parametrize(
        ("fault", "cure"),
        {**PERMANENT, no_release: USER, no_cleaning: USER, renamed("ZREM"): SERVER}.items(),
        ids=name,
    )
    def test_what_needs_somebody_is_an_error(
        self, limits: Limits, server: RedisServer, prefix: str, fault: Fault, cure: str
    ) -> None:
        """Also what no request would ever hear of: a release whose reply nobody waits for."""
        with broken(fault, server) as (url, _):
            (message,) = self.found(limits, url, prefix)
            assert (message.id, message.level) == ("django_concurrency_mw.E005", logging.ERROR)
            assert message.msg.startswith("CONCURRENCY_LIMIT['BACKENDS']['default']: ")
            assert message.hint is not None
            assert cure.lower() in message.hint.lower()
            assert message.hint[0].isupper()
            assert "hunter2" not in str(message)

    @pytest.mark.parametrize("fault", PASSING, ids=name)
    def test_what_goes_by_is_a_warning(self, limits: Limits, server: RedisServer, prefix: str, fault: Fault) -> None:
        with broken(fault, server) as (url, _):
            (message,) = self.found(limits, url, prefix)
            assert (message.id, message.level) == ("django_concurrency_mw.W006", logging.WARNING)
            assert "cannot be asked" in message.msg
            assert "ON_BACKEND_ERROR" in str(message.hint)

    def test_one_that_never_answers_does_not_hold_it_up(self, limits: Limits, prefix: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            start = monotonic()
            (message,) = self.found(
                limits, f"redis://127.0.0.1:{silent.getsockname()[1]}/0", prefix, socket_timeout=0.25
            )
            assert monotonic() - start < 5 * 0.25
        assert message.id == "django_concurrency_mw.W006"


class TestAProbe:
    def test_hears_that_releases_are_refused(self, server: RedisServer, made: Make) -> None:
        """Else a store that keeps every slot until its lease ends would count as one that works."""
        with broken(no_release, server) as (url, mend):
            store = made(url)
            health.failed(store, BackendError("down"), monotonic())
            assert wait_until(lambda: isinstance(store.failure, PermanentBackendError))
            mend()
            assert works_again(store)

    def test_closes_what_may_be_dead_and_connects_anew(self, server: RedisServer, made: Make) -> None:
        """Each idle connection that a network has forgotten would cost a time-out of its own."""
        store = made(server.url)
        lines = [store._lines._connect(monotonic() + 5) for _ in range(4)]
        store._lines._free.extend(lines)
        for line in lines[:3]:
            line.used -= 10
        store.probe()
        assert lines[3] in store._lines._free, "it was used a moment ago"
        assert not set(lines[:3]) & set(store._lines._free)
        assert store._lines.connects == 5
        assert wait_until(lambda: not {line.client and line.client.number for line in lines[:3]} & ids(server))

    def test_wakes_event_loops(self, server: RedisServer, made: Make) -> None:
        """They do not wait for their own next try."""

        async def main() -> None:
            with broken(nobody_there, server) as (url, mend):
                store = made(url)
                with pytest.raises(BackendError):
                    await store.atake([slot()])
                (mux,) = store._muxes.values()
                assert mux._not_before > 0
                mux._not_before = asyncio.get_running_loop().time() + 60
                with pytest.raises(BackendError, match="next try in"):
                    await store.atake([slot()])
                health.failed(store, BackendError("down"), monotonic())
                mend()
                assert await asyncio.to_thread(works_again, store)
                assert isinstance(await store.atake([slot()]), Taken)

        asyncio.run(main())

    def test_is_the_only_one_that_connects_until_it_succeeds(
        self, server: RedisServer, made: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Releases wait for it, however many there are."""
        with broken(nobody_there, server) as (url, mend):
            store = made(url)
            health.failed(store, BackendError("down"), monotonic())
            delivered: list[bool] = []
            deliver = store._lines.deliver

            def seen() -> None:
                delivered.append(store.failure is None)
                deliver()

            monkeypatch.setattr(store._lines, "deliver", seen)
            store.give([slot() for _ in range(1500)])
            probes = Probes(store)
            assert wait_until(lambda: probes.number >= 3)
            assert delivered == []
            mend()
            with RedisClient.from_url(url) as client:

                def given() -> int:
                    return int(client.info("commandstats").get("cmdstat_zrem", {}).get("calls", 0))

                assert wait_until(lambda: given() >= 1500)
            assert works_again(store)
            assert set(delivered) == {True}


def ids(server: RedisServer) -> set[int]:
    """The clients that the server knows."""
    with server.client() as client:
        return {int(each["id"]) for each in client.client_list()}

"""Redis Cluster: all that the store does, on a real one, and what becomes of it while a slot moves.

Masters that go are in test_cluster_failover.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import redis
import trustme
from redis.exceptions import ClusterCrossSlotError, ResponseError

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.redis import leftovers
from django_concurrency_mw.backends.redis import store as store_module
from django_concurrency_mw.backends.redis.cluster import MOST, Cluster, _node
from django_concurrency_mw.backends.redis.errors import classed, passes
from django_concurrency_mw.backends.redis.redirects import Ask, Down, Moved, redirection, tries_again
from django_concurrency_mw.backends.redis.redirects import Node as Address
from django_concurrency_mw.backends.redis.rights import permitted
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import Keys
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.held import NEVER
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .cluster_load import CAP, Load
from .proxy import Proxy
from .redis_cluster import Move, Node, RedisCluster
from .redis_server import RedisServer
from .servers import free_port
from .support import await_until, wait_until

HALVES = ["threads", "loop"]
Make = Callable[..., RedisBackend]


@pytest.fixture
def made(redis_cluster: RedisCluster, prefix: str) -> Iterator[Make]:
    stores: list[RedisBackend] = []

    def make(location: Any = None, **options: Any) -> RedisBackend:
        options = {"cluster": True, "socket_timeout": 2, **options}
        config = BackendConfig("default", "redis", location or redis_cluster.urls, prefix, options)
        stores.append(RedisBackend(config))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@contextmanager
def moving(cluster: RedisCluster, prefix: str) -> Iterator[Move]:
    """The slot of this prefix is moving; at the end it has moved."""
    move = cluster.begin_move(prefix)
    try:
        yield move
    finally:
        move.all_keys()
        move.finish()


def slot(policy: str = "p", key: str = "k", limit: int = 5, ttl: float = 60.0, cost: int = 1, token: str = "") -> Slot:
    return Slot(policy, make_key(key), limit, ttl, token or new_token(), cost=cost)


def all_of(half: str, store: RedisBackend, *steps: tuple[str, Sequence[Slot]]) -> list[Any]:
    """Take and give, one after another, in threads or on one event loop."""
    if half == "threads":
        return [getattr(store, name)(slots) for name, slots in steps]

    async def main() -> list[Any]:
        return [await getattr(store, f"a{name}")(slots) for name, slots in steps]

    return asyncio.run(main())


class TestAllThatItDoes:
    @pytest.mark.parametrize("protocol", [2, 3])
    def test_for_requests(self, redis_cluster: RedisCluster, made: Make, prefix: str, protocol: int) -> None:
        store = made(protocol=protocol)
        for half in HALVES:
            one, two = slot("a", limit=1), slot("b", limit=3, cost=2)
            first, second = all_of(half, store, ("take", [one, two]), ("take", [slot("a", limit=1), slot("b")]))
            assert (first, second) == (Taken((True, True), (1, 2)), Full((True, False), (1, 2)))
            all_of(half, store, ("give", [one, two]))
            assert wait_until(lambda: redis_cluster.held(prefix) == 0)

    def test_for_leases_and_people(self, made: Make) -> None:
        store = made()
        one, two, lost = slot(), slot("q"), slot()
        assert isinstance(store.take([one, two]), Taken)
        assert store.renew([(one, 60), (slot(), 60)]) == [True, False]
        assert store.restore([Restore(lost, 60, NEVER)]) == [True]
        new = slot()
        assert store.claim([(one, new)])
        assert store.counts([slot(), slot("q"), slot("r")]) == [2, 1, 0]
        store.note({"p": 3, "q": 1})
        assert store.peaks() == {"p": 3, "q": 1}
        store.reset_peaks()
        assert store.peaks() == {}
        assert {holder.token for holder in store.snapshot()} == {new.token, two.token, lost.token}
        assert {holder.pid for holder in store.snapshot()} == {os.getpid()}
        assert store.evict(two.token)
        assert not store.evict(two.token)
        assert store.restore([Restore(two, 60, NEVER)]) == [False]
        store.probe()
        assert store.check() == []

    def test_the_permissions_that_the_cure_names_suffice(
        self, redis_cluster: RedisCluster, made: Make, prefix: str
    ) -> None:
        """Also while the slot moves."""
        for node in redis_cluster.nodes:
            node.ask("ACL SETUSER", "bare", "reset", "on", ">pass", "+ping")
        store = made(username="bare", password="pass")
        with pytest.raises(PermanentBackendError) as raised:
            store.take([slot()])
        rights = raised.value.cure.rpartition("<user> ")[2].split(" ")
        for node in redis_cluster.nodes:
            node.ask("ACL SETUSER", "bare", *rights)
        kept = slot("kept")
        assert isinstance(store.take([kept]), Taken)
        with moving(redis_cluster, prefix):
            for half in HALVES:
                one = slot()
                all_of(half, store, ("take", [one]), ("give", [one]))
            assert wait_until(lambda: [holder.token for holder in store.snapshot()] == [kept.token])
        assert store.renew([(kept, 60)]) == [True]

    def test_the_right_that_is_needed_while_its_slot_moves_is_missed_before(
        self, redis_cluster: RedisCluster, made: Make, prefix: str
    ) -> None:
        """By `manage.py check`; and whoever meets it says the line."""
        keys = Keys(prefix, of_a_cluster=True)
        for node in redis_cluster.nodes:
            rights = permitted(keys).partition("<user> ")[2].replace(" +asking", "")
            node.ask("ACL SETUSER", "unasked", "reset", "on", ">pass", *rights.split(" "))
        store = made(username="unasked", password="pass")
        (message,) = store.check()
        assert message.id == "django_concurrency_mw.W026"
        assert "ACL SETUSER <user> +asking." in (message.hint or "")
        with moving(redis_cluster, prefix):
            for half in HALVES:
                with pytest.raises(PermanentBackendError) as raised:
                    all_of(half, store, ("take", [slot()]))
                assert "+asking" in raised.value.cure

    def test_each_of_several_aliases_is_where_its_own_slot_is(
        self, redis_cluster: RedisCluster, made: Make, prefix: str
    ) -> None:
        """All keys of one are on one master, those of several spread over them."""
        owners = set()
        for number in range(40):
            config = BackendConfig("default", "redis", redis_cluster.urls, f"{prefix}-{number}", {"cluster": True})
            store = RedisBackend(config)
            store.take([slot(), slot("q")])
            owners.add(redis_cluster.owner(config.key_prefix).port)
            assert redis_cluster.owner(config.key_prefix).held(config.key_prefix) == 2
            store.close()
            if len(owners) == 3:
                break
        assert len(owners) == 3


class TestFindingIt:
    @pytest.mark.parametrize("half", HALVES)
    def test_one_url_is_enough_and_any_node_knows(self, redis_cluster: RedisCluster, made: Make, half: str) -> None:
        """A replica, too."""
        for url in redis_cluster.urls:
            ((taken),) = all_of(half, made(url), ("take", [slot(limit=100)]))
            assert isinstance(taken, Taken)

    @pytest.mark.parametrize("half", HALVES)
    def test_a_node_that_is_away_is_passed_over(self, redis_cluster: RedisCluster, made: Make, half: str) -> None:
        nobody = f"redis://127.0.0.1:{free_port()}"
        (taken,) = all_of(half, made([nobody, *redis_cluster.urls]), ("take", [slot()]))
        assert isinstance(taken, Taken)

    def test_however_many_nodes_are_away_the_others_are_found(self, redis_cluster: RedisCluster, made: Make) -> None:
        """With the next call, if not with this one: each asks a few."""
        store = made([*(f"redis://127.0.0.1:{free_port()}" for _ in range(2 * MOST)), *redis_cluster.urls])

        def finds_it() -> bool:
            with suppress(BackendError):
                return isinstance(store.take([slot(limit=100)]), Taken)
            return False

        assert wait_until(finds_it, 10)

    @pytest.mark.parametrize("half", HALVES)
    def test_one_that_has_lost_its_cluster_is_passed_over(
        self, redis_cluster: RedisCluster, made: Make, half: str
    ) -> None:
        """Its file is gone, say, and it knows of no other: it answers, but with nobody."""
        alone = Node(1000)
        try:
            store = made([alone.url.removesuffix("/0"), *redis_cluster.urls], socket_timeout=10)
            began = monotonic()
            (taken,) = all_of(half, store, ("take", [slot()]))
            assert isinstance(taken, Taken)
            assert monotonic() - began < 5, "at once, and not when its share of the time is over"
        finally:
            alone.stop()

    @pytest.mark.parametrize("half", HALVES)
    def test_those_that_never_answer_have_half_of_the_time_each(
        self, redis_cluster: RedisCluster, made: Make, proxy: Proxy, half: str
    ) -> None:
        proxy.black_hole = True
        deaf = [proxy.url, proxy.url.replace("127.0.0.1", "localhost")]
        store = made([*deaf, *redis_cluster.urls], socket_timeout=1.6)
        (taken,) = all_of(half, store, ("take", [slot()]))
        assert isinstance(taken, Taken)

    @pytest.mark.parametrize("half", HALVES)
    def test_all_within_one_deadline(self, made: Make, proxy: Proxy, half: str) -> None:
        proxy.black_hole = True
        store = made([proxy.url, proxy.url.replace("127.0.0.1", "localhost")], socket_timeout=0.25)
        began = monotonic()
        with pytest.raises(BackendError):
            all_of(half, store, ("take", [slot()]))
        assert monotonic() - began < 5 * 0.25

    @pytest.mark.parametrize("half", HALVES)
    def test_nobody_there_is_known_at_once(self, made: Make, half: str) -> None:
        began = monotonic()
        with pytest.raises(BackendError, match=r"could be asked|cannot be reached"):
            all_of(
                half,
                made([f"redis://127.0.0.1:{free_port()}" for _ in range(2)], socket_timeout=20),
                ("take", [slot()]),
            )
        assert monotonic() - began < 10

    @pytest.mark.parametrize("half", HALVES)
    def test_what_was_believed_long_ago_is_asked_again_before_a_call_fails(self, made: Make, half: str) -> None:
        """The master has gone since, and no connection was there to be lost."""
        store = made()
        cluster = store._recipe.where
        assert isinstance(cluster, Cluster)
        cluster._node, cluster._learned = Address("127.0.0.1", free_port()), monotonic() - 3600
        (taken,) = all_of(half, store, ("take", [slot()]))
        assert isinstance(taken, Taken)

    def test_what_nodes_tell_may_be_mapped(self, redis_cluster: RedisCluster, made: Make, prefix: str) -> None:
        """As behind NAT: every address that a node tells leads through a proxy here."""
        owner = redis_cluster.owner(prefix)
        proxy = Proxy(owner.port)
        asked = []

        def remap(address: tuple[str, int]) -> tuple[str, int]:
            asked.append(address)
            return ("127.0.0.1", str(proxy.port)) if address[1] == owner.port else address  # type: ignore[return-value]

        try:
            store = made(redis_cluster.another(prefix).url, address_remap=remap)
            assert isinstance(store.take([slot()]), Taken)
            assert ("127.0.0.1", owner.port) in asked
            assert proxy.connections == 1
            assert not store._lines.have_to_leave, "a port is a number, also where a text was given"
        finally:
            proxy.stop()

    def test_tls_to_every_node(self, redis_cluster: RedisCluster, made: Make, prefix: str, tmp_path: Path) -> None:
        """And its options, certificates among them, are those of LOCATION for all."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        proxies = {node.port: Proxy(node.port, tls=context) for node in redis_cluster.nodes}
        try:
            store = made(
                f"rediss://localhost:{proxies[redis_cluster.another(prefix).port].port}",
                ssl_ca_certs=str(tmp_path / "ca.pem"),
                address_remap=lambda address: ("localhost", proxies[address[1]].port),
            )
            with moving(redis_cluster, prefix):
                for half in HALVES:
                    (taken,) = all_of(half, store, ("take", [slot(key=half)]))
                    assert isinstance(taken, Taken)
            assert len(store.snapshot()) == 2
        finally:
            for proxy in proxies.values():
                proxy.stop()


class TestItHasMoved:
    """Nothing that was sent to the old node was carried out there, and nobody notices."""

    @pytest.mark.parametrize("half", HALVES)
    def test_between_two_requests(self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str) -> None:
        store, first, second = made(), slot(), slot()

        async def main() -> None:
            take = store.atake if half == "loop" else partial(asyncio.to_thread, store.take)
            give = store.agive if half == "loop" else partial(asyncio.to_thread, store.give)
            assert isinstance(await take([first]), Taken)
            with moving(redis_cluster, prefix):
                pass
            assert await take([second]) == Taken((True,), (2,))
            with moving(redis_cluster, prefix):
                pass
            await give([first, second])
            # A release that was refused is heard of by whoever asks next.
            await take([slot("other")])
            assert await await_until(lambda: [holder.policy for holder in store.snapshot()] == ["other"])

        asyncio.run(main())

    def test_releases_that_idle_connections_sent_are_not_forgotten(
        self, redis_cluster: RedisCluster, made: Make, prefix: str
    ) -> None:
        """Each was sent on another connection; the first that hears of the move has all others heard, too."""
        store, held = made(), [slot(limit=100) for _ in range(8)]
        store.take(held)
        lines = [store._lines._open(monotonic() + 2)[0] for _ in held]
        with moving(redis_cluster, prefix):
            pass
        for line, one in zip(lines, held, strict=True):
            store._lines._free.append(line)
            store.give([one])
            store._lines._free.remove(line)
        store._lines._free.extend(lines)
        began = monotonic()
        store.take([slot("other")])
        assert wait_until(lambda: [holder.policy for holder in store.snapshot()] == ["other"])
        assert monotonic() - began < 4, "only when idle connections are looked after, every 5 s"

    def test_a_release_that_nobody_asks_after_is_not_forgotten(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was refused, and its connection is used no more."""
        monkeypatch.setattr(store_module, "TEND_EVERY", 1000.0)
        monkeypatch.setattr(store_module, "HEAR_WITHIN", 0.1)
        store, one = made(), slot()
        store.take([one])
        with moving(redis_cluster, prefix):
            pass
        store.give([one])
        assert wait_until(lambda: redis_cluster.held(prefix) == 0)

    def test_a_probe_follows(self, redis_cluster: RedisCluster, made: Make, prefix: str) -> None:
        """What it has to carry out is refused by the node that it knew."""
        store, one = made(), slot()
        store.take([one])
        store.close()
        with moving(redis_cluster, prefix):
            pass
        store._leftovers._releases.extend(store._keys.give([one]))
        store.probe()
        assert redis_cluster.held(prefix) == 0

    def test_if_there_is_no_time_to_follow_no_cure_is_named(self) -> None:
        """It is `cluster: True` already."""
        moved = Moved(Address("10.0.0.9", 7001))
        moved.__cause__ = ResponseError("MOVED 7 10.0.0.9:7001")
        assert type(classed(moved, Keys("p"))) is BackendError

    def test_by_hand(self, redis_cluster: RedisCluster, made: Make, prefix: str) -> None:
        """SCAN of a node that does not serve the slot finds nothing, and says nothing."""
        store, one = made(), slot()
        store.take([one])
        with moving(redis_cluster, prefix):
            pass
        assert [holder.token for holder in store.snapshot()] == [one.token]
        with moving(redis_cluster, prefix):
            pass
        assert store.evict(one.token)


class TestItIsMoving:
    """Some keys are at the new node already, where those that nobody has yet are made, too."""

    @pytest.mark.parametrize("half", HALVES)
    def test_both_nodes_are_asked(self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str) -> None:
        store, old, moved, new = made(), slot(key="old"), slot(key="moved"), slot(key="new")
        store.take([old, moved])
        with moving(redis_cluster, prefix) as move:
            (key,) = [key for key in move.left() if make_key("moved").digest.hex() in key]
            move.key(key)
            taken = all_of(half, store, *[("take", [slot(key=key)]) for key in ("old", "moved", "new")])
            assert taken == [Taken((True,), (2,)), Taken((True,), (2,)), Taken((True,), (1,))]
            assert isinstance(store.take([new]), Taken)
            assert (move.source.held(prefix), move.target.held(prefix)) == (2, 4)
            assert len(store.snapshot()) == 6
            assert store.renew([(one, 60) for one in (old, moved, new)]) == [True] * 3
            all_of(half, store, ("give", [old]), ("give", [moved]), ("give", [new]))
            store.take([slot("other")])  # whoever comes next hears of it
            assert wait_until(lambda: len(store.snapshot()) == 4)
        assert len(store.snapshot()) == 4

    @pytest.mark.parametrize("half", HALVES)
    def test_a_semaphore_whose_holders_have_all_lapsed_is_at_the_new_node_from_then_on(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str
    ) -> None:
        """The script that finds it so may go on at neither: it is asked once more."""
        store, long, short = made(), slot(), slot(ttl=0.2)
        store.take([long])
        store.take([short])
        store.give([long])
        with moving(redis_cluster, prefix) as move:
            assert wait_until(lambda: store.counts([short]) == [0])
            assert move.source.held(prefix) == 1
            assert all_of(half, store, ("take", [slot(limit=1)])) == [Taken((True,), (1,))]
            assert (move.source.held(prefix), move.target.held(prefix)) == (0, 1)

    def test_peaks_wherever_they_are(self, redis_cluster: RedisCluster, made: Make, prefix: str) -> None:
        store = made()
        store.note({"p": 3})
        with moving(redis_cluster, prefix) as move:
            assert store.peaks() == {"p": 3}
            move.all_keys()
            assert store.peaks() == {"p": 3}
            store.reset_peaks()
            assert store.peaks() == {}

    @pytest.mark.parametrize("half", HALVES)
    def test_several_policies_wait_for_it(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str
    ) -> None:
        """TRYAGAIN: their keys are at two nodes. It is tried again until the deadline; nothing was taken before."""
        store, held = made(socket_timeout=20), slot("a")
        store.take([held])

        async def main() -> None:
            with moving(redis_cluster, prefix):
                take = store.atake if half == "loop" else partial(asyncio.to_thread, store.take)
                asking = asyncio.create_task(take([slot("a"), slot("b")]))
                await asyncio.sleep(0.1)
                assert not asking.done()
                assert redis_cluster.held(prefix) == 1
            assert await asking == Taken((True, True), (2, 1))

        asyncio.run(main())

    @pytest.mark.parametrize("half", HALVES)
    def test_and_fail_for_themselves_alone(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str
    ) -> None:
        """If it takes longer than the deadline. One key by itself is served all the while, so the store has not failed."""
        store, held = made(socket_timeout=1), slot("a")
        store.take([held])
        with moving(redis_cluster, prefix):
            with pytest.raises(BackendError) as raised:
                all_of(half, store, ("take", [slot("a"), slot("b")]))
            assert not raised.value.whole
            assert not isinstance(raised.value, PermanentBackendError)
            (one,) = all_of(half, store, ("take", [slot("a")]))
            assert one == Taken((True,), (2,))
        assert len(store.snapshot()) == 2

    @pytest.mark.parametrize("half", HALVES)
    def test_what_a_lost_connection_to_the_new_node_had_under_way_does_not_overtake(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str
    ) -> None:
        """The acquire would reach it after the release that the next connection sends, had that one not fenced it off."""
        target = redis_cluster.another(prefix)
        proxy = Proxy(target.port)
        there = ("127.0.0.1", proxy.port)
        store = made(address_remap=lambda address: there if address[1] == target.port else address, socket_timeout=1)
        warm, mine = slot("warm"), slot("under way")

        async def main() -> None:
            take = store.atake if half == "loop" else partial(asyncio.to_thread, store.take)
            give = store.agive if half == "loop" else partial(asyncio.to_thread, store.give)
            assert isinstance(await take([warm]), Taken)
            proxy.delay = lambda: 0.4
            asking = asyncio.create_task(take([mine]))
            await asyncio.sleep(0.1)
            proxy.delay = lambda: 0.0
            asking.cancel()
            await asyncio.get_running_loop().run_in_executor(None, proxy.cut_clients)
            if half == "threads":  # where nothing is cancelled
                await asyncio.sleep(0.3)
            await give([mine])
            await give([warm])
            await take([slot("other")])
            await asyncio.sleep(0.6)

        try:
            with moving(redis_cluster, prefix):
                asyncio.run(main())
                assert wait_until(lambda: [holder.policy for holder in store.snapshot()] == ["other"])
        finally:
            proxy.stop()

    def test_what_is_left_over_until_it_has_moved_is_in_nobodys_way(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There may be more of it than one connection carries out: a slot that can be given back is."""
        monkeypatch.setattr(leftovers, "AT_ONCE", 1)
        store, one = made(), replace(slot(), waits=True)
        store.take([one])
        free, wake = store._keys.give([one])
        with moving(redis_cluster, prefix):
            store._leftovers.add([wake, free])
            assert wait_until(lambda: redis_cluster.held(prefix) == 0)
        assert wait_until(lambda: not store._leftovers)

    @pytest.mark.parametrize("half", HALVES)
    def test_a_late_answer_of_the_new_node_leaves_no_slot(
        self, redis_cluster: RedisCluster, made: Make, prefix: str, half: str
    ) -> None:
        target = redis_cluster.another(prefix)
        proxy = Proxy(target.port)
        there = ("127.0.0.1", proxy.port)
        store = made(address_remap=lambda address: there if address[1] == target.port else address, socket_timeout=0.5)
        try:
            with moving(redis_cluster, prefix):
                all_of(half, store, ("take", [slot("warm")]))
                proxy.delay = lambda: 0.8
                with pytest.raises(BackendError):
                    all_of(half, store, ("take", [slot("late")]))
                proxy.delay = lambda: 0.0
                assert wait_until(lambda: "late" not in {holder.policy for holder in store.snapshot()})
                assert wait_until(lambda: not store._leftovers)
                assert [holder.policy for holder in store.snapshot()] == ["warm"]
        finally:
            proxy.stop()


def test_moving_to_and_fro_under_load(redis_cluster: RedisCluster, made: Make, prefix: str) -> None:
    """Threads and a loop take and give at a cap of 5 all the while: no call fails, never above the cap, 0 held at the end."""
    store = made(socket_timeout=20)
    with Load(store.take, store.give, store.atake, store.agive) as load:
        assert load.goes_on()
        for _ in range(20 if LONG else 2):
            move = redis_cluster.begin_move(prefix)
            assert load.goes_on()
            move.all_keys(between=lambda: load.goes_on(20))
            assert load.goes_on()
            move.finish()
            assert load.goes_on()
    assert load.errors == []
    assert 0 < load.most <= CAP
    assert load.full > 0, "the cap was never reached"
    assert wait_until(lambda: redis_cluster.held(prefix) == 0), redis_cluster.held(prefix)
    assert store.snapshot() == []


class TestCheck:
    def test_a_node_of_a_cluster_without_the_option(self, redis_cluster: RedisCluster, prefix: str) -> None:
        url = redis_cluster.another(prefix).url
        store = RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 2}))
        for half in HALVES:
            with pytest.raises(PermanentBackendError) as raised:
                all_of(half, store, ("take", [slot()]))
            assert "`cluster: True`" in raised.value.cure
        (message,) = store.check()
        assert message.id == "django_concurrency_mw.E005"
        assert "`cluster: True`" in (message.hint or "")
        store.close()

    def test_the_option_for_a_single_server(self, redis_server: RedisServer, made: Make) -> None:
        store = made(redis_server.url)
        for half in HALVES:
            with pytest.raises(PermanentBackendError) as raised:
                all_of(half, store, ("take", [slot()]))
            assert "take `cluster` out of OPTIONS" in raised.value.cure
        (message,) = store.check()
        assert message.id == "django_concurrency_mw.E005"

    def test_a_replica_as_location(self, prefix: str) -> None:
        replica = RedisServer("--replicaof", "127.0.0.1", str(free_port()))
        try:
            store = RedisBackend(BackendConfig("default", "redis", replica.url, prefix, {"socket_timeout": 2}))
            (message,) = store.check()
            assert message.id == "django_concurrency_mw.W006"
            assert "LOCATION is a replica" in (message.hint or "")
            store.close()
        finally:
            replica.stop()


def as_of_6(text: str) -> ResponseError:
    """What the parser of redis-py makes of an error reply from version 6 on."""
    kinds = {"MOVED": redis.exceptions.MovedError, "ASK": redis.exceptions.AskError}
    word, _, rest = text.partition(" ")
    return kinds[word](rest) if word in kinds else redis.exceptions.ClusterDownError(rest)


@pytest.mark.parametrize(
    "error", [ResponseError("CROSSSLOT Keys in request"), ClusterCrossSlotError("Keys in request")]
)
def test_keys_of_several_slots_stay_so(error: ResponseError) -> None:
    """However redis-py puts it."""
    assert not passes(error)
    assert "changes the names of keys" in getattr(classed(error, Keys("p")), "cure", "")


class TestWords:
    @pytest.mark.parametrize("error", [ResponseError, as_of_6])
    @pytest.mark.parametrize(
        ("words", "meant", "there"),
        [
            ("MOVED 7 10.0.0.9:7001", Moved, Address("10.0.0.9", 7001)),
            ("MOVED 7 node-2.example.com:7001", Moved, Address("node-2.example.com", 7001)),
            ("MOVED 7 2001:db8::2:7001", Moved, Address("2001:db8::2", 7001)),
            ("MOVED 7 :7001", Moved, Address("asked", 7001)),
            ("MOVED 7 ?:7001", Moved, Address("asked", 7001)),
            ("ASK 7 10.0.0.9:7001", Ask, Address("10.0.0.9", 7001)),
            ("CLUSTERDOWN Hash slot not served", Down, None),
        ],
    )
    def test_redirections(
        self, error: Callable[[str], ResponseError], words: str, meant: type, there: Address | None
    ) -> None:
        said = redirection(error(words), "asked", None)
        assert type(said) is meant
        assert getattr(said, "node", None) == there

    @pytest.mark.parametrize("words", ["ERR unknown command", "NOSCRIPT No matching script", "TRYAGAIN Multiple keys"])
    def test_other_errors_are_none(self, words: str) -> None:
        assert redirection(ResponseError(words), "asked", None) is None

    @pytest.mark.parametrize(
        "words",
        [
            "TRYAGAIN Multiple keys request during rehashing of slot",
            "Error running script: @user_script:1: Lua script attempted to access a non local key in a cluster node",
            "ERR Attempted to access a non local key in a cluster node script: on @user_script:1.",
            "Unable to execute command 'mget' in script because undeclared keys were accessed during rehashing of the slot",
        ],
    )
    def test_a_slot_that_moves_in_the_words_of_every_server(self, words: str) -> None:
        """Of Redis 6.2 and 7.0, and of Valkey 9; Redis 7.2 and Valkey 8 have the last ones, too."""
        assert tries_again(ResponseError(words))

    @pytest.mark.parametrize(
        ("said", "there"),
        [
            ([b"10.0.0.9", 7001, b"id", []], ("10.0.0.9", 7001)),
            ([b"2001:db8::2", 7001, b"id"], ("2001:db8::2", 7001)),
            ([b"", 7001, b"id", []], ("asked", 7001)),
            ([None, 7001, b"id", []], ("asked", 7001)),
            ([b"?", 7001, b"id", [b"ip", b"10.0.0.9"]], ("10.0.0.9", 7001)),
            ([b"?", 7001, b"id", {b"ip": b"10.0.0.9"}], ("10.0.0.9", 7001)),
            ([b"?", 7001, b"id", []], ("asked", 7001)),
        ],
    )
    def test_nodes(self, said: Sequence[Any], there: tuple[str, int]) -> None:
        assert _node(said, Address("asked", 6379)) == there


def test_a_slot_that_nobody_serves(made: Make) -> None:
    cluster = made()._recipe.where
    assert isinstance(cluster, Cluster)
    with pytest.raises(redis.ConnectionError, match="no node of the Cluster serves hash slot"):
        cluster._heard([[cluster.slot + 1, 16_384, [b"10.0.0.9", 7001, b"id"]]], Address("asked", 6379))

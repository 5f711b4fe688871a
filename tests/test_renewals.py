"""What a store has lost is counted again, where nobody can have its place; and what ends meanwhile stays ended."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from time import monotonic, sleep
from typing import Any

import pytest
from django.test import RequestFactory

from django_concurrency_mw import drivers, health, notices, renewals, signals, stand_ins
from django_concurrency_mw import held as held_module
from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.base import RESTORE_WITHIN, Restore
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.held import NEVER, Held
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Asked, Slot, TakeReply
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.renewals import renew
from django_concurrency_mw.stand_ins import REGISTER_AFTER
from django_concurrency_mw.steps import acquire
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .proxy import Proxy, between
from .redis_server import RedisServer
from .support import SOON, wait_until, works_again
from .test_steps import BACKENDS, Unreliable

_numbers = count()


class Store(Unreliable):
    """A store that can be made to fail, or to do something `before` or `after` a restore."""

    def __init__(self, inner: BaseBackend) -> None:
        super().__init__(inner, local=False)
        self.renewed: list[int] = []
        self.restored: list[int] = []
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        self._fail_if("before")
        self.renewed.append(len(slots))
        return self.inner.renew(slots)

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        self._fail_if("before")
        self.restored.append(len(holders))
        self.before()
        reply = self.inner.restore(holders)
        self.after()
        return reply

    def evict(self, token: str) -> bool:
        return self.inner.evict(token)

    def lose(self) -> None:
        """It was restarted, or flushed."""
        if isinstance(self.inner, MemoryBackend):
            self.inner._forget()
        else:
            assert isinstance(self.inner, RedisBackend)
            with self.inner._recipe.client() as client:
                client.flushall()

    def lapse(self, slot: Slot) -> None:
        """The lease of this holder ended a moment ago, by the store's clock."""
        if isinstance(self.inner, MemoryBackend):
            self.inner._semaphores[slot.semaphore][slot.token].ends = monotonic() - 0.001
        else:
            assert isinstance(self.inner, RedisBackend)
            with self.inner._recipe.client() as client:
                key = self.inner._keys.prefix + slot.policy.encode() + b":" + slot.key.digest.hex().encode()
                client.zadd(key, {wire.member(slot): 1})

    def tokens(self) -> list[str]:
        return sorted(holder.token for holder in self.snapshot())


#: The host store mends its own losses (see test_host.py).
LOSES = {name: make for name, make in BACKENDS.items() if name != "host"}


@pytest.fixture(params=list(LOSES.values()), ids=list(LOSES))
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    store = Store(request.param(request))
    yield store
    store.fails = None
    store.before = store.after = lambda: None
    for lease in keeper.live():
        lease.release()
    keeper._retry(0)
    assert works_again(store)
    assert wait_until(lambda: store.tokens() == []), "a test ended with slots held"


@pytest.fixture(autouse=True)
def _by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    notices.forget()
    monkeypatch.setattr(health, "PROBE_EVERY", 0.02)
    monkeypatch.setattr(stand_ins, "REGISTER_AFTER", 3600)  # a test says when


def policy(name: str = "p", limit: int = 5, **fields: Any) -> Policy:
    return Policy(name, parse_key("global"), limit, **{"backend": "store", **fields})


def take(store: BaseBackend, policy: Policy, into: Lease | None = None) -> Lease:
    """What a request holds that was let in."""
    lease = Lease(RequestFactory().get("/")) if into is None else into
    entry = Asked(policy, make_key("k"), policy.max_concurrent)
    token = new_token()
    verdict = drivers.run(acquire([entry], {"store": store}, lease, token, "/", "local"))
    assert verdict.rejected_by is None
    lease.announce(token)
    return lease


def stand_in(store: Store, policy: Policy, fails: str = "before") -> Lease:
    """What a request holds that was let in while the store failed; `after`: it took the slot, and its answer was lost."""
    store.fails = fails
    lease = take(store, policy)
    store.fails = None
    (held,) = lease.holdings()
    assert held.local
    return lease


def only(lease: Lease) -> Held:
    (held,) = lease.holdings()
    return held


def look(*leases: Lease) -> float:
    """The keeper's look when all of these are due, if ever; its thread has to wait for it."""
    with keeper._working:
        now = monotonic()
        for lease in leases:
            for held in lease.holdings():
                held.due = min(held.due, now) if held.due < NEVER else NEVER
        return renew(leases, now)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is stopped, and nobody renews anything."""
    monkeypatch.setattr(keeper, "_renew", lambda leases, now: NEVER)


class TestWhatTheStoreLost:
    def test_is_counted_again_at_its_renewal(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        lease = take(store, policy())
        take(store, policy("q"), lease)
        before = store.tokens()
        store.lose()
        assert store.tokens() == []
        next_look = look(lease)
        assert store.tokens() == before
        assert store.restored == [2]
        assert 10 < next_look - monotonic() <= 20
        assert all(50 < holder.lease_left <= 60 for holder in store.snapshot())
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert record.getMessage() == "backend default had lost 2 holders that still run; they are counted again"
        look(lease)
        assert (store.renewed, store.restored) == ([2, 2], [2])
        lease.release()
        assert store.tokens() == []

    def test_whatever_the_limit(self, store: Store) -> None:
        """Somebody else was let in meanwhile."""
        mine = take(store, policy(limit=1))
        store.lose()
        other = take(store, policy(limit=1))
        look(mine)
        assert store.tokens() == sorted([only(mine).slot.token, only(other).slot.token])

    def test_only_what_is_missing_is_restored(self, store: Store) -> None:
        leases = [take(store, policy()) for _ in range(3)]
        store.inner.give([only(leases[1]).slot])
        look(*leases)
        assert (store.renewed, store.restored) == ([3], [1])
        assert len(store.tokens()) == 3

    def test_not_when_it_was_evicted(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        lease = take(store, policy(limit=1))
        assert store.evict(only(lease).slot.token)
        assert look(lease) == NEVER
        assert store.tokens() == []
        assert only(lease).lost
        assert "its slot is lost" in caplog.text
        other = take(store, policy(limit=1))
        lease.release()
        assert store.tokens() == [only(other).slot.token]

    def test_not_when_its_last_confirmed_lease_has_ended(self, store: Store) -> None:
        lease = take(store, policy())
        store.lose()
        only(lease).ends = monotonic() - 0.001
        assert look(lease) == NEVER
        assert store.restored == []
        assert store.tokens() == []
        assert only(lease).lost

    def test_not_when_it_stands_there_lapsed(self, store: Store) -> None:
        lease, other = take(store, policy()), take(store, policy())
        store.lapse(only(lease).slot)
        look(lease)
        assert store.restored == [1]
        assert store.tokens() == [only(other).slot.token]
        assert only(lease).lost
        assert only(lease).due == NEVER

    @pytest.mark.usefixtures("stopped")
    def test_one_that_was_replaced_never_comes_back_above_the_limit(self, store: Store) -> None:
        """It was stopped for longer than its ttl; somebody else has its place."""
        lease = take(store, policy(limit=1, ttl=0.05))
        assert wait_until(lambda: store.tokens() == [] and only(lease).ends < monotonic())
        other = take(store, policy(limit=1))
        look(lease)
        assert store.tokens() == [only(other).slot.token]
        lease.release()
        assert store.tokens() == [only(other).slot.token]

    def test_not_when_it_was_given_back_since(self, store: Store) -> None:
        lease = take(store, policy())
        store.lose()
        (held,) = lease.holdings()

        class Late(Lease):
            """Its list of holdings was read just before it ended."""

            __slots__ = ()

            def holdings(self) -> list[Held]:
                return [held]

        late = Late()
        lease.release()
        assert look(late) == NEVER
        assert store.restored == []

    def test_unconfirmed_holders_are_not_renewed(self, store: Store) -> None:
        """Their take is still under way, or was cut short."""
        lease = Lease(RequestFactory().get("/"))
        slot = Slot("p", make_key("k"), 5, 60.0, new_token())
        lease.expect(store, [policy()], [slot])
        with keeper._working:
            now = monotonic()
            only(lease).due = now - 10
            assert now < renew([lease], now) <= now + 1
        assert (store.renewed, store.restored) == ([], [])
        lease.confirm([slot], [])

    def test_what_the_store_itself_refuses(self, store: Store) -> None:
        """By its own reckoning, whoever asks: too late, or evicted."""
        slot, evicted = (Slot("p", make_key("k"), 5, 60.0, new_token()) for _ in range(2))
        store.inner.take([evicted])
        store.evict(evicted.token)
        past, future = monotonic() - 0.001, monotonic() + 60
        asked = [Restore(slot, 60, past), Restore(evicted, 60, future), Restore(evicted, 60, NEVER)]
        assert list(store.restore(asked)) == [False, False, False]
        assert list(store.restore([Restore(slot, 60, future)] * 2)) == [True, True]
        assert store.tokens() == [slot.token]
        store.inner.give([slot])

    def test_a_store_that_never_loses_anything_has_no_restore(self, caplog: pytest.LogCaptureFixture) -> None:
        """What it does not know is lost, and what it did not take is not counted there."""

        class Simple(Unreliable):
            def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
                return [False] * len(slots)

        store = Simple(MemoryBackend(BackendConfig("simple", "memory")), local=False)
        lease = take(store, policy())
        assert look(lease) == NEVER
        assert only(lease).lost
        store.fails = "before"
        other = take(store, policy("q"))
        assert look(other) == NEVER
        assert only(other).local
        store.fails = None
        lease.release()
        other.release()


class TestTogether:
    def test_hundreds_of_leases_are_one_call_per_store(self, store: Store) -> None:
        other = Store(MemoryBackend(BackendConfig("other", "memory")))
        leases = [take(each, policy(limit=1000)) for _ in range(300) for each in (store, other)]
        look(*leases)
        assert (store.renewed, other.renewed) == ([300], [300])
        store.lose()
        other.lose()
        look(*leases)
        assert (store.restored, other.restored) == ([300], [300])
        assert (len(store.tokens()), len(other.tokens())) == (300, 300)
        for lease in leases:
            lease.release()
        assert other.tokens() == []

    def test_what_is_due_soon_comes_along(self, store: Store) -> None:
        """By a part of its ttl; the rest is looked at when it is due."""
        leases = [take(store, policy(ttl=100)) for _ in range(4)]
        with keeper._working:
            now = monotonic()
            for lease, later in zip(leases, (0, 2.9, 3.1, 7), strict=True):
                only(lease).due = now + later
            assert renew(leases, now) == pytest.approx(now + 3.1)
        assert store.renewed == [2]

    def test_nothing_is_asked_before_something_is_due(self, store: Store) -> None:
        leases = [take(store, policy(ttl=100)) for _ in range(2)]
        with keeper._working:
            now = monotonic()
            for lease in leases:
                only(lease).due = now + 0.1
            assert renew(leases, now) == pytest.approx(now + 0.1)
            assert store.renewed == []

    def test_more_than_redis_is_asked_at_once(self, store: Store) -> None:
        """Redis is asked in several commands, which are one call to us."""
        leases = [take(store, policy(limit=2000)) for _ in range(1001)]
        store.lose()
        assert look(*leases) - monotonic() > 10, "it could not tell what was restored"
        assert (store.renewed, store.restored) == ([1001], [1001])
        assert len(store.tokens()) == 1001
        for lease in leases:
            lease.release()


class TestAStandIn:
    """A request that was let in while the store failed is counted there as soon as it works, whatever the limit."""

    def test_is_registered_and_then_like_any_other(self, store: Store, released: list[bool]) -> None:
        full = take(store, policy(limit=1))
        only(full).confirmed = False  # of another process
        lease = stand_in(store, policy(limit=1))
        (held,) = lease.holdings()
        look(lease)
        assert store.tokens() == sorted([held.slot.token, only(full).slot.token])
        assert not held.local
        assert 10 < held.due - monotonic() <= 20
        look(lease)
        assert (store.renewed, store.restored) == ([1], [1])
        lease.release()
        assert store.tokens() == [only(full).slot.token]
        assert released == [True]

    def test_within_a_moment_by_the_keeper(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stand_ins, "REGISTER_AFTER", REGISTER_AFTER)
        lease = stand_in(store, policy())
        assert wait_until(lambda: not only(lease).local)
        assert store.tokens() == [only(lease).slot.token]

    def test_at_once_when_the_store_works_again(self, store: Store) -> None:
        """Not only when it is due."""
        lease = stand_in(store, policy())
        store.fails = "before"
        health.failed(store, BackendError("down"), monotonic())
        store.fails = None
        assert works_again(store)
        assert store.tokens() == [only(lease).slot.token]

    def test_with_a_token_of_its_own(self, store: Store) -> None:
        """The take that failed may have been carried out; undoing that must not take this one away."""
        with keeper._working:  # it undoes that whenever it looks
            lease = stand_in(store, policy(), fails="after")
            (taken,) = [holder.token for holder in store.inner.snapshot()]
            assert only(lease).slot.token != taken
            look(lease)
            assert {holder.token for holder in store.inner.snapshot()} == {only(lease).slot.token, taken}
            keeper._retry(0)
        assert store.tokens() == [only(lease).slot.token]
        assert only(lease).acquisition == taken

    def test_is_given_back_by_its_acquisition(self, store: Store) -> None:
        lease = stand_in(store, policy())
        look(lease)
        drivers.run(lease.steps_to_give(only(lease).acquisition))
        assert store.tokens() == []
        assert not lease

    def test_max_age_bounds_it(self, store: Store) -> None:
        lease = stand_in(store, policy(max_age=30))
        only(lease).since -= 20
        look(lease)
        (holder,) = store.snapshot()
        assert 1 < holder.lease_left <= 10
        assert only(lease).ends <= only(lease).last

    @pytest.mark.parametrize("fields", [{"max_age": 30}, {"renew": False, "ttl": 30}], ids=["max_age", "no renewal"])
    def test_one_that_is_too_old_is_not_registered(self, store: Store, fields: dict[str, Any]) -> None:
        lease = stand_in(store, policy(**fields))
        only(lease).since -= 31
        assert look(lease) == NEVER
        assert store.restored == []
        assert store.tokens() == []
        assert only(lease).local

    def test_without_renewals_it_has_what_is_left_of_its_ttl(self, store: Store) -> None:
        lease = stand_in(store, policy(renew=False, ttl=30))
        only(lease).since -= 20
        assert look(lease) == NEVER
        (holder,) = store.snapshot()
        assert 1 < holder.lease_left <= 10
        assert look(lease) == NEVER
        assert (store.renewed, store.restored) == ([], [1])


@pytest.fixture
def released() -> Iterator[list[bool]]:
    """The `held` of every `slot_released`, in order."""
    told: list[bool] = []

    def receiver(held: bool, **arguments: Any) -> None:
        told.append(held)

    signals.slot_released.connect(receiver)
    yield told
    signals.slot_released.disconnect(receiver)


def confirmed(store: Store) -> Lease:
    """A holder that the store has lost."""
    lease = take(store, policy())
    store.lose()
    return lease


Kind = Callable[[Store], Lease]


@pytest.mark.parametrize("kind", [confirmed, lambda store: stand_in(store, policy())], ids=["lost", "stand-in"])
class TestReleasedMeanwhile:
    """A request ends exactly while its holder is brought back."""

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_nothing_is_left(self, store: Store, kind: Kind, when: str, released: list[bool]) -> None:
        lease = kind(store)
        setattr(store, when, lease.release)
        look(lease)
        assert store.restored == [1]
        assert store.tokens() == []
        assert len(released) == 1

    @pytest.mark.parametrize("late", [False, True], ids=["carried out", "carried out late"])
    def test_nothing_is_left_of_one_that_failed(
        self, store: Store, kind: Kind, late: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(renewals, "RESTORE_WITHIN", 0.3)
        lease = kind(store)
        self.fail(store, late, lease.release)
        look(lease)
        assert wait_until(lambda: store.tokens() != [])
        assert wait_until(lambda: store.tokens() == [])

    @pytest.mark.parametrize("late", [False, True], ids=["carried out", "carried out late"])
    def test_nor_where_it_ends_while_the_store_is_still_away(
        self, store: Store, kind: Kind, late: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Long after it may still have been carried out, and before anybody could ask again."""
        monkeypatch.setattr(renewals, "RESTORE_WITHIN", 0.1)
        lease = kind(store)
        self.fail(store, late, lambda: setattr(store, "fails", "before"))
        look(lease)
        assert wait_until(lambda: store.tokens() != [])
        looked = threading.Event()
        keeper.at(0.15, looked.set)
        assert looked.wait(SOON)
        lease.release()
        store.fails = None
        assert works_again(store)
        keeper._retry(0)
        assert wait_until(lambda: store.tokens() == [])

    def fail(self, store: Store, late: bool, then: Callable[[], None]) -> None:
        """The next restore fails, and is carried out: before that or, as a packet that was under way, after it."""

        def failing(holders: Sequence[Restore]) -> Sequence[bool]:
            del store.restore  # the class's own again
            then()
            if late:
                threading.Timer(0.05, store.inner.restore, (holders,)).start()
            else:
                store.inner.restore(holders)
            raise BackendError("no reply")

        store.restore = failing  # type: ignore[method-assign]  # for one call


def test_a_restore_that_failed_is_undone_within_its_time() -> None:
    """With the constant as it is."""
    store = Store(MemoryBackend(BackendConfig("default", "memory")))
    lease = confirmed(store)
    TestReleasedMeanwhile().fail(store, False, lease.release)
    start = monotonic()
    look(lease)
    assert len(store.tokens()) == 1
    assert wait_until(lambda: store.tokens() == [], 5 * RESTORE_WITHIN)
    assert monotonic() - start >= RESTORE_WITHIN


class TestOnRedis:
    """What only a real server can show."""

    @pytest.fixture
    def redis(self, request: pytest.FixtureRequest) -> Iterator[RedisBackend]:
        redis = BACKENDS["redis"](request)
        assert isinstance(redis, RedisBackend)
        yield redis
        redis.close()

    @pytest.fixture
    def prefix(self, redis: RedisBackend) -> str:
        return redis.config.key_prefix

    def test_a_restore_that_arrives_late_does_nothing(
        self, redis: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        """By the server's clock."""
        slot = Slot("p", make_key("k"), 5, 60.0, new_token())

        def at(offset: int, within: int = 1000) -> list[int]:
            seconds, micros = redis_server.client().time()
            now = seconds * 1000 + micros // 1000
            packed = redis._keys.restore([(slot, 60.0, now + offset)], now + within)
            reply: list[int] = redis._call(packed, (), lambda: packed)
            return reply

        assert at(-1) == [0]
        assert at(60_000, within=-1) == [2], "not gone, but to be tried again"
        assert list(redis_server.client().scan_iter(f"{{{prefix}}}*")) == []
        assert at(60_000) == [1]
        assert redis_server.held(prefix) == 1
        assert at(-1) == [1], "it is there: that is a renewal"
        redis.give([slot])

    def test_it_has_no_more_time_than_its_caller_waits(self, redis: RedisBackend, redis_server: RedisServer) -> None:
        """A lease that lasts longer than the time-out is no reason to be carried out long after it."""
        sent: list[bytes] = []
        call = redis._lines.call

        def seen(packed: bytes, undo: Any, whole: Any) -> Any:
            sent.append(packed)
            return call(packed, undo, whole)

        redis._lines.call = seen  # type: ignore[method-assign]  # to see what is sent
        slots = [Slot("p", make_key("k"), 5, 60.0, new_token()) for _ in range(2)]
        seconds, micros = redis_server.client().time()
        redis.restore([Restore(slots[0], 60, NEVER), Restore(slots[1], 60, monotonic() + 0.1)])
        arguments = sent[-1].split(b"\r\n")
        until = [int(arguments[arguments.index(slot.token.encode()) - 6]) for slot in slots]
        now = seconds * 1000 + micros // 1000
        assert now < until[1] <= now + 10_000
        assert until[0] > now + 10**11
        assert now < int(arguments[-2]) <= now + 1000 * RESTORE_WITHIN + 10_000
        redis.give(slots)

    def test_a_restored_holders_key_ends_with_its_lease(
        self, redis: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        one, two = (Slot("p", make_key("k"), 5, 60.0, new_token()) for _ in range(2))
        assert redis.restore([Restore(one, 0.2, NEVER), Restore(two, 30, NEVER)]) == [True, True]
        (key,) = redis_server.client().scan_iter(f"{{{prefix}}}*")
        assert 20_000 < redis_server.client().pttl(key) <= 30_000
        assert redis.restore([Restore(one, 0.1, NEVER)]) == [True]
        assert 20_000 < redis_server.client().pttl(key) <= 30_000
        redis.give([one, two])

    def test_tombstones_end_with_the_lease_and_leave_no_key(
        self, redis: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        short, long, brief = (Slot("p", make_key("k"), 5, ttl, new_token()) for ttl in (10.0, 30.0, 0.3))
        client = redis_server.client()
        redis.take([short])
        redis.take([long])
        assert redis.evict(long.token)
        assert redis.evict(short.token)
        assert list(client.scan_iter(f"{{{prefix}}}*")) == [redis._keys.tombstones]
        assert 20_000 < client.pttl(redis._keys.tombstones) <= 30_000
        assert client.zcard(redis._keys.tombstones) == 2
        assert redis_server.held(prefix) == 0
        assert list(redis.snapshot()) == []
        client.delete(redis._keys.tombstones)
        redis.take([brief])
        redis.evict(brief.token)
        left = client.pttl(redis._keys.tombstones)
        assert left <= 300, "no longer than the lease"
        assert left != -1, "and not for ever"
        assert wait_until(lambda: list(client.scan_iter(f"{{{prefix}}}*")) == [])
        assert redis.restore([Restore(brief, 60, NEVER)]) == [True], "it is over"
        redis.give([brief])

    def test_old_tombstones_go_when_a_new_one_comes(self, redis: RedisBackend, redis_server: RedisServer) -> None:
        client = redis_server.client()
        slots = [Slot("p", make_key("k"), 50, 0.5 if number < 9 else 30.0, new_token()) for number in range(10)]
        for slot in slots:
            redis.take([slot])
            redis.evict(slot.token)
        last = Slot("p", make_key("k"), 50, 30.0, new_token())
        assert wait_until(lambda: all(score < _ms(redis_server) for score in _scores(redis, redis_server)[:9]))
        redis.take([last])
        redis.evict(last.token)
        assert client.zcard(redis._keys.tombstones) == 2

    def test_evicting_one_that_has_lapsed_leaves_nothing_without_an_end(
        self, redis: RedisBackend, redis_server: RedisServer, prefix: str
    ) -> None:
        client = redis_server.client()
        lapsed, other = (Slot("p", make_key("k"), 5, 60.0, new_token()) for _ in range(2))
        redis.take([lapsed])
        redis.take([other])
        (key,) = client.scan_iter(f"{{{prefix}}}*")
        client.zadd(key, {wire.member(lapsed): 1})
        assert redis.evict(lapsed.token)
        assert list(client.scan_iter(f"{{{prefix}}}*")) == [key]
        assert client.pttl(key) > 0
        assert client.zcard(key) == 1
        redis.give([other])

    def test_a_holder_of_several_slots_is_barred_as_long_as_its_longest_lease(
        self, redis: RedisBackend, redis_server: RedisServer
    ) -> None:
        token = new_token()
        slots = [Slot(name, make_key("k"), 5, ttl, token) for name, ttl in [("a", 30.0), ("b", 5.0)]]
        redis.take(slots)
        client = redis_server.client()
        for slot in slots:  # evict() takes them in whatever order the server names them
            (key,) = client.scan_iter(redis._keys.prefix + f"{slot.policy}:*".encode())
            assert client.eval(wire.EVICT.text, 2, key, redis._keys.tombstones, wire.member(slot), token) == 1  # type: ignore[arg-type]
        assert 20_000 < client.pttl(redis._keys.tombstones) <= 30_000
        assert _scores(redis, redis_server)[0] > _ms(redis_server) + 20_000


def _ms(server: RedisServer) -> float:
    seconds, micros = server.client().time()
    return float(seconds * 1000 + micros / 1000)


def _scores(redis: RedisBackend, server: RedisServer) -> list[float]:
    found: Any = server.client().zrange(redis._keys.tombstones, 0, -1, withscores=True)
    return [float(score) for _, score in found]


def test_tombstones_in_memory_go_when_a_new_one_comes() -> None:
    store = MemoryBackend(BackendConfig("default", "memory"))
    slots = [Slot("p", make_key("k"), 50, 0.3, new_token()) for _ in range(10)]
    for slot in slots:
        store.take([slot])
        assert store.evict(slot.token)
    assert wait_until(lambda: max(store._evicted.values()) < monotonic())
    last = Slot("p", make_key("k"), 50, 60.0, new_token())
    store.take([last])
    store.evict(last.token)
    assert list(store._evicted) == [last.token]


class TestWhatTheRequestIsTold:
    """Redis's `give` says True whatever it finds; our own reckoning tells who ran without a slot."""

    @pytest.mark.usefixtures("stopped")
    @pytest.mark.parametrize(
        ("fields", "cure"),
        [
            ({"renew": False}, "let it be renewed (`renew: true`)"),
            ({"max_age": 0.05}, "It was older than `max_age`"),
            ({"max_age": None}, "An operator took the slot away, or the process was stopped"),
        ],
        ids=["renew", "max_age", "ttl"],
    )
    def test_a_lease_that_has_ended(
        self,
        store: Store,
        released: list[bool],
        caplog: pytest.LogCaptureFixture,
        fields: dict[str, Any],
        cure: str,
    ) -> None:
        if isinstance(store.inner, RedisBackend):
            assert list(store.inner.give([Slot("p", make_key("k"), 1, 60.0, new_token())])) == [True]
        leases = [take(store, policy(ttl=0.05, **fields)) for _ in range(2)]
        assert wait_until(lambda: max(only(lease).ends for lease in leases) + 0.1 < monotonic())
        for lease in leases:
            lease.release()
        assert released == [False, False]
        (record,) = [record for record in caplog.records if "its slot is lost" in record.msg]
        said = record.getMessage()
        assert record.levelno == logging.WARNING
        assert said.startswith("policy p: a request has run for 0.")
        assert "ttl 0.05 s" in said
        assert "lease ended 0." in said
        assert cure in said

    def test_one_that_was_lost_at_its_renewal(
        self, store: Store, released: list[bool], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Said at once, and not again at its end."""
        lease = take(store, policy())
        store.evict(only(lease).slot.token)
        look(lease)
        assert caplog.text.count("its slot is lost") == 1
        assert "s), so somebody" in caplog.text, "nobody knows when"
        lease.release()
        assert released == [False]
        assert caplog.text.count("its slot is lost") == 1

    def test_each_policy_has_its_own_word(self, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("p", "q", "p"):
            lease = take(store, policy(name))
            store.evict(only(lease).slot.token)
            look(lease)
        assert caplog.text.count("its slot is lost") == 2

    def test_a_stand_in_was_never_lost(
        self, store: Store, released: list[bool], caplog: pytest.LogCaptureFixture
    ) -> None:
        """However long the store is away: nobody else was told that the place is free."""
        lease = stand_in(store, policy())
        only(lease).ends = monotonic() - 10
        only(lease).due = NEVER
        lease.release()
        assert released == [True]
        assert "its slot is lost" not in caplog.text

    def test_neither_was_one_in_time(
        self, store: Store, released: list[bool], caplog: pytest.LogCaptureFixture
    ) -> None:
        take(store, policy()).release()
        assert released == [True]
        assert caplog.text == ""


class Apart(BaseBackend):
    """Requests go to Redis directly, what the keeper does goes through a slow network."""

    supports_semaphores = True
    cancel_safe = True

    def __init__(self, near: RedisBackend, far: RedisBackend) -> None:
        super().__init__(near.config)
        self.near, self.far = near, far
        self.renewed = self.restored = 0

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        return self.near.take(slots)

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return self.near.give(slots)

    async def atake(self, slots: Sequence[Slot]) -> TakeReply:
        return await self.near.atake(slots)

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return await self.near.agive(slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        self.renewed += len(slots)
        return self.far.renew(slots)

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        self.restored += len(holders)
        return self.far.restore(holders)


def test_requests_that_end_around_their_renewal(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store that loses everything a few times a second, and a keeper whose words arrive late.

    Three thousand requests in the long run, in the short one as many as it takes to see enough. The leases are long, as a
    slot that is left behind must not be hidden by its end; their renewals are due as if they were of 0.3 s.
    """
    ttl, requests, at_once = 60.0, 3000 if LONG else 1000, 56
    monkeypatch.setattr(held_module, "RENEW_AFTER", 0.1 / ttl)
    monkeypatch.setattr(renewals, "EARLY", 0.01 / ttl)
    prefix = f"race-{next(_numbers)}"
    proxy = Proxy(redis_server.port)
    proxy.delay = between(0, 0.03)
    near, far = (
        RedisBackend(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 5}))
        for url in (redis_server.url, proxy.url)
    )
    store = Apart(near, far)
    meanwhile: list[int] = []

    def given_behind(store: Any, pairs: Sequence[Any]) -> None:
        meanwhile.append(sum(not lease.holds(held) for lease, held in pairs))
        give_what_ended(store, pairs)

    give_what_ended = renewals._give_what_ended
    monkeypatch.setattr(renewals, "_give_what_ended", given_behind)
    ended = threading.Event()
    errors: list[BaseException] = []
    policy_ = policy(limit=10_000, ttl=ttl, max_age=None)

    def steps(lease: Lease) -> Any:
        asked = [Asked(policy_, make_key(str(random.randrange(5))), 10_000)]
        return acquire(asked, {"store": store}, lease, new_token(), "/", "local")

    def held_for() -> float:
        return random.uniform(0.08, 0.13) if random.random() < 0.8 else random.uniform(0.13, 0.3)

    def in_a_thread(number: int) -> None:
        lease = Lease()
        try:
            drivers.run(steps(lease))
            sleep(held_for())
            lease.release()
        except BaseException as error:
            errors.append(error)

    async def on_a_loop() -> None:
        gate = asyncio.Semaphore(at_once)

        async def one() -> None:
            async with gate:
                lease = Lease()
                await drivers.arun(steps(lease))
                await asyncio.sleep(held_for())
                await lease.arelease()

        await asyncio.gather(*(one() for _ in range(requests // 2)))

    def flush() -> None:
        with redis_server.client() as client:
            while not ended.wait(random.uniform(0.1, 0.4)):
                client.flushall()

    flushing = threading.Thread(target=flush)
    flushing.start()
    try:
        for _ in range(20):
            with ThreadPoolExecutor(at_once) as pool:
                done = pool.map(in_a_thread, range(requests // 2))
                asyncio.run(on_a_loop())
                list(done)
            if errors or (store.renewed > 500 and store.restored > 50 and sum(meanwhile) > 10):
                break
    finally:
        ended.set()
        flushing.join()
    try:
        assert errors == []
        assert wait_until(lambda: redis_server.held(prefix) == 0), redis_server.held(prefix)
        settled = threading.Event()
        keeper.at(2 * RESTORE_WITHIN / 4, settled.set)  # whatever the keeper has still under way
        assert settled.wait(SOON)
        assert redis_server.held(prefix) == 0
        assert store.renewed > 500
        assert store.restored > 50
        assert 10 < sum(meanwhile) < store.restored, (
            "of those who were brought back, some ended meanwhile and some did not"
        )
    finally:
        near.close()
        far.close()
        proxy.stop()

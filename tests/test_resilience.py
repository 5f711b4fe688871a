"""Resilience: a store that fails, hangs or forgets leaves no slot behind, nobody above the limit, and no other store harmed."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from time import monotonic
from typing import Any, ClassVar, Literal

import pytest
from asgiref.sync import sync_to_async

from django_concurrency_mw import drivers, health, limiter, notices, renewals, signals, stand_ins
from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis import wire
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.effects import Steps, Take
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.held import Held
from django_concurrency_mw.keeper import Keeper, keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Asked, Slot, StoreFailed, Taken, TakeReply, Verdict
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.steps import acquire
from django_concurrency_mw.tokens import new_token

from .proxy import Proxy
from .redis_server import RedisServer
from .support import EARLIER, SOON, await_until, exit_code, run_async, wait_until

LONG = 60.0
Mode = Literal["local", "allow", "deny"]
_numbers = count()


# -- stores whose faults a test chooses ---------------------------------------------------------------------------------


class Memory(MemoryBackend):
    """`down`: takes, releases and probes fail. `renewed`: set by each renewal."""

    def __init__(self, alias: str = "default") -> None:
        super().__init__(BackendConfig(alias, "memory"))
        self.down = False
        self.renewed = threading.Event()
        _made.append(self)

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        self._fail_if_down()
        return super().take(slots)

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        self._fail_if_down()
        return super().give(slots)

    def probe(self) -> None:
        self._fail_if_down()
        super().probe()

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        reply = super().renew(slots)
        if any(slot.policy != "!probe" for slot, _ in slots):
            self.renewed.set()
        return reply

    def _fail_if_down(self) -> None:
        if self.down:
            raise BackendError("down")


class Hangs(Memory):
    """Its probe does not return before `go`."""

    def __init__(self, alias: str = "default") -> None:
        super().__init__(alias)
        self.probing, self.go = threading.Event(), threading.Event()

    def probe(self) -> None:
        self.probing.set()
        self.go.wait(SOON)


class LateAndLost(BaseBackend):
    """Threads called `late` have their slot at once and hear of it after `go`; those called `lost` hear nothing."""

    executed: threading.Event
    go: threading.Event

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        name = threading.current_thread().name
        if name == "lost":
            raise BackendError("no reply")
        reply = super().take(slots)  # type: ignore[safe-super]  # of the store that this is mixed into
        if name == "late":
            self.executed.set()
            self.go.wait(SOON)
        return reply


class LateMemory(LateAndLost, Memory):
    cancel_safe: ClassVar[bool] = True


class LateRedis(LateAndLost, RedisBackend):
    cancel_safe: ClassVar[bool] = True


_made: list[Memory] = []


@pytest.fixture(autouse=True)
def _clean_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Probes follow each other quickly, and no fault outlives its test."""
    monkeypatch.setattr(health, "PROBE_EVERY", 0.02)
    notices.forget()
    health._said.clear()
    yield
    for store in _made:
        store.down = False
        if isinstance(store, Hangs):
            store.go.set()
    assert wait_until(lambda: all(store.failure is None for store in _made))
    assert wait_until(lambda: not debts_of(*_made))
    _made.clear()
    stand_ins.known.clear()


Connect = Callable[..., RedisBackend]


@pytest.fixture
def connect(redis_server: RedisServer) -> Iterator[Connect]:
    """A Redis store with a prefix of its own; by default on the server of all tests."""
    made = []

    def connect(kind: type[RedisBackend] = RedisBackend, url: str = redis_server.url, **options: Any) -> RedisBackend:
        prefix = f"resilience-{os.getpid()}-{next(_numbers)}"
        store = kind(BackendConfig("default", "redis", url, prefix, {"socket_timeout": 5, **options}))
        made.append(store)
        return store

    yield connect
    for store in made:
        assert wait_until(lambda store=store: store.failure is None)  # type: ignore[misc]  # mypy cannot infer it
        store.close()


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What receivers of `backend_failed` hear; stores of earlier tests may just come back."""
    told: list[str] = []

    def hear(alias: str, recovered: bool, **_: object) -> None:
        if alias != EARLIER:
            told.append("works" if recovered else "fails")

    signals.backend_failed.connect(hear)
    yield told
    signals.backend_failed.disconnect(hear)


# -- requests without HTTP -----------------------------------------------------------------------------------------------


def policy(name: str = "p", limit: int = 5, **fields: Any) -> Policy:
    return Policy(name, parse_key("global"), limit, **{"backend": "store", "ttl": LONG, **fields})


def slot(name: str = "p", limit: int = 5) -> Slot:
    return Slot(name, make_key("k"), limit, LONG, new_token())


def steps(store: BaseBackend, rule: Policy, lease: Lease, token: str, mode: Mode) -> Steps[Verdict]:
    asked = [Asked(rule, make_key("k"), rule.max_concurrent)]
    return limiter._watched(acquire(asked, {"store": store}, lease, token, "/", mode))


def enter(store: BaseBackend, rule: Policy, mode: Mode = "local") -> tuple[Lease, Verdict]:
    """A request: its lease, and what was decided. One that is turned away holds nothing."""
    lease, token = Lease(), new_token()
    verdict = drivers.run(steps(store, rule, lease, token, mode))
    if verdict.rejected_by is not None:
        drivers.run(lease.steps_to_give(token))
    return lease, verdict


def state(verdict: Verdict) -> str:
    return verdict.concurrency.policies[0].state


def stand_in(store: BaseBackend, rule: Policy) -> tuple[Lease, Held]:
    """A request that this process counts in the store's stead."""
    lease = Lease()
    assert lease.stand_in(store, [rule], [slot(rule.name, rule.max_concurrent)]) == (True, (1,))
    return lease, only(lease)


def only(lease: Lease) -> Held:
    (held,) = lease.holdings()
    return held


def no_keeper() -> AbstractContextManager[None]:
    """The keeper's thread does nothing meanwhile, so a test can do its work step by step."""
    return keeper.at_work()


def renew_now(*some: Lease) -> None:
    """What the keeper would do when all of these are due."""
    for lease in some:
        for held in lease.holdings():
            held.due = monotonic()
    renewals.renew(some, monotonic())


def debts_of(*stores: BaseBackend) -> int:
    """Slots that the keeper is still to give back."""
    with no_keeper():
        return sum(len(debt.slots) for debt in keeper._owed if debt.store in stores)


def tokens(store: BaseBackend) -> list[str]:
    return [holder.token for holder in store.snapshot() if holder.policy != "!probe"]


# -- what an outage leaves behind ----------------------------------------------------------------------------------------


def test_stand_ins_that_have_ended_are_not_kept() -> None:
    store = Memory()
    store.down = True
    for _ in range(20):
        lease, verdict = enter(store, policy(limit=1))
        assert state(verdict) == "local"
        lease.release()
    assert len(stand_ins.known) == 1  # the last one, which the next look drops


def test_a_take_that_was_not_sent_is_not_given_back() -> None:
    store = Memory()
    store.down = True
    assert state(enter(store, policy(), "allow")[1]) == "unprotected"
    assert debts_of(store) == 1  # this one was sent

    async def enter_on_a_loop() -> None:
        await drivers.arun(steps(store, policy(), Lease(), new_token(), "allow"))

    for _ in range(5):
        enter(store, policy(), "allow")[0].release()
        run_async(enter_on_a_loop)
    assert debts_of(store) == 1


def test_a_driver_says_that_nothing_was_sent() -> None:
    store = Memory()
    store.down = True
    effect = Take(store, (slot(),))

    def says_sent(reply: object) -> bool:
        assert isinstance(reply, StoreFailed)
        return reply.sent

    async def on_a_loop() -> object:
        return await drivers.atake(effect.store, effect.slots)

    assert says_sent(drivers.take(effect.store, effect.slots))
    assert says_sent(run_async(on_a_loop))
    health.failed(store, BackendError("down"), monotonic())
    assert not says_sent(drivers.take(effect.store, effect.slots))
    assert not says_sent(run_async(on_a_loop))


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_a_stand_in_that_is_registered_before_a_late_reply(kind: str, connect: Connect) -> None:
    """The store counted the late one when it was alone there, and this process the other one when it did not know of it."""
    store = LateMemory() if kind == "memory" else connect(LateRedis)
    assert isinstance(store, LateAndLost)
    store.executed, store.go = threading.Event(), threading.Event()
    entered: dict[str, tuple[Lease, Verdict]] = {}

    def request() -> None:
        entered[threading.current_thread().name] = enter(store, policy(limit=1))

    late, lost = threading.Thread(target=request, name="late"), threading.Thread(target=request, name="lost")
    late.start()
    assert store.executed.wait(SOON)
    lost.start()
    lost.join()
    assert state(entered["lost"][1]) == "local"
    stand_in = only(entered["lost"][0])
    assert wait_until(lambda: store.failure is None and not stand_in.local)
    store.go.set()
    late.join()
    assert state(entered["late"][1]) == "over"
    assert [name for name, (lease, _) in entered.items() if lease] == ["lost"]
    entered["lost"][0].release()


class TestRestores:
    """A holder that the store does not count is counted again, however badly that goes."""

    @pytest.mark.parametrize("who", ["lost by the store", "a stand-in"])
    def test_one_that_comes_too_late_is_tried_again(
        self, who: str, connect: Connect, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = connect()
        call = store._lines.call

        def held_up(packed: bytes, *rest: Any) -> Any:
            """As if ten seconds had passed since the server told the time."""
            reply = call(packed, *rest)
            return [int(reply[0]) - 10, reply[1]] if packed is wire.TIME else reply

        with no_keeper():
            if who == "a stand-in":
                lease, held = stand_in(store, policy())
            else:
                lease = enter(store, policy())[0]
                held = only(lease)
                redis_server.client().flushall()
            monkeypatch.setattr(store._lines, "call", held_up)
            renew_now(lease)
            assert tokens(store) == []
            assert not held.lost
            assert held.due < held.ends  # it is tried again
            assert store.failure is None
            monkeypatch.setattr(store._lines, "call", call)
            renewals.renew([lease], held.due)
            assert tokens(store) == [held.slot.token]
            assert not held.local
        lease.release()

    @pytest.mark.parametrize("give_fails", [False, True])
    def test_one_that_was_carried_out_without_a_reply_is_given_back(
        self, give_fails: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class HalfHeard(Hangs):
            half = True

            def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
                reply = super().restore(holders)
                if self.half:
                    self.half = False
                    raise BackendError("the reply is lost")
                return reply

        store, looked = HalfHeard(), threading.Event()
        monkeypatch.setattr(renewals, "RESTORE_WITHIN", 0.0)
        with no_keeper():
            lease, held = stand_in(store, policy())
            renew_now(lease)
            keeper.at(0, looked.set)
        assert looked.wait(SOON)  # for a request that had ended, which this one had not
        with no_keeper():
            assert held.local
            assert tokens(store) == [held.slot.token]
            store.down = give_fails
            lease.release()
            assert bool(tokens(store)) is give_fails
        store.down = False
        assert wait_until(lambda: tokens(store) == [])

    @pytest.mark.parametrize(
        "fields", [{}, {"renew": False}, {"max_age": LONG}], ids=["renewed", "not renewed", "max_age"]
    )
    def test_who_is_not_renewed_is_counted_again_too(self, fields: dict[str, Any]) -> None:
        store = Memory()
        lease = enter(store, policy(**fields))[0]
        store._forget()
        health.failed(store, BackendError("restarted"), monotonic())
        assert wait_until(lambda: store.failure is None)
        assert tokens(store) == [only(lease).slot.token]
        lease.release()


class TestRenewals:
    """What is wrong with one key, store or take keeps nobody else's lease from being renewed."""

    def test_a_key_of_another_type_is_in_the_way_of_nobody_else(
        self, connect: Connect, redis_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = connect()
        broken, sound = enter(store, policy("broken"))[0], enter(store, policy("sound"))[0]
        with redis_server.client() as client:
            (key,) = client.scan_iter(f"*{store.config.key_prefix}*:broken:*")
            client.set(key, "foreign")
            with no_keeper():
                for _ in range(3):
                    before = only(sound).ends
                    renew_now(broken, sound)
                    assert only(sound).ends > before
                    assert store.failure is None
            assert not only(broken).lost
            client.delete(key)
        said = [record for record in caplog.records if "WRONGTYPE" in record.getMessage()]
        assert [record.levelno for record in said] == [logging.ERROR]
        for lease in (broken, sound):
            lease.release()

    def test_probes_that_hang_do_not_hold_them_up(self) -> None:
        dead = [Hangs(f"dead-{number}") for number in range(4)]
        for store in dead:
            health.failed(store, BackendError("down"), monotonic())
        assert dead[0].probing.wait(SOON)
        good = Memory("good")
        lease = enter(good, policy(ttl=0.6))[0]
        assert good.renewed.wait(SOON)
        assert all(store.failure is not None for store in dead)
        lease.release()

    def test_a_store_that_raises_anything_at_a_release_does_not_end_them(self) -> None:
        class Cancels(Memory):
            def _fail_if_down(self) -> None:
                if self.down:
                    self.asked = True
                    raise asyncio.CancelledError

        bad, owed, good = Cancels("bad"), Memory("owed"), Memory("good")
        left = slot()
        assert isinstance(owed.take((left,)), Taken)
        bad.down = True
        with no_keeper():
            keeper.give_later(bad, (slot(),), monotonic() + LONG)
            keeper.give_later(owed, (left,), monotonic() + LONG)
        assert wait_until(lambda: tokens(owed) == [])
        assert bad.asked
        assert debts_of(bad) == 1
        lease = enter(good, policy(ttl=0.6))[0]
        assert good.renewed.wait(SOON)
        lease.release()

    def test_the_keeper_looks_again_after_anything_that_is_raised(self) -> None:
        again = threading.Event()
        raised: list[bool] = []

        def renew(leases: Sequence[Any], now: float) -> float:
            if not raised:
                raised.append(True)
                raise asyncio.CancelledError
            again.set()
            return float("inf")

        own = Keeper()
        own.renew_with(renew)
        own.look_at(monotonic())
        assert again.wait(SOON)

    def test_a_short_lease_is_looked_at_in_time_after_a_look_that_came_before_its_reply(self) -> None:
        lease = Lease()
        lease.expect(Memory(), [policy(ttl=1.0)], [slot()])
        held = only(lease)
        held.ends = held.since + 1.0
        held.due = held.since + 1.0 / 3
        assert renewals.renew([lease], held.since) <= held.due
        assert renewals.renew([lease], held.due) < held.ends - 0.4
        held.confirmed = True
        assert renewals.renew([lease], held.since) <= held.due
        lease.release()

    def test_one_that_timed_out_leaves_its_connection_in_step(
        self, connect: Connect, redis_server: RedisServer
    ) -> None:
        proxy = Proxy(redis_server.port)
        try:
            store = connect(url=proxy.url)
            lease = enter(store, policy())[0]
            line = store._lines._free[0]
            store._recipe.timeout, patient = 0.1, store._recipe.timeout
            proxy.black_hole = True
            with pytest.raises(BackendError):
                store.renew([(only(lease).slot, LONG)])
            assert [replies for _, replies in line.owed] == [1]
            store._recipe.timeout = patient
            proxy.black_hole = False
            taken = store.take((slot("other"),))
            assert taken == Taken((True,), (1,))
            assert list(store._lines._free) == [line]
            assert not line.owed
            assert store.renew([(only(lease).slot, LONG)]) == [True]
            lease.release()
            store.close()
        finally:
            proxy.stop()


class TestBreaker:
    """It always closes again, opens for news only, and tells what happened in that order."""

    def test_a_probe_that_raises_anything_is_followed_by_another(self) -> None:
        class Cancels(Memory):
            probes = 0

            def probe(self) -> None:
                self.probes += 1
                if self.probes == 1:
                    raise asyncio.CancelledError

        store = Cancels()
        health.failed(store, BackendError("down"), monotonic())
        assert wait_until(lambda: store.failure is None)
        assert store.probes == 2

    def test_a_log_handler_that_raises_does_not_keep_it_open(self, heard: list[str]) -> None:
        class Full(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                raise OSError("the disk is full")

        handler, store = Full(), Memory()
        logger = logging.getLogger("django_concurrency_mw")
        logger.addHandler(handler)
        try:
            health.failed(store, BackendError("down"), monotonic())
            assert wait_until(lambda: heard == ["fails", "works"])
        finally:
            logger.removeHandler(handler)
        assert store.failure is None

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.parametrize("moment", ["before it is noted", "after it is noted", "when the thread starts"])
    def test_a_child_forked_in_the_middle_of_a_failure(self, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another thread forks while this one notes the failure: in the child nobody would ever close the breaker."""
        store = Memory()
        children: list[int] = []
        forked = threading.Event()

        def child() -> None:
            signal.alarm(5)  # a lock that nobody gives back
            code = 1
            try:
                if store.failure is None:
                    health.failed(store, BackendError("down"), monotonic())
                    code = 0 if wait_until(lambda: store.failure is None) else 2
            finally:
                os._exit(code)

        def fork() -> None:
            pid = os.fork()
            if pid == 0:
                child()
            children.append(pid)

        def fork_elsewhere(now: str) -> None:
            if now == moment and not forked.is_set():
                forked.set()  # before the fork: the child must have no child of its own
                thread = threading.Thread(target=fork, name="forks")
                thread.start()
                thread.join()

        class Probes(weakref.WeakKeyDictionary[BaseBackend, threading.Thread]):
            def __setitem__(self, store: BaseBackend, thread: threading.Thread) -> None:
                fork_elsewhere("before it is noted")
                super().__setitem__(store, thread)
                fork_elsewhere("after it is noted")

        class Probe(threading.Thread):
            def start(self) -> None:
                if self.name == "concurrency-probe":
                    fork_elsewhere("when the thread starts")
                super().start()

        monkeypatch.setattr(health, "_probes", Probes())
        monkeypatch.setattr(threading, "Thread", Probe)
        health.failed(store, BackendError("down"), monotonic())
        assert exit_code(children[0]) == 0
        assert wait_until(lambda: store.failure is None)

    def test_a_failure_is_told_before_the_recovery(self, heard: list[str]) -> None:
        """Also where all of the process's sync code waits, or the client whose request found it leaves."""

        class FailsOnce(Memory):
            def take(self, slots: Sequence[Slot]) -> TakeReply:
                if slots[0].policy != "!probe":
                    raise BackendError("once")
                return super().take(slots)

        def busy(go: threading.Event) -> Awaitable[Any]:
            return asyncio.ensure_future(sync_to_async(go.wait, thread_sensitive=True)(SOON))

        async def main() -> None:
            for leaves in (False, True):
                go, store = threading.Event(), FailsOnce()
                heard.clear()
                waiting = busy(go)
                request = asyncio.ensure_future(drivers.arun(steps(store, policy(), Lease(), new_token(), "allow")))
                while store.failure is None and not heard:
                    await asyncio.sleep(0)
                if leaves:
                    request.cancel()
                assert await await_until(lambda: len(heard) == 2)
                assert heard == ["fails", "works"]
                go.set()
                await waiting
                await asyncio.gather(request, return_exceptions=True)

        run_async(main)

    def test_a_failure_from_before_the_recovery_does_not_open_it_again(self) -> None:
        class Slow(Hangs):
            began, fail = threading.Event(), threading.Event()

            def take(self, slots: Sequence[Slot]) -> TakeReply:
                self.began.set()
                self.fail.wait(SOON)
                raise BackendError("no answer in time")

        store = Slow()
        waits = threading.Thread(target=enter, args=(store, policy(), "allow"))
        waits.start()
        assert store.began.wait(SOON)
        health.failed(store, BackendError("the first of them"), monotonic())
        store.go.set()
        assert wait_until(lambda: store.failure is None)
        store.go.clear()  # were it opened again, it would stay so
        store.fail.set()
        waits.join()
        assert store.failure is None
        health.failed(store, BackendError("news"), monotonic())
        assert store.failure is not None


def test_a_garbage_collection_may_ask_while_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends a stream whose clean-up enters something limited, in the thread that counts."""
    store, inner = Memory(), []
    store.down = True

    def stream() -> Generator[bytes]:
        try:
            yield b"x"
        finally:
            inner.append(enter(store, policy("inner")))

    def leave_garbage() -> None:
        unfinished = stream()
        next(unfinished)
        cycle: list[Any] = [unfinished]
        cycle.append(cycle)

    real = stand_ins._all_held
    marks: list[int] = []

    def collecting() -> Iterator[Held]:
        gc.collect()
        marks.append(len(stand_ins.being_counted))
        return real()

    enter(store, policy("first"))
    monkeypatch.setattr(stand_ins, "_all_held", collecting)
    outer: list[tuple[Lease, Verdict]] = []
    gc.disable()  # nobody else's collection may come first
    leave_garbage()
    counts = threading.Thread(target=lambda: outer.append(enter(store, policy("outer"))), daemon=True)
    try:
        counts.start()
        counts.join(SOON)
    finally:
        gc.enable()
    assert not counts.is_alive()
    assert [state(verdict) for _, verdict in inner + outer] == ["local", "local"]
    assert marks == [2, 1]  # whoever still counts is still seen to
    for lease, _ in inner + outer:
        lease.release()


class TestChecks:
    """What a server withholds is said before the first request."""

    @pytest.mark.parametrize("command", ["ZCARD", "PTTL"])
    def test_a_command_that_is_renamed_inside_scripts(self, command: str, connect: Connect) -> None:
        server = RedisServer("--rename-command", command, "")
        try:
            (said,) = connect(url=server.url).check()
            assert said.id == "django_concurrency_mw.E005"
            assert "do not rename" in str(said.hint)
        finally:
            server.stop()

    def test_a_connection_that_may_not_ask_who_it_is(self, connect: Connect, redis_server: RedisServer) -> None:
        assert connect().check() == []
        with redis_server.client() as client:
            client.execute_command("ACL", "SETUSER", "nobody", "on", ">pw", "~*", "+@all", "-client")
            try:
                (said,) = connect(url=f"redis://nobody:pw@127.0.0.1:{redis_server.port}/0").check()
            finally:
                client.execute_command("ACL", "DELUSER", "nobody")
        assert said.id == "django_concurrency_mw.W007"
        assert "+client|info" in str(said.hint)

"""The wait in an acquisition, through both drivers: who waits, for how long, what it holds meanwhile, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from queue import SimpleQueue
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from django.test import RequestFactory

from django_concurrency_mw import drivers
from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.base import Waiter
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.claiming import _as_new
from django_concurrency_mw.effects import Enter, Queue, Steps, Take, Wait
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.handover import unpack
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Asked, KeyMissing, Queued, QueueReply, Slot, Verdict
from django_concurrency_mw.steps import OnError, acquire
from django_concurrency_mw.tokens import new_token

from .chaos import LONG
from .support import wait_until
from .test_steps import BACKENDS, Drive, Unreliable, asked, drive, states

__all__ = ["drive"]

CLASSES: dict[str, type[BaseBackend]] = {"memory": MemoryBackend, "host": HostBackend, "redis": RedisBackend}
WAITING = [name for name in BACKENDS if CLASSES[name].supports_wait]
#: Seconds that nobody waits to the end.
LONGER = 30.0


class Faulty(Unreliable):
    """A store over another one, whose questions in line can be made to fail: by their number, from 1 on."""

    supports_wait: ClassVar[bool] = True

    def __init__(self, inner: BaseBackend) -> None:
        super().__init__(inner, local=True)
        self.cancel_safe = inner.cancel_safe  # type: ignore[misc]  # that of the one it stands before
        self.questions = count(1)
        self.queued = 0
        #: number -> the moment at which that question fails
        self.failing: dict[int, str] = {}
        self.error: BaseException = BackendError("down")
        #: Seconds after which a question is asked again at the latest: sooner than else, as tests have no time.
        self.again = 0.03

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        when = self._when()
        self._fail(when == "before")
        reply = self.inner.queue(slots, most, bell)
        self._fail(when == "after")
        return self._sooner(reply)

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        when = self._when()
        self._fail(when == "before")
        reply = await self.inner.aqueue(slots, most, bell)
        self._fail(when == "after")
        return self._sooner(reply)

    def _sooner(self, reply: QueueReply) -> QueueReply:
        return replace(reply, again=min(self.again, reply.again)) if isinstance(reply, Queued) else reply

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bool:
        return self.inner.claim(slots)

    def bell(self) -> Bell:
        return self.inner.bell()

    def abell(self) -> Bell:
        return self.inner.abell()

    def waiters(self) -> Sequence[Waiter]:
        return self.inner.waiters()

    def _when(self) -> str | None:
        self.queued += 1
        when = self.failing.get(next(self.questions))
        if when == "known":
            self.failure = BackendError("known to be down")
            self.fails = "before"
            raise BackendError("down")
        return when

    def _fail(self, now: bool) -> None:
        if now:
            raise self.error


class Line:
    """A store, and requests that ask it for slots, here or in a thread of their own."""

    def __init__(self, drive: Drive, store: BaseBackend) -> None:
        self.drive, self.store = drive, Faulty(store)
        self.is_threaded = drive is drivers.run
        self.leases: list[Lease] = []
        self._pool = ThreadPoolExecutor(16)
        self._others: list[Faulty] = []

    def steps(
        self,
        *entries: Asked | KeyMissing,
        lease: Lease,
        on_error: OnError = "local",
        threads: int | None = 16,
        private_loop: bool = False,
    ) -> Steps[Verdict]:
        token = new_token()
        stores = {"near": self.store, **{f"other{n}": store for n, store in enumerate(self._others)}}
        verdict = yield from acquire(entries, stores, lease, token, "/", on_error, threads, private_loop)
        if verdict.rejected_by is not None:
            yield from lease.steps_to_give(token)
        return verdict

    def ask(self, *entries: Asked | KeyMissing, lease: Lease | None = None, **options: Any) -> Verdict:
        verdict: Verdict = self.drive(self.steps(*entries, lease=self._lease(lease), **options))
        return verdict

    def asks(self, *entries: Asked | KeyMissing, lease: Lease | None = None, **options: Any) -> Future[Verdict]:
        """In a thread of its own."""
        return self._pool.submit(self.drive, self.steps(*entries, lease=self._lease(lease), **options))

    def waits(self, *entries: Asked | KeyMissing, **options: Any) -> Future[Verdict]:
        """The same; it stands in line when this returns."""
        before = self.in_line()
        waiting = self.asks(*entries, **options)
        assert wait_until(lambda: self.in_line() > before or waiting.done())
        assert not waiting.done(), waiting.result()
        return waiting

    def in_line(self) -> int:
        return len({waiter.token for waiter in self.store.waiters()})

    def held(self) -> list[str]:
        return sorted(holder.policy for holder in self.store.snapshot())

    def another(self, store: BaseBackend) -> None:
        self._others.append(Faulty(store))

    def holds(self, *entries: Asked) -> Lease:
        lease = self._lease(None)
        assert self.ask(*entries, lease=lease).rejected_by is None
        return lease

    def end(self) -> None:
        for store in [self.store, *self._others]:
            store.fails = store.failure = None
        for lease in self.leases:
            lease.give_up()
        self._pool.shutdown()
        for lease in self.leases:
            self.drive(lease.steps_to_give())
        keeper._retry(0)
        assert wait_until(lambda: self.held() == [] and self.in_line() == 0, 5), (self.held(), self.store.waiters())
        assert len(drivers._waiting) == 0, "a place was not given back"

    def _lease(self, lease: Lease | None) -> Lease:
        lease = Lease(RequestFactory().get("/")) if lease is None else lease
        self.leases.append(lease)
        return lease


@pytest.fixture(params=WAITING)
def line(request: pytest.FixtureRequest, drive: Drive) -> Iterator[Line]:
    line = Line(drive, BACKENDS[request.param](request))
    yield line
    line.end()


@pytest.fixture(params=WAITING)
def threads_line(request: pytest.FixtureRequest) -> Iterator[Line]:
    """Where it takes time, and one driver is as good as the other."""
    line = Line(drivers.run, BACKENDS[request.param](request))
    yield line
    line.end()


@pytest.fixture
def memory_line(request: pytest.FixtureRequest, drive: Drive) -> Iterator[Line]:
    """Where it is the steps' or the drivers' own doing."""
    line = Line(drive, BACKENDS["memory"](request))
    yield line
    line.end()


def reason(verdict: Verdict) -> str | None:
    return None if verdict.concurrency.rejection is None else verdict.concurrency.rejection.reason


# -- who waits, and for how long --------------------------------------------------------------------------------------


def test_a_waiter_is_admitted_after_a_release_and_knows_how_long_it_waited(line: Line) -> None:
    line.store.again = LONGER
    holder = line.holds(asked("a", wait=LONGER))
    began = monotonic()
    waiting = line.waits(asked("a", wait=LONGER))
    sleep(0.05)
    line.drive(holder.steps_to_give())
    verdict = waiting.result(15)
    assert states(verdict) == [("a", "held", 1)]
    assert 0.05 <= verdict.concurrency.waited <= monotonic() - began
    assert verdict.concurrency.waited < LONGER / 2, "it was woken, and not only timed out"
    assert line.held() == ["a"]


def test_who_finds_room_does_not_wait_and_asks_once(line: Line) -> None:
    verdict = line.ask(asked("a", wait=LONGER))
    assert (states(verdict), verdict.concurrency.waited) == ([("a", "held", 1)], 0.0)
    assert line.store.queued == 0


def test_its_time_is_over_after_wait(line: Line) -> None:
    line.holds(asked("a"))
    began = monotonic()
    verdict = line.ask(asked("a", wait=0.1))
    rejection = verdict.concurrency.rejection
    assert rejection is not None
    assert (rejection.reason, rejection.policy, rejection.limit, rejection.in_flight) == ("wait_timeout", "a", 1, 1)
    assert rejection.status == 429
    assert 0.1 <= verdict.concurrency.waited <= monotonic() - began
    assert verdict.fields == (("a", 1, 0),)
    assert states(verdict) == [("a", "over", 1)]
    assert (line.held(), line.in_line()) == (["a"], 0)


def test_the_shortest_wait_of_those_that_are_full_counts(line: Line) -> None:
    line.holds(asked("a"), asked("b"))
    verdict = line.ask(asked("a", wait=LONGER), asked("b", wait=0.05), asked("free", wait=0.01))
    rejection = verdict.concurrency.rejection
    assert rejection is not None
    assert (rejection.reason, rejection.policy, rejection.violated) == ("wait_timeout", "a", ("a", "b"))
    assert verdict.concurrency.waited < LONGER / 2
    assert verdict.fields == (("a", 1, 0), ("b", 1, 0), ("free", 1, 1))


def test_the_wait_of_what_is_free_does_not_count(line: Line) -> None:
    holder = line.holds(asked("a"))
    waiting = line.waits(asked("a", wait=LONGER), asked("short", wait=0.01), asked("none"))
    sleep(0.1)
    assert not waiting.done()
    line.drive(holder.steps_to_give())
    assert [state for _, state, _ in states(waiting.result(15))] == ["held"] * 3


def test_one_without_wait_that_becomes_full_meanwhile_ends_it(line: Line) -> None:
    line.holds(asked("a"))
    waiting = line.waits(asked("a", wait=LONGER), asked("none"))
    line.holds(asked("none"))
    verdict = waiting.result(15)
    assert reason(verdict) == "full", "found out with its next question, long before its time is over"
    assert verdict.concurrency.rejection is not None
    assert verdict.concurrency.rejection.violated == ("a", "none")
    assert 0 < verdict.concurrency.waited < LONGER / 2


def test_one_that_is_full_and_has_no_wait_rejects_at_once(line: Line) -> None:
    line.holds(asked("a"), asked("b"))
    verdict = line.ask(asked("a", wait=LONGER), asked("b"))
    assert reason(verdict) == "full"
    assert verdict.concurrency.waited == 0.0
    assert line.store.queued == 0


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([asked("closed", 0, wait=LONGER)], "full"),
        ([asked("a", wait=LONGER), asked("closed", 0, wait=LONGER)], "full"),
        ([Asked(asked("dear", 2, wait=LONGER).policy, asked("dear").key, 2, 3)], "cost_above_limit"),
    ],
    ids=["a limit of 0", "beside one that may", "a cost above the limit"],
)
def test_what_waiting_cannot_help_is_not_waited_for(memory_line: Line, entries: list[Asked], why: str) -> None:
    memory_line.holds(asked("a"))
    verdict = memory_line.ask(*entries)
    assert verdict.concurrency.rejection is not None
    assert (reason(verdict), verdict.concurrency.rejection.retry_after) == (why, None)
    assert memory_line.store.queued == 0


def test_nobody_waits_where_one_thread_serves_all(memory_line: Line) -> None:
    memory_line.holds(asked("a"))
    assert reason(memory_line.ask(asked("a", wait=LONGER), threads=None)) == "full"
    assert memory_line.store.queued == 0


def test_a_request_with_policies_on_several_stores_never_waits(memory_line: Line, request: Any) -> None:
    """Whoever holds a slot of one store would keep it from others while it stands in line at another."""
    memory_line.another(BACKENDS["memory"](request))
    memory_line.holds(asked("a"))
    for beside in (asked("b", backend="other0"), asked("b", backend="other0", block=False)):
        verdict = memory_line.ask(asked("a", wait=LONGER), beside)
        assert reason(verdict) == "full"
        assert verdict.concurrency.waited == 0.0
    memory_line.holds(asked("c", backend="other0"))
    assert reason(memory_line.ask(asked("b"), asked("c", backend="other0", wait=LONGER))) == "full"
    assert memory_line.held() == ["a"]
    assert memory_line.store.queued == 0


def test_a_request_that_holds_a_slot_of_another_store_from_further_out_does_not_wait_either(
    line: Line, request: Any
) -> None:
    line.another(BACKENDS["memory"](request))
    full = line.holds(asked("a"))
    for further_out in (asked("c", backend="other0"), asked("c", backend="other0", block=False)):
        outer = line.holds(further_out)
        verdict = line.ask(asked("a", wait=LONGER), lease=outer)
        assert (reason(verdict), verdict.concurrency.waited) == ("full", 0.0)
        line.drive(outer.steps_to_give())
    assert line.store.queued == 0
    for lease in (outer, line.holds(asked("b"))):  # nothing any more, and something in the same store
        waiting = line.waits(asked("a", wait=LONGER), lease=lease)
        line.drive(full.steps_to_give())
        assert waiting.result(15).rejected_by is None
        full = lease


def test_who_waits_keeps_the_limit_it_asked_with_and_a_newcomer_stands_behind(threads_line: Line) -> None:
    """After a raise nobody of the line is asked anew, and who has the new limit comes in when it is first."""
    line = threads_line
    holder = line.holds(asked("a", 1))
    first, second = (line.waits(asked("a", 1, wait=LONGER)) for _ in range(2))
    newcomers = [line.waits(asked("a", 3, wait=LONGER)) for _ in range(2)]
    line.drive(holder.steps_to_give())
    assert first.result(15).rejected_by is None
    assert not any(one.done() for one in (second, *newcomers))
    assert line.in_line() == 3
    first.result().concurrency.release()
    assert all(one.result(15).rejected_by is None for one in (second, *newcomers))
    assert line.held() == ["a"] * 3


def test_after_a_cut_those_in_line_come_in_by_the_old_limit(threads_line: Line) -> None:
    line = threads_line
    holder = line.holds(asked("a", 2))
    other = line.holds(asked("a", 2))
    waiting, newcomer = line.waits(asked("a", 2, wait=LONGER)), line.waits(asked("a", 1, wait=LONGER))
    line.drive(holder.steps_to_give())
    assert waiting.result(15).rejected_by is None
    line.drive(other.steps_to_give())
    assert not newcomer.done()
    assert (line.held(), line.in_line()) == (["a"], 1)
    waiting.result().concurrency.release()
    assert newcomer.result(15).rejected_by is None


# -- the line is bounded --------------------------------------------------------------------------------------------------


def test_the_line_of_a_key_has_room_for_max_waiting(line: Line) -> None:
    holder = line.holds(asked("a"))
    waiting = [line.waits(asked("a", wait=LONGER, max_waiting=2)) for _ in range(2)]
    verdict = line.ask(asked("a", wait=LONGER, max_waiting=2))
    rejection = verdict.concurrency.rejection
    assert rejection is not None
    assert (rejection.reason, rejection.in_flight, rejection.violated) == ("queue_full", 1, ("a",))
    assert verdict.fields == (("a", 1, 0),)
    assert verdict.concurrency.waited < LONGER / 2
    assert line.in_line() == 2
    assert line.ask(asked("a", key="another", wait=LONGER, max_waiting=2)).rejected_by is None
    line.drive(holder.steps_to_give())
    assert wait_until(lambda: any(one.done() for one in waiting))


def test_a_line_without_room_is_a_full_one(line: Line) -> None:
    line.holds(asked("a"))
    assert reason(line.ask(asked("a", wait=LONGER, max_waiting=0))) == "queue_full"


def test_of_threads_so_many_may_wait_and_of_coroutines_any_number(memory_line: Line) -> None:
    memory_line.holds(asked("a"))
    memory_line.waits(asked("a", wait=LONGER), threads=2)
    memory_line.waits(asked("a", wait=LONGER), threads=2)
    if memory_line.is_threaded:
        verdict = memory_line.ask(asked("a", wait=LONGER), threads=2)
        assert (reason(verdict), verdict.concurrency.waited) == ("queue_full", 0.0)
        assert memory_line.in_line() == 2
    else:
        memory_line.waits(asked("a", wait=LONGER), threads=2)
        assert memory_line.in_line() == 3


def test_a_coroutine_counts_where_its_loop_keeps_a_thread(line: Line) -> None:
    line.holds(asked("a"))
    waiting = line.waits(asked("a", wait=LONGER), threads=1, private_loop=True)
    verdict = line.ask(asked("a", wait=LONGER), threads=1, private_loop=True)
    assert (reason(verdict), verdict.concurrency.waited) == ("queue_full", 0.0)
    line.leases[-2].give_up()
    waiting.result(15)
    assert reason(line.ask(asked("a", wait=0.01), threads=1, private_loop=True)) == "wait_timeout"


def test_where_no_more_may_wait_no_bell_is_made(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may cost a socket."""
    line.holds(asked("a"))
    made: list[str] = []
    for name in ("bell", "abell"):
        monkeypatch.setattr(line.store, name, lambda: made.append("one"))
    assert reason(line.ask(asked("a", wait=LONGER), threads=0, private_loop=True)) == "queue_full"
    assert made == []


def test_no_thread_may_wait_where_the_setting_is_0(memory_line: Line) -> None:
    memory_line.holds(asked("a"))
    verdict = memory_line.ask(asked("a", wait=0.01), threads=0)
    assert reason(verdict) == ("queue_full" if memory_line.is_threaded else "wait_timeout")


class TestAPlaceIsGivenBack:
    """Of the few threads that may wait. One that leaked would lock out all, sooner or later."""

    @pytest.fixture
    def full(self, request: pytest.FixtureRequest) -> Iterator[Line]:
        line = Line(drivers.run, BACKENDS["memory"](request))
        line.holds(asked("a"))
        yield line
        line.end()

    def may_wait(self, line: Line) -> bool:
        return reason(line.ask(asked("a", wait=0.01), threads=1)) == "wait_timeout"

    def test_after_a_time_out_a_grant_and_a_rejection(self, full: Line) -> None:
        assert self.may_wait(full)
        assert reason(full.ask(asked("a", wait=LONGER, max_waiting=0), threads=1)) == "queue_full"
        waiting = full.waits(asked("a", wait=LONGER), threads=1)
        full.drive(full.leases[0].steps_to_give())
        assert waiting.result(15).rejected_by is None
        assert self.may_wait(full)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, GeneratorExit])
    @pytest.mark.parametrize("where", ["bell", "queue", "enter", "made"])
    def test_after_whatever_comes_in_the_middle(
        self, full: Line, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], where: str
    ) -> None:
        def raises(*arguments: Any) -> Any:
            raise error("in the middle")

        if where == "queue":
            full.store.failing, full.store.error = {1: "after"}, error("in the middle")
        elif where == "bell":
            monkeypatch.setattr(Bell, "wait", raises)
        elif where == "made":
            monkeypatch.setattr(full.store, "bell", lambda: SimpleNamespace(at_close=raises))
        else:
            # A signal's handler, say, just when the place was taken.
            enter = drivers._enter
            monkeypatch.setitem(drivers._SYNC, Enter, lambda effect: raises(enter(effect)))
        lease = Lease(RequestFactory().get("/"))
        if where == "queue" and issubclass(error, Exception):
            full.ask(asked("a", wait=LONGER), threads=1, lease=lease)
        else:
            with pytest.raises(error):
                full.ask(asked("a", wait=LONGER), threads=1, lease=lease)
        lease.release()
        monkeypatch.undo()
        keeper._retry(0)
        gc.collect()
        assert full.in_line() == 0
        assert self.may_wait(full)

    def test_after_steps_that_nobody_drives_any_more(self, full: Line) -> None:
        lease = Lease(RequestFactory().get("/"))
        for effects in range(1, 5):
            steps = full.steps(asked("a", wait=LONGER), lease=lease, threads=1)
            effect = next(steps)
            for _ in range(effects - 1):
                reply = drivers._SYNC[type(effect)](effect) if type(effect) is not Wait else None
                effect = steps.send(reply)
            steps.close()
            lease.release()
            assert full.in_line() == 0
            assert self.may_wait(full)


def test_a_thread_that_runs_an_event_loop_does_not_wait(memory_line: Line) -> None:
    """Everybody there would wait with it, those included who could give a slot back."""
    memory_line.holds(asked("a"))

    async def main() -> Verdict:
        return drivers.run(memory_line.steps(asked("a", wait=LONGER), lease=Lease()))

    verdict = asyncio.run(main())
    assert (reason(verdict), verdict.concurrency.waited) == ("full", 0.0), "as `wait` were 0"


# -- what it holds meanwhile --------------------------------------------------------------------------------------------


def test_who_waits_for_one_holds_nothing_of_the_others(line: Line) -> None:
    holder = line.holds(asked("b"))
    waiting = line.waits(asked("a", wait=LONGER), asked("b", wait=LONGER), asked("shadow", block=False))
    assert line.held() == ["b"]
    other = line.holds(asked("a"))
    line.drive(other.steps_to_give())
    line.drive(holder.steps_to_give())
    assert waiting.result(15).rejected_by is None
    assert line.held() == ["a", "b", "shadow"]


def test_a_shadow_policy_beside_it_neither_makes_it_wait_nor_ends_the_wait(line: Line) -> None:
    holder = line.holds(asked("a"), asked("s", block=False))
    line.holds(asked("t", block=False))
    waiting = line.waits(asked("s", block=False), asked("t", block=False), asked("a", wait=LONGER))
    line.drive(holder.steps_to_give())
    assert [state for _, state, _ in states(waiting.result(15))] == ["held", "over", "held"]
    line.ask(asked("t", block=False), asked("u", wait=LONGER))
    assert line.held() == ["a", "s", "t", "u"]


def test_what_an_earlier_step_of_the_request_holds_stays(line: Line) -> None:
    lease = Lease(RequestFactory().get("/"))
    line.ask(asked("outer"), lease=lease)
    holder = line.holds(asked("inner"))
    waiting = line.waits(asked("inner", wait=LONGER), lease=lease)
    assert line.held() == ["inner", "outer"]
    line.drive(holder.steps_to_give())
    assert waiting.result(15).rejected_by is None
    holder = line.holds(asked("other"))
    assert reason(line.ask(asked("other", wait=0.01), lease=lease)) == "wait_timeout"
    assert line.held() == ["inner", "other", "outer"], "only its own step is given back"


# -- the lease begins with the grant ---------------------------------------------------------------------------------------


def test_the_lease_and_the_age_begin_when_it_is_granted(threads_line: Line) -> None:
    """Not when it asked: else it would be renewed too late, and be too old too soon."""
    line = threads_line
    holder = line.holds(asked("a"))
    lease = Lease(RequestFactory().get("/"))
    waiting = line.waits(asked("a", wait=LONGER, ttl=6.0, max_age=100.0), lease=lease)
    (waits,) = lease.holdings()
    arrived = waits.since
    assert not waits.confirmed, "not renewed, and not counted, while it waits"
    sleep(0.4)
    line.drive(holder.steps_to_give())
    waiting.result(15)
    (held,) = lease.holdings()
    assert arrived + 0.1 < held.since <= monotonic(), "not before the question before the one that was answered"
    assert held.ends == pytest.approx(held.since + 6.0)
    assert held.due == pytest.approx(held.since + 2.0)
    assert held.last == pytest.approx(held.since + 100.0)
    assert held.slot.waited == pytest.approx(held.since - arrived)
    assert keeper.wakes_at <= held.due


def test_who_waits_longer_than_its_lease_is_held_for_all_of_it(threads_line: Line) -> None:
    line = threads_line
    holder = line.holds(asked("a"))
    lease = Lease(RequestFactory().get("/"))
    waiting = line.waits(asked("a", wait=LONGER, ttl=0.6, renew=False), lease=lease)
    sleep(0.7)
    line.drive(holder.steps_to_give())
    assert waiting.result(15).rejected_by is None
    (held,) = line.store.snapshot()
    assert held.policy == "a"
    (mine,) = lease.holdings()
    assert mine.ends > monotonic() - 0.6
    assert line.held() == ["a"]
    assert wait_until(lambda: line.held() == [])


def test_what_it_hands_over_is_as_old_as_its_grant(memory_line: Line) -> None:
    """With `renew: false` it would else be too old to be claimed."""
    holder = memory_line.holds(asked("a"))
    lease = Lease(RequestFactory().get("/"))
    waiting = memory_line.waits(asked("a", wait=LONGER, ttl=0.5, renew=False), lease=lease)
    sleep(0.6)
    memory_line.drive(holder.steps_to_give())
    verdict = waiting.result(15)
    assert verdict.rejected_by is None
    ((policy, slot),) = unpack(verdict.concurrency.hand_over()).slots
    assert _as_new(policy, slot).ttl > 0
    assert not lease
    memory_line.store.give([slot])


def test_release_gives_back_what_was_waited_for_and_lets_the_next_one_in(line: Line) -> None:
    holder = line.holds(asked("a"))
    first = line.waits(asked("a", wait=LONGER))
    second = line.waits(asked("a", wait=LONGER))
    line.drive(holder.steps_to_give())
    first.result(15).concurrency.release()
    second.result(15).concurrency.release()
    assert line.held() == []


def test_a_lease_that_is_ended_while_it_waits_gets_nothing_any_more(line: Line) -> None:
    """From another thread, such as the keeper's where the event loop has ended. What is granted then would be nobody's."""
    holder = line.holds(asked("a"))
    lease = Lease(RequestFactory().get("/"))
    waiting = line.waits(asked("a", wait=LONGER), lease=lease)
    line.drive(lease.steps_to_give())
    assert wait_until(lambda: line.in_line() == 0)
    line.drive(holder.steps_to_give())
    waiting.result(15)
    assert line.held() == []


def test_whoever_is_told_that_nobody_waits_for_it_any_more_leaves_at_once(line: Line) -> None:
    """A sync view's thread, whose client has left."""
    line.holds(asked("a"))
    lease = Lease(RequestFactory().get("/"))
    waiting = line.waits(asked("a", wait=LONGER), lease=lease)
    lease.give_up()
    assert reason(waiting.result(15)) == "wait_timeout"
    assert line.in_line() == 0
    began = line.store.queued
    assert line.ask(asked("a", wait=LONGER), lease=lease).rejected_by is not None
    assert line.store.queued == began, "it does not join again"


# -- the store fails ------------------------------------------------------------------------------------------------------

WHEN = {
    "before it joined": {1: "before"},
    "just when it joined": {1: "after"},
    "known to fail before it joined": {1: "known"},
    "before its second question": {2: "before"},
    "after its second question": {2: "after"},
}


@pytest.mark.parametrize("when", WHEN.values(), ids=WHEN)
class TestTheStoreFails:
    """`after`: it did what it was asked, and only its answer was lost."""

    def fails(self, line: Line, when: dict[int, str], mode: OnError, **fields: Any) -> Verdict:
        line.holds(asked("a", 2))
        line.holds(asked("a", 2))
        line.store.failing = dict(when)
        waiting = line.asks(asked("a", 2, wait=5.0, **fields), on_error=mode)
        verdict = waiting.result(15)
        assert not line.store.failing or line.store.queued == max(when), "it went on waiting at a store that fails"
        return verdict

    def nothing_is_left(self, line: Line) -> None:
        line.store.fails = line.store.failure = None
        with keeper.at_work():
            keeper._retry(0)
        assert line.held() == ["a", "a"]
        assert line.in_line() == 0, "its place would only be lost after a while"

    def test_allow_lets_in_without_a_slot(self, line: Line, when: dict[int, str]) -> None:
        assert states(self.fails(line, when, "allow")) == [("a", "unprotected", None)]
        self.nothing_is_left(line)

    def test_deny_rejects(self, line: Line, when: dict[int, str]) -> None:
        rejection = self.fails(line, when, "deny").concurrency.rejection
        assert rejection is not None
        assert (rejection.reason, rejection.status) == ("backend_unavailable", 503)
        self.nothing_is_left(line)

    def test_local_counts_here(self, memory_line: Line, when: dict[int, str]) -> None:
        verdict = self.fails(memory_line, when, "local")
        assert (reason(verdict), states(verdict)) == ("full", [("a", "over", 2)])
        self.nothing_is_left(memory_line)

    def test_a_policys_own_word_goes_first(self, memory_line: Line, when: dict[int, str]) -> None:
        assert reason(self.fails(memory_line, when, "allow", on_backend_error="deny")) == "backend_unavailable"
        self.nothing_is_left(memory_line)


def test_a_store_known_to_fail_is_asked_nothing_and_what_stood_in_line_is_given_back(line: Line) -> None:
    """Later, as it fails."""
    line.holds(asked("a"))
    waiting = line.waits(asked("a", wait=LONGER))
    line.store.failure = BackendError("known by others")
    line.store.fails = "before"
    asked_before = line.store.queued
    assert reason(waiting.result(15)) == "full", "by this process's own count"
    assert line.store.queued == asked_before
    assert any(debt.store is line.store for debt in list(keeper._owed)), "its place would only be lost after a while"
    line.store.fails = line.store.failure = None
    with keeper.at_work():
        keeper._retry(0)
    assert line.held() == ["a"]
    assert line.in_line() == 0


def test_what_may_have_been_granted_is_owed_for_a_whole_lease(memory_line: Line) -> None:
    """Though the time in line was longer than that: it may have been granted just now."""
    holder = memory_line.holds(asked("a"))
    memory_line.store.again = 0.5
    memory_line.store.failing = {3: "after"}
    waiting = memory_line.waits(asked("a", wait=LONGER, ttl=0.5), on_error="allow")
    sleep(0.7)
    memory_line.store.fails = "before"
    owed = len(keeper._owed)
    memory_line.store.inner.give([held.slot for held in holder.holdings()])
    assert states(waiting.result(15)) == [("a", "unprotected", None)]
    assert wait_until(lambda: len(keeper._owed) > owed), "nobody would give it back"
    assert keeper._owed[-1].until > monotonic()
    memory_line.store.fails = None


@pytest.mark.parametrize("error", [NotImplementedError("no line here"), ValueError("a bug"), BackendError("down")])
def test_a_store_whose_queue_raises_is_one_that_fails(memory_line: Line, error: Exception) -> None:
    memory_line.holds(asked("a"))
    memory_line.store.failing, memory_line.store.error = {1: "before"}, error
    assert states(memory_line.ask(asked("a", wait=LONGER), on_error="allow")) == [("a", "unprotected", None)]


def test_a_store_that_has_no_bell_to_give_is_asked_again_after_a_while(
    memory_line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: Any) -> Bell:
        raise OSError("no descriptor is left")

    holder = memory_line.holds(asked("a"))
    monkeypatch.setattr(Faulty, "bell", fails)
    monkeypatch.setattr(Faulty, "abell", fails)
    waiting = memory_line.waits(asked("a", wait=LONGER))
    memory_line.drive(holder.steps_to_give())
    assert waiting.result(15).rejected_by is None


# -- cut short --------------------------------------------------------------------------------------------------------------


class Scripted:
    """Drives steps by hand, and can stop at any effect."""

    def __init__(self, steps: Steps[Verdict]) -> None:
        self.steps = steps

    def until(self, number: int) -> bool:
        """Carry out so many effects; False where the steps have ended by then."""
        try:
            effect = next(self.steps)
            for _ in range(number):
                reply = None if type(effect) is Wait else drivers._SYNC[type(effect)](effect)
                effect = self.steps.send(reply)
        except StopIteration:
            return False
        return True


@pytest.mark.parametrize("granted", [False, True])
def test_closed_at_any_of_its_steps_it_leaves_nothing_behind(
    request: pytest.FixtureRequest, granted: bool, memory_line: Line
) -> None:
    """A coroutine that is closed, a cancel, a signal: nothing but the lease is left to give back."""
    for number in range(8):
        holder = memory_line.holds(asked("a"))
        lease = Lease(RequestFactory().get("/"))
        scripted = Scripted(memory_line.steps(asked("a", wait=LONGER), asked("b"), lease=lease))
        assert scripted.until(number)
        if granted:
            memory_line.drive(holder.steps_to_give())
        scripted.steps.close()
        memory_line.drive(lease.steps_to_give())
        assert memory_line.in_line() == 0, number
        memory_line.drive(holder.steps_to_give())
        assert memory_line.held() == [], number
        assert len(drivers._waiting) == 0


def test_the_steps_are_a_take_an_entrance_questions_and_waits(memory_line: Line) -> None:
    """As the tests that stop at each of them believe."""
    memory_line.holds(asked("a"))
    steps = memory_line.steps(asked("a", wait=LONGER), lease=memory_line._lease(None))
    seen: list[type] = []
    effect = next(steps)
    for _ in range(5):
        seen.append(type(effect))
        effect = steps.send(None if type(effect) is Wait else drivers._SYNC[type(effect)](effect))
    steps.close()
    assert seen == [Take, Enter, Queue, Wait, Queue]


@pytest.mark.parametrize("name", WAITING)
def test_a_cancel_ends_the_wait_at_once_wherever_it_comes(name: str, request: pytest.FixtureRequest) -> None:
    store = BACKENDS[name](request)
    line = Line(lambda steps: asyncio.run(drivers.arun(steps)), store)
    holder = line.holds(asked("a"))

    async def one() -> None:
        lease = Lease()
        try:
            await drivers.arun(line.steps(asked("a", wait=LONGER), lease=lease))
            await asyncio.sleep(LONGER)
        finally:
            await lease.arelease()

    async def main() -> None:
        tasks = [asyncio.create_task(one()) for _ in range(40)]
        for task in tasks:
            await asyncio.sleep(random.choice([0, 0, 0.002]))
            random.choice(tasks[: tasks.index(task) + 1]).cancel()
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        _, late = await asyncio.wait(tasks, timeout=15)
        assert not late

    asyncio.run(main())
    assert wait_until(lambda: line.in_line() == 0)
    assert line.held() == ["a"]
    line.drive(holder.steps_to_give())
    line.end()


class Slow(MemoryBackend):
    """A server of the project's that carries a question out 5 ms after it was sent, whoever has gone meanwhile."""

    cancel_safe: ClassVar[bool] = False

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[QueueReply] = loop.create_future()

        def carry_out() -> None:
            answer = self.queue(slots, most, bell)
            if not reply.done():
                reply.set_result(answer)

        loop.call_later(0.005, carry_out)
        return await reply

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return self.give(slots)


@pytest.mark.parametrize("after", [0.0, 0.003, 0.006, 0.02])
def test_of_a_store_that_is_not_safe_to_cancel_nothing_is_left_either(after: float) -> None:
    """The release is quicker than the question it belongs to."""
    store = Slow(BackendConfig("default", "memory"))
    line = Line(lambda steps: asyncio.run(drivers.arun(steps)), store)
    holder = line.holds(asked("a"))

    async def one() -> None:
        lease = Lease()
        try:
            await drivers.arun(line.steps(asked("a", wait=LONGER), lease=lease))
        finally:
            await lease.arelease()

    async def main() -> None:
        tasks = [asyncio.create_task(one()) for _ in range(20)]
        await asyncio.sleep(after)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=15)
        while drivers._tasks:
            await asyncio.sleep(0.005)

    asyncio.run(main())
    assert line.in_line() == 0
    line.drive(holder.steps_to_give())
    line.end()


RACES = 10_000 if LONG else 500


def races(ended: dict[str, int]) -> Iterator[int]:
    """So many, and more on a machine that was too busy for both to win."""
    for number in range(20 * RACES):
        if number >= RACES and min(ended.values()) > 0:
            break
        yield number
    print(ended)
    assert min(ended.values()) > 0, "no race at all"


def test_the_time_out_races_the_grant_in_threads(request: pytest.FixtureRequest) -> None:
    """Whoever wins, the slot is either the waiter's or free."""
    line = Line(drivers.run, BACKENDS["memory"](request))
    ended = {"granted": 0, "timed out": 0}
    releases: SimpleQueue[tuple[Lease, float] | None] = SimpleQueue()

    def release() -> None:
        while (due := releases.get()) is not None:
            lease, at = due
            sleep(max(0.0, at - monotonic()))
            lease.release()

    thread = threading.Thread(target=release)
    thread.start()
    try:
        for _ in races(ended):
            holder = Lease()
            assert drivers.run(line.steps(asked("a"), lease=holder)).rejected_by is None
            releases.put((holder, monotonic() + 0.001 + random.uniform(-0.0004, 0.0004)))
            mine = Lease()
            verdict = drivers.run(line.steps(asked("a", wait=0.001), lease=mine))
            ended["granted" if verdict.rejected_by is None else "timed out"] += 1
            mine.release()
            assert wait_until(lambda: not line.store.snapshot()), "a slot is lost"
            assert line.in_line() == 0
    finally:
        releases.put(None)
        thread.join()
        line.end()


def test_the_time_out_races_the_grant_on_a_loop(request: pytest.FixtureRequest) -> None:
    line = Line(drivers.run, BACKENDS["memory"](request))
    ended = {"granted": 0, "timed out": 0}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in races(ended):
            holder, mine = Lease(), Lease()
            assert (await drivers.arun(line.steps(asked("a"), lease=holder))).rejected_by is None
            released = loop.create_future()

            def give(holder: Lease = holder, released: Any = released) -> None:
                holder.release()
                released.set_result(None)

            loop.call_later(0.001 + random.uniform(-0.0004, 0.0004), give)
            verdict = await drivers.arun(line.steps(asked("a", wait=0.001), lease=mine))
            ended["granted" if verdict.rejected_by is None else "timed out"] += 1
            await mine.arelease()
            await released
            assert not line.store.snapshot(), "a slot is lost"
            assert line.in_line() == 0

    try:
        asyncio.run(main())
    finally:
        line.end()

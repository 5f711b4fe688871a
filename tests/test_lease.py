"""Leases are renewed while the request lives, end at max_age, and are given back exactly once."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

import pytest
from django.test import RequestFactory

from django_concurrency_mw import drivers, notices, signals
from django_concurrency_mw import held as held_module
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.bells import Bell
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.held import NEVER
from django_concurrency_mw.keeper import Keeper, keeper
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Asked, Slot, Taken
from django_concurrency_mw.policies import Policy
from django_concurrency_mw.renewals import renew
from django_concurrency_mw.steps import acquire
from django_concurrency_mw.tokens import new_token

from .support import SOON, exit_code, wait_until


class GreenletExit(BaseException):
    """As gevent's, of which asyncio knows nothing."""


class Counting(MemoryBackend):
    """Counts what it is asked to renew, and can refuse to."""

    fails = False
    supports_semaphores: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(BackendConfig("default", "memory"))
        self.renewals: list[list[float]] = []

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        self.renewals.append([seconds for _, seconds in slots])
        if self.fails:
            raise BackendError("down")
        return super().renew(slots)


@pytest.fixture
def store() -> Counting:
    return Counting()


@pytest.fixture
def renewed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of a minute, which no stall of a busy machine ends, are due for their renewal in a moment."""
    monkeypatch.setattr(held_module, "RENEW_AFTER", 0.1 / 60)


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    notices.forget()


def policy(name: str = "p", **fields: Any) -> Policy:
    return Policy(name, parse_key("global"), 5, **{"backend": "store", **fields})


def take(store: MemoryBackend, policy: Policy, into: Lease | None = None) -> Lease:
    held = Lease(RequestFactory().get("/")) if into is None else into
    entry = Asked(policy, make_key("k"), policy.max_concurrent)
    token = new_token()
    drivers.run(acquire([entry], {"store": store}, held, token, "/", "local"))
    held.announce(token)
    return held


def due(held: Lease) -> float:
    return held._held[0].due


class TestRenewal:
    def test_a_short_request_is_never_renewed(self, store: Counting) -> None:
        held = take(store, policy(ttl=60))
        assert due(held) - held._held[0].since == pytest.approx(20)
        assert renew([held], held._held[0].since + 19.9) == pytest.approx(due(held))
        assert store.renewals == []
        held.release()

    def test_a_long_one_is_renewed_at_a_third_of_its_ttl(self, store: Counting) -> None:
        held = take(store, policy(ttl=60))
        start = held._held[0].since
        assert renew([held], start + 20) == pytest.approx(start + 40)
        assert renew([held], start + 39) == pytest.approx(start + 40)
        assert renew([held], start + 40) == pytest.approx(start + 60)
        assert store.renewals == [[60], [60]]
        held.release()

    def test_the_first_of_several_that_is_due_is_looked_after(
        self, store: Counting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        watched: list[float] = []
        monkeypatch.setattr(keeper, "watch", lambda lease, due: watched.append(due))
        rules = [policy("a", ttl=30), policy("b", ttl=3), policy("c", ttl=60)]
        held = Lease()
        held.expect(store, rules, [Slot(one.name, make_key("k"), 5, one.ttl, "t") for one in rules])
        assert watched == [held.holdings()[1].due]

    def test_several_slots_of_one_store_are_one_call(self, store: Counting) -> None:
        held = take(store, policy("a"))
        take(store, policy("b"), held)
        renew([held], due(held) + 1)
        assert store.renewals == [[60, 60]]
        held.release()

    @pytest.mark.usefixtures("renewed_soon")
    def test_the_keeper_does_it_by_itself(self, store: Counting) -> None:
        """With the limit taken up: nobody else gets in."""
        held = take(store, policy(ttl=60))
        assert wait_until(lambda: len(store.renewals) >= 6)
        (holder,) = store.snapshot()
        assert holder.age + holder.lease_left > 60.2, "it ends later than it did"
        others = [Slot("p", make_key("k"), 1, 60, "other")]
        assert not isinstance(store.take(others), Taken)
        held.release()
        assert isinstance(store.take(others), Taken)

    def test_without_renew_the_slot_ends_at_its_ttl_and_the_late_release_warns_once(
        self, store: Counting, caplog: pytest.LogCaptureFixture
    ) -> None:
        leases = [take(store, policy(ttl=0.05, renew=False)) for _ in range(2)]
        assert wait_until(lambda: store.snapshot() == [])
        other = take(store, policy("p", ttl=60))
        for held in leases:
            assert due(held) == NEVER
            held.release()
        assert len(store.snapshot()) == 1, "a late release took somebody else's slot"
        (record,) = caplog.records
        assert "policy p" in record.getMessage()
        assert "Raise `ttl`" in record.getMessage()
        other.release()

    def test_a_renewal_that_fails_is_tried_again_and_soon(self, store: Counting) -> None:
        held = take(store, policy(ttl=3))
        start = held._held[0].since
        store.fails = True
        again = renew([held], start + 1)
        assert start + 1 < again <= start + 2
        store.fails = False
        assert wait_until(lambda: store.failure is None)
        renew([held], again)
        assert held._held[0].ends == pytest.approx(again + 3)
        held.release()

    def test_a_slot_that_is_gone_is_not_renewed_any_more(self, store: Counting) -> None:
        held = take(store, policy())
        store.evict(held._held[0].slot.token)
        assert renew([held], due(held)) == NEVER
        assert store.snapshot() == []
        held.release()


class TestMaxAge:
    def test_a_lease_ends_at_max_age_with_a_warning(self, store: Counting, caplog: pytest.LogCaptureFixture) -> None:
        held = take(store, policy(ttl=60, max_age=90))
        start = held._held[0].since
        renew([held], start + 20)
        renew([held], start + 40)
        assert [seconds for (seconds,) in store.renewals] == [60, pytest.approx(50)]
        assert held._held[0].ends == pytest.approx(start + 90)
        while (next_look := renew([held], due(held))) != NEVER:
            assert next_look <= start + 90
        assert len(store.renewals) == 2
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "max_age (90 s)" in caplog.text
        held.release()

    def test_null_is_never(self, store: Counting) -> None:
        held = take(store, policy(ttl=60, max_age=None))
        start = held._held[0].since
        assert renew([held], start + 10**6) == pytest.approx(start + 10**6 + 20)
        held.release()

    def test_a_max_age_below_the_ttl_is_the_lease(self, store: Counting) -> None:
        held = take(store, policy(ttl=60, max_age=2))
        assert store.snapshot()[0].lease_left == pytest.approx(2, abs=1.9)
        held.release()

    def test_a_lease_as_long_as_max_age_is_warned_of_only_when_it_is_over(
        self, store: Counting, caplog: pytest.LogCaptureFixture
    ) -> None:
        """`ttl: 1h` makes max_age as long by default; a request of 20 minutes is no reason to warn."""
        held = take(store, policy(ttl=3600, max_age=3600))
        start = held._held[0].since
        assert renew([held], start + 1200) == pytest.approx(start + 3600)
        assert caplog.records == []
        assert renew([held], start + 3600) == NEVER
        assert "max_age" in caplog.text
        held.release()


class TestARenewalThatGoesWrong:
    """One store's fault must not let the leases of others lapse."""

    @pytest.mark.parametrize("answer", [None, [], [True, True]])
    def test_an_answer_that_does_not_fit(self, store: Counting, answer: Any) -> None:
        held = take(store, policy())
        store.renew = lambda slots: answer  # type: ignore[method-assign]  # a third-party store with a fault
        start = held._held[0].since
        assert start + 20 < renew([held], start + 20) <= start + 21
        held.release()

    @pytest.mark.usefixtures("renewed_soon")
    @pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, RuntimeError])
    def test_whatever_it_raises_the_others_are_renewed(self, error: type[BaseException]) -> None:
        class Bad(Counting):
            def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
                raise error

        good, bad = Counting(), Bad()
        leases = [take(bad, policy(ttl=60)), take(good, policy(ttl=60)), take(bad, policy(ttl=60))]
        assert wait_until(lambda: len(good.renewals) >= 4)
        assert len(good.snapshot()) == 1
        for held in leases:
            held.release()

    @pytest.mark.usefixtures("renewed_soon")
    def test_a_store_that_is_away_does_not_hold_up_the_others(self) -> None:
        """Hundreds of releases are owed to a store that answers each call after a time-out."""

        class Away(Counting):
            asked = 0

            def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
                self.asked += 1
                threading.Event().wait(0.1)
                raise BackendError("away")

        away, good = Away(), Counting()
        slots = [Slot("p", make_key(str(number)), 1, 60.0, str(number)) for number in range(300)]
        for slot in slots:
            keeper.give_later(away, [slot], monotonic() + 3)
        held = take(good, policy(ttl=60))
        assert wait_until(lambda: len(good.renewals) >= 4)
        assert len(good.snapshot()) == 1
        assert away.asked < 30, "asked again and again although it is away"
        held.release()


class TestGivingBack:
    @pytest.mark.parametrize("told", [True, False])
    def test_exactly_once_whoever_asks(self, store: Counting, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
        """Eight threads end the same request; each slot is given, and told of if there is anybody to tell, once."""
        released: list[str] = []
        given: list[str] = []
        give = store.give

        def gives(slots: Sequence[Slot]) -> Sequence[bool]:
            given.extend(slot.policy for slot in slots)
            return give(slots)

        monkeypatch.setattr(store, "give", gives)

        def receiver(policy: Policy, held: bool, **kwargs: Any) -> None:
            released.append(policy.name)
            assert held

        if told:
            signals.slot_released.connect(receiver)
        try:
            for _ in range(100):
                held = take(store, policy("a"))
                take(store, policy("b"), held)
                start = threading.Barrier(8)

                def end(held: Lease = held, start: threading.Barrier = start) -> None:
                    start.wait()
                    held.release()

                threads = [threading.Thread(target=end) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            signals.slot_released.disconnect(receiver)
        assert sorted(given) == ["a"] * 100 + ["b"] * 100
        assert sorted(released) == (sorted(given) if told else [])
        assert store.snapshot() == []

    def test_each_store_gets_back_its_own(self) -> None:
        one, other = Counting(), Counting()
        held = take(one, policy("a"))
        take(other, policy("b"), held)
        held.release()
        assert one.snapshot() == other.snapshot() == []

    @pytest.mark.parametrize("says", ["the store", "its lease's end", "a renewal"])
    def test_what_was_gone_before_its_release_is_told_of(
        self, store: Counting, caplog: pytest.LogCaptureFixture, says: str
    ) -> None:
        """Whoever knows of it."""
        held = take(store, policy(ttl=60))
        (one,) = held.holdings()
        if says == "the store":
            store.evict(one.slot.token)
        elif says == "a renewal":
            one.lost = True
        else:
            one.ends = monotonic() - 1
        held.release()
        (record,) = caplog.records
        assert "policy p" in record.getMessage()

    def test_what_only_this_process_counts_is_given_back_to_nobody(
        self, store: Counting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And it was not lost."""
        held, limit = Lease(), policy(ttl=60)
        slot = Slot(limit.name, make_key("k"), 5, 60, new_token(), True)
        assert held.stand_in(store, [limit], [slot])[0]
        given: list[Any] = []
        monkeypatch.setattr(store, "give", given.append)
        held.release()
        assert given == []
        assert caplog.records == []

    @pytest.mark.parametrize("half", ["threads", "loop", "loop, by a task"])
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_what_cuts_a_release_short_loses_nothing(
        self, store: Counting, monkeypatch: pytest.MonkeyPatch, half: str, moment: str
    ) -> None:
        """A worker's SystemExit, say: then the keeper gives back."""
        held = take(store, policy())
        store.gives_on_loop = half == "loop"
        give = store.give

        def cut(slots: Sequence[Slot]) -> Sequence[bool]:
            monkeypatch.undo()
            if moment == "after":
                give(slots)
            raise GreenletExit

        async def acut(slots: Sequence[Slot]) -> Sequence[bool]:
            return cut(slots)

        monkeypatch.setattr(store, "give", cut)
        monkeypatch.setattr(store, "agive", acut)
        release = held.release if half == "threads" else lambda: asyncio.run(held.arelease())
        with pytest.raises(GreenletExit):
            release()
        assert wait_until(lambda: store.snapshot() == [])

    def test_what_was_expected_but_never_answered_is_given_back(self, store: Counting) -> None:
        """The take was cut short by an exception after the store had done it."""

        class Interrupted(Counting):
            def take(self, slots: Sequence[Slot]) -> Any:
                super().take(slots)
                raise KeyboardInterrupt

        store = Interrupted()
        held = Lease()
        with pytest.raises(KeyboardInterrupt):
            take(store, policy(), held)
        assert len(store.snapshot()) == 1
        held.release()
        assert store.snapshot() == []

    def test_the_keeper_remembers_only_what_is_held(self, store: Counting) -> None:
        before = len(keeper.live())
        held = take(store, policy())
        assert len(keeper.live()) == before + 1
        held.release()
        assert len(keeper.live()) == before


def test_whoever_waits_for_what_is_given_back_is_woken(store: Counting) -> None:
    """It would ask again only after a while, and at an exit there is none."""
    lease, bell = take(store, policy()), Bell()
    lease.wake_by(bell)
    lease.release()
    began = monotonic()
    bell.wait(SOON)
    assert monotonic() - began < SOON / 2


class TestKeeper:
    @pytest.fixture
    def own(self) -> Keeper:
        return Keeper()

    def test_no_thread_before_there_is_work(self, own: Keeper) -> None:
        assert own._thread is None

    def test_an_abandoned_lease_is_given_back(self, store: Counting) -> None:
        held = take(store, policy())
        keeper.abandon(held)
        assert wait_until(lambda: store.snapshot() == [])

    def test_an_error_does_not_end_the_thread(self, own: Keeper, caplog: pytest.LogCaptureFixture) -> None:
        ended = threading.Event()

        class Bad:
            def __bool__(self) -> bool:
                return True

            def release(self) -> None:
                raise RuntimeError("bad")

            def renew(self, now: float) -> float:
                return NEVER

        class Good(Bad):
            def release(self) -> None:
                ended.set()

        own.ready()
        own.abandon(Bad())
        own.abandon(Good())
        assert ended.wait(SOON)
        assert "the keeper goes on" in caplog.text

    def test_what_is_owed_is_dropped_when_its_lease_has_ended(self, own: Keeper) -> None:
        class Down:
            asked = 0

            def give(self, slots: Sequence[Slot]) -> None:
                self.asked += 1
                raise BackendError("down")

        down = Down()
        own.give_later(down, (), until=100)
        own._retry(99)
        asked = down.asked
        assert asked >= 1
        own._retry(100)
        own._retry(100)
        assert down.asked == asked


def test_a_forked_child_neither_renews_nor_gives_back_its_parents_leases(store: Counting) -> None:
    held = take(store, policy())
    parents = new_token().split("-")[0]
    pid = os.fork()
    if pid == 0:
        given: list[Any] = []
        store.give = given.append  # type: ignore[assignment,method-assign]  # only to see whether it is called
        held.release()
        mine = take(store, policy())  # the child's own work goes on, with a keeper of its own
        own_token = not new_token().startswith(parents)
        os._exit(0 if given == [] and keeper.live() == [mine] and own_token else 1)
    assert exit_code(pid) == 0
    assert len(store.snapshot()) == 1
    held.release()


def test_leases_are_flushed_at_exit(tmp_path: Path) -> None:
    """A process that ends with slots held gives them back on its way out."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "os.environ['DJANGO_SETTINGS_MODULE'] = 'tests.settings'\n"
        "import django; django.setup()\n"
        "from tests.test_lease import Counting, policy, take\n"
        "class Told(Counting):\n"
        "    def give(self, slots):\n"
        "        print('given', len(slots), flush=True)\n"
        "        return super().give(slots)\n"
        "held = take(Told(), policy())\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "given 1\n", done.stderr


def test_tokens_are_never_the_same() -> None:
    tokens = {new_token() for _ in range(1000)}
    assert len(tokens) == 1000

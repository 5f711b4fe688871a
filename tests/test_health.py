"""A store that fails is left alone until a probe finds that it works again; each change, and each cure, is told once."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import pytest
from django.test import RequestFactory

from django_concurrency_mw import conf, drivers, health, limiter, renewals, signals
from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.base import PROBE, Restore
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.effects import Steps, Take
from django_concurrency_mw.exceptions import BackendError, PermanentBackendError
from django_concurrency_mw.keeper import keeper
from django_concurrency_mw.keyspec import parse_key
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.outcomes import Full, Slot, StoreFailed, TakeReply, Verdict
from django_concurrency_mw.policies import Policy

from .support import EARLIER, SOON, Limits, exit_code, wait_until, works_again
from .test_steps import Drive
from .test_steps import drive as drive

#: As requests know it; the other tests have no time for it.
PROBE_EVERY = health.PROBE_EVERY


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_EVERY", 0.02)


class Store(MemoryBackend):
    """Fails as it is told. `asked` counts the takes of requests, `probed` has the second of each probe."""

    def __init__(self) -> None:
        super().__init__(BackendConfig("tested", "memory"))
        self.error: BaseException | None = None
        self.asked = 0
        self.probed: list[float] = []
        self.given: list[str] = []

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        if slots[0].policy == PROBE:
            self.probed.append(monotonic())
        else:
            self.asked += 1
        self.fail()
        return super().take(slots)

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        self.given += [slot.token for slot in slots if slot.policy != PROBE]
        return super().give(slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        self.fail()
        return super().renew(slots)

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        self.fail()
        return super().restore(holders)

    def fail(self) -> None:
        if self.error is not None:
            raise self.error

    def works(self) -> bool:
        return self.failure is None

    def probed_more(self, times: int = 2) -> bool:
        """Has it been probed so often from now on?"""
        before = len(self.probed)
        return wait_until(lambda: len(self.probed) >= before + times)


class FailsOnce(Store):
    """A blip: one take fails, and everything after it works."""

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        if self.asked == 0:
            self.asked += 1
            raise BackendError("a blip")
        return super().take(slots)


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.error = None
    assert works_again(store)


class Site:
    """Requests that ask a store, as a limited view does."""

    def __init__(self, drive: Drive) -> None:
        self.drive = drive
        self.leases: list[Lease] = []

    def ask(self, store: BaseBackend, **fields: Any) -> Verdict:
        verdict: Verdict = self.drive(self.steps(store, **fields))
        return verdict

    def state(self, store: BaseBackend, **fields: Any) -> str:
        """What became of one request."""
        return self.ask(store, **fields).concurrency.policies[0].state

    def steps(self, store: BaseBackend, name: str = "p", **fields: Any) -> Steps[Any]:
        config = conf.current()
        config.stores["tested"] = store
        request = RequestFactory().get("/")
        self.leases.append(Lease(request))
        policy = Policy(name, parse_key("global"), 100, backend="tested", **fields)
        return limiter.decide(request, self.leases[-1], [policy], {}, config)

    def end(self) -> None:
        for lease in self.leases:
            self.drive(lease.steps_to_give())


@pytest.fixture
def site(limits: Limits, drive: Drive) -> Iterator[Site]:
    limits()
    site = Site(drive)
    yield site
    site.end()
    conf.current().stores.clear()


@pytest.fixture
def told() -> Iterator[list[bool]]:
    """What `backend_failed` said, in order: False it fails, True it works again."""
    told: list[bool] = []

    def receiver(alias: str, recovered: bool, **arguments: Any) -> None:
        if alias != EARLIER:
            told.append(recovered)

    signals.backend_failed.connect(receiver)
    yield told
    signals.backend_failed.disconnect(receiver)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


class TestTheBreaker:
    def test_a_blip_is_over_at_once(self, site: Site, told: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        """The first probe waits for nothing, so that one slow answer costs nobody else anything."""
        monkeypatch.setattr(health, "PROBE_EVERY", 3600)
        store = FailsOnce()
        start = monotonic()
        assert site.state(store) == "local"
        assert wait_until(lambda: told == [False, True])
        assert monotonic() - start < 10  # seen: 0.002 s; the next probe would be an hour later
        assert len(store.probed) == 1
        assert site.state(store) == "held"

    def test_its_recovery_is_told_behind_its_failure(self, site: Site) -> None:
        """However long the receivers take: a gauge must not be left on "down"."""
        store, told = FailsOnce(), []

        def receiver(alias: str, recovered: bool, **arguments: Any) -> None:
            if not recovered:
                wait_until(lambda: store.probed != [], 0.1)
            if alias != EARLIER:
                told.append(recovered)

        signals.backend_failed.connect(receiver)
        try:
            site.ask(store)
            assert works_again(store)
        finally:
            signals.backend_failed.disconnect(receiver)
        assert told == [False, True]

    def test_the_driver_reads_the_failure_once(self, drive: Drive) -> None:
        """The keeper may take it away at any moment."""
        error = BackendError("down")
        reads = [error, None]

        class Flickers(MemoryBackend):
            failure = property(lambda self: reads.pop(0))

        def steps() -> Steps[Any]:
            return (yield from Take(Flickers(BackendConfig("tested", "memory")), ()))

        assert drive(steps()) == StoreFailed(error, sent=False)

    def test_while_it_is_open_no_take_reaches_the_store(self, site: Site, store: Store) -> None:
        store.error = BackendError("down")
        for mode, state in [("local", "local"), ("allow", "unprotected"), ("local", "local")]:
            assert site.state(store, on_backend_error=mode) == state
        rejection = site.ask(store, on_backend_error="deny").concurrency.rejection
        assert rejection is not None
        assert rejection.reason == "backend_unavailable"
        assert store.asked == 1
        assert store.probed_more()
        assert store.asked == 1
        store.error = None
        assert works_again(store)
        assert site.state(store) == "held"
        assert store.asked == 2

    def test_nothing_is_given_back_of_what_was_never_asked_for(self, site: Site, store: Store) -> None:
        """Else an outage fills the bounded line of releases, and those that matter fall out of it."""
        store.error = BackendError("down")
        for _ in range(20):
            site.ask(store, on_backend_error="allow")
        with keeper._working:
            keeper._retry(0)
        assert len(store.given) == 1

    def test_a_refusal_that_is_heard_after_the_recovery_is_no_failure(
        self, limits: Limits, store: Store, told: list[bool]
    ) -> None:
        """A request finds the breaker open; before it has told so, the store works again."""

        def slowly(steps: Steps[Any]) -> Any:
            effect = next(steps)
            while True:
                reply = drivers._SYNC[type(effect)](effect)
                if type(effect) is Take and store.asked == 1 and len(mine.leases) == 2:
                    store.error = None
                    assert works_again(store)
                try:
                    effect = steps.send(reply)
                except StopIteration as stop:
                    return stop.value

        limits()
        mine = Site(slowly)
        store.error = BackendError("down")
        mine.ask(store)
        assert mine.state(store) == "local"
        assert store.works()
        assert wait_until(lambda: told == [False, True])
        for lease in mine.leases:
            lease.release()

    def test_probes_come_every_quarter_second(self, site: Site, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(health, "PROBE_EVERY", PROBE_EVERY)
        store.error = BackendError("down")
        site.ask(store)
        assert wait_until(lambda: len(store.probed) >= 4)
        gaps = [later - earlier for earlier, later in zip(store.probed, store.probed[1:], strict=False)]
        assert min(gaps) >= 0.24
        assert sum(gaps) < 5 * 0.25 * len(gaps)

    def test_a_probe_that_finds_it_full_has_not_found_that_it_works(self, site: Site, store: Store) -> None:
        class OfProbes(Store):
            full = True

            def take(self, slots: Sequence[Slot]) -> TakeReply:
                if slots[0].policy == PROBE and self.full:
                    self.probed.append(monotonic())
                    return Full((True,), (1_000_000,))
                return super().take(slots)

        store = OfProbes()
        store.error = BackendError("down")
        site.ask(store)
        store.error = None
        assert store.probed_more()
        assert not store.works()
        store.full = False
        assert works_again(store)

    def test_a_failed_probe_leaves_nothing(self, site: Site, store: Store) -> None:
        store.error = BackendError("down")
        site.ask(store, on_backend_error="allow")
        store.error = None
        assert works_again(store)
        assert store.snapshot() == []

    def test_one_that_was_dropped_is_not_probed_any_more(self) -> None:
        """Nor kept, by whatever was said of it."""
        store: Store | None = Store()
        assert store is not None
        probed, known = store.probed, weakref.ref(store)
        store.error = BackendError("down")
        health.failed(store, PermanentBackendError("odd", cure="mend it", whole=False), monotonic())
        health.failed(store, BackendError("down"), monotonic())
        assert wait_until(lambda: len(probed) >= 2)
        store = None

        def gone() -> bool:
            gc.collect()
            return known() is None

        assert wait_until(gone)
        assert wait_until(lambda: not [call for call in keeper._calls if known in getattr(call[2], "args", ())])

    def test_a_forked_child_starts_closed_and_probes_for_itself(self, site: Site, store: Store) -> None:
        store.error = BackendError("down")
        site.ask(store)
        assert store.probed_more(1)
        before = len(store.probed)
        pid = os.fork()
        if pid == 0:
            closed = store.works() and store not in health._probes
            store.asked = 0
            site.state(store)
            opened = store.asked == 1 and not store.works()
            probed = wait_until(lambda: len(store.probed) >= before + 2)
            store.error = None
            os._exit(0 if closed and opened and probed and wait_until(store.works) else 1)
        assert exit_code(pid) == 0
        assert not store.works(), "a child's word is not its parent's"


class TestManyAtOnce:
    """All of them have asked before the first answer comes."""

    def failed_together(self, drive: Drive, limits: Limits, store: Store) -> None:
        limits()
        site = Site(drive)
        if drive is drivers.run:
            barrier = threading.Barrier(16)
            ask = store.take

            def take(slots: Sequence[Slot]) -> TakeReply:
                if slots[0].policy != PROBE:
                    barrier.wait(SOON)
                return ask(slots)

            store.take = take  # type: ignore[method-assign]  # for this test
            threads = [threading.Thread(target=site.ask, args=(store,)) for _ in range(16)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:

            async def main() -> None:
                together = asyncio.Barrier(16)

                async def atake(slots: Sequence[Slot]) -> TakeReply:
                    await together.wait()
                    return store.take(slots)

                store.atake = atake  # type: ignore[method-assign]  # for this test
                await asyncio.gather(*(drivers.arun(site.steps(store)) for _ in range(16)))

            asyncio.run(main())
        assert store.asked == 16
        for lease in site.leases:
            lease.release()

    def test_are_one_change(
        self, drive: Drive, limits: Limits, store: Store, told: list[bool], caplog: pytest.LogCaptureFixture
    ) -> None:
        store.error = BackendError("down")
        self.failed_together(drive, limits, store)
        assert store.probed_more()
        assert wait_until(lambda: told == [False])
        assert len(errors(caplog)) == 1
        store.error = None
        assert wait_until(lambda: told == [False, True])
        assert [record.getMessage() for record in caplog.records] == [*errors(caplog), "backend tested works again"]


class TestWhatIsSaid:
    def test_news_have_the_alias_and_the_error(self, site: Site, store: Store) -> None:
        heard: list[dict[str, Any]] = []

        def receiver(**arguments: Any) -> None:
            if arguments["alias"] != EARLIER:
                heard.append({name: value for name, value in arguments.items() if name != "signal"})

        signals.backend_failed.connect(receiver)
        try:
            store.error = error = BackendError("down")
            site.ask(store)
            store.error = None
            assert wait_until(lambda: len(heard) == 2)
        finally:
            signals.backend_failed.disconnect(receiver)
        about = {"sender": Policy, "alias": "tested"}
        assert heard == [
            {**about, "error": error, "recovered": False},
            {**about, "error": None, "recovered": True},
        ]

    @pytest.mark.parametrize("error", [BackendError("odd", whole=False), KeyError("bad")], ids=["one call", "a fault"])
    def test_only_what_is_about_the_whole_store_opens_it(
        self,
        site: Site,
        store: Store,
        told: list[bool],
        error: Exception,
    ) -> None:
        store.error = error
        assert site.state(store) == "local"
        if isinstance(error, BackendError):
            assert store.works()
            assert site.state(store) == "local"
            assert (store.asked, store.probed, told) == (2, [], [])
        else:
            assert wait_until(lambda: told == [False])

    @pytest.mark.parametrize(
        ("error", "cure"),
        [
            (BackendError("odd", whole=False), "odd"),
            (PermanentBackendError("odd", cure="mend it", whole=False), "mend it"),
        ],
        ids=["passing", "permanent"],
    )
    def test_what_is_wrong_with_one_call_is_said_once(
        self, site: Site, store: Store, caplog: pytest.LogCaptureFixture, error: Exception, cure: str
    ) -> None:
        """And of each store."""
        other = Store()
        for each in (store, other):
            each.error = error
            for _ in range(3):
                site.ask(each)
        assert len(errors(caplog)) == 2
        assert all(cure in said for said in errors(caplog))

    def test_a_permanent_error_is_said_once_with_its_cure(
        self, site: Site, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.error = PermanentBackendError("forbidden", cure="mend it")
        site.ask(store)
        assert store.probed_more(5)
        site.ask(store)
        (said,) = errors(caplog)
        assert "forbidden" in said
        assert "This does not go away by itself: mend it" in said

    def test_also_when_it_appears_only_during_the_outage(
        self, site: Site, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It was restarted, and wants a password now; which comes and goes, as a second server has none."""
        store.error = BackendError("down")
        site.ask(store)
        assert store.probed_more()
        assert "by itself" not in caplog.text
        for _ in range(3):
            store.error = PermanentBackendError("no password", cure="put it in")
            assert store.probed_more()
            assert isinstance(store.failure, PermanentBackendError)
            store.error = BackendError("down")
            assert store.probed_more()
        said = [said for said in errors(caplog) if "by itself" in said]
        assert len(said) == 1
        assert "put it in" in said[0]

    def test_another_cure_is_said_too(self, site: Site, store: Store, caplog: pytest.LogCaptureFixture) -> None:
        """The password is right now, and the user may do nothing."""
        store.error = PermanentBackendError("no password", cure="put it in")
        site.ask(store)
        store.error = PermanentBackendError("forbidden", cure="allow it")
        assert store.probed_more(3)
        assert ["put it in" in said for said in errors(caplog)] == [True, False]
        assert "allow it" in errors(caplog)[1]

    def test_what_was_mended_and_breaks_again_is_said_again(
        self, site: Site, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in (1, 2):
            store.error = PermanentBackendError("forbidden", cure="mend it")
            site.ask(store)
            assert wait_until(lambda number=number: len(errors(caplog)) == number)
            store.error = None
            assert works_again(store)


class TestTheKeepersWork:
    """What fails while no request looks."""

    def test_a_renewal_that_fails_opens_it(self, site: Site, store: Store, told: list[bool]) -> None:
        assert site.state(store) == "held"
        store.error = BackendError("down")
        (held,) = site.leases[0].holdings()
        with keeper._working:
            renewals.renew(site.leases, held.due)
        assert not store.works()
        assert wait_until(lambda: told == [False])
        asked = store.asked
        assert site.state(store) == "local"
        assert store.asked == asked

    def test_so_does_a_holder_that_cannot_be_counted_again(
        self, site: Site, store: Store, told: list[bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def restore(holders: Sequence[Restore]) -> Sequence[bool]:
            raise SystemExit  # whatever a store raises: the thread is the keeper's

        assert site.state(store) == "held"
        monkeypatch.setattr(store, "restore", restore)
        store._forget()
        store.probe = probe = Stop()  # type: ignore[method-assign]  # to look before it recovers
        (held,) = site.leases[0].holdings()
        with keeper._working:
            held.due = monotonic()
            renewals.renew(site.leases, held.due)
        assert isinstance(store.failure, BackendError)
        assert wait_until(lambda: told == [False])
        probe.go.set()

    def test_leases_of_a_store_that_is_left_alone_wait(self, site: Site, store: Store) -> None:
        """Each renewal would cost its time-out."""
        site.ask(store)
        store.error = BackendError("down")
        health.failed(store, store.error, monotonic())
        asked: list[int] = []
        store.renew = lambda slots: asked.append(len(slots)) or [True]  # type: ignore[method-assign,func-returns-value]
        (held,) = site.leases[0].holdings()
        with keeper._working:
            now = held.due
            assert now < renewals.renew(site.leases, now) <= now + 1
        assert asked == []


class Stop:
    """A call that waits until it is let go."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> None:
        self.entered.set()
        assert self.go.wait(SOON)


class TestRecovery:
    @pytest.fixture
    def hooks(self, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[BaseBackend], Any]]:
        hooks: list[Callable[[BaseBackend], Any]] = []
        monkeypatch.setattr(health, "_before_recovery", hooks)
        return hooks

    def test_what_it_lost_is_counted_before_the_first_request_uses_it(
        self, site: Site, store: Store, hooks: list[Callable[[BaseBackend], Any]]
    ) -> None:
        stop = Stop()
        health.before_recovery(stop)
        store.error = BackendError("down")
        site.ask(store)
        store.error = None
        assert stop.entered.wait(SOON)
        assert site.state(store) == "local"
        assert store.asked == 1
        stop.go.set()
        assert works_again(store)
        assert site.state(store) == "held"

    def test_leases_are_among_that(self, site: Site, store: Store) -> None:
        """A holder that it lost, and one that was let in meanwhile."""
        site.ask(store)
        store._forget()
        store.error = BackendError("down")
        site.ask(store)
        store.error = None
        assert works_again(store)
        assert len(store.snapshot()) == 2
        assert site.ask(store).concurrency.policies[0].in_flight == 3

    @pytest.mark.parametrize("error", [RuntimeError, SystemExit, asyncio.CancelledError])
    def test_a_hook_that_raises_does_not_keep_it_down(
        self,
        site: Site,
        store: Store,
        hooks: list[Callable[[BaseBackend], Any]],
        caplog: pytest.LogCaptureFixture,
        error: type[BaseException],
    ) -> None:
        called: list[BaseBackend] = []

        def bad(store: BaseBackend) -> None:
            raise error

        hooks += [bad, called.append]
        store.error = BackendError("down")
        site.ask(store)
        store.error = None
        assert works_again(store)
        assert called == [store]
        assert "goes on after an error" in caplog.text

    @pytest.mark.parametrize("error", [RuntimeError, SystemExit, asyncio.CancelledError])
    def test_nor_does_its_own_word(
        self, site: Site, store: Store, caplog: pytest.LogCaptureFixture, error: type[BaseException]
    ) -> None:
        called: list[bool] = []

        def recovered() -> None:
            called.append(store.works())
            raise error

        store.recovered = recovered  # type: ignore[method-assign]  # a third-party store with a fault
        store.error = BackendError("down")
        site.ask(store)
        assert store.probed_more()
        assert called == []
        store.error = None
        assert works_again(store)
        assert called == [False]
        assert "goes on after an error" in caplog.text

    @pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, KeyError])
    def test_whatever_a_probe_raises_there_is_another_one(
        self, site: Site, store: Store, error: type[BaseException]
    ) -> None:
        store.error = error()
        health.failed(store, BackendError("down"), monotonic())
        assert store.probed_more(3)
        assert isinstance(store.failure, Exception)
        store.error = None
        assert works_again(store)

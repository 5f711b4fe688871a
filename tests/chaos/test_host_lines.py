"""The host store's lines among processes that die, and exceptions that come, at any point at all: a waiter has all or nothing,
nobody is overtaken, and nothing is left."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from types import FrameType

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.host import ours
from django_concurrency_mw.backends.host.layout import ASKED, FREE, HELD, QUEUED, Header
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.host.table import Table
from django_concurrency_mw.outcomes import Full, Queued, Slot, Taken

from ..host_file import consistent, held_by_state
from ..killing import PACKAGE, Killed, killed_at, may_be_over
from ..test_waiting import GLOBAL, Client
from . import LONG

#: Points at which a process is killed, of each call.
POINTS = 10**9 if LONG else 20
INTERRUPTIONS = 20_000 if LONG else 600


def made(path: Path) -> HostBackend:
    return HostBackend(BackendConfig("default", "host", options={"path": path, "slots": 64}))


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for seconds takes nobody's place."""
    monkeypatch.setattr(ours, "STANDS_FOR", 3600 * 10**9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


@pytest.fixture
def store(path: Path) -> Iterator[HostBackend]:
    store = made(path)
    yield store
    store.close()


def table_of(store: HostBackend) -> Table:
    assert store._access._table is not None
    return store._access._table


def states(client: Client) -> list[int]:
    store = client.store
    assert isinstance(store, HostBackend)
    return [table_of(store).state(store._ours.places[slot.token, *slot.semaphore]) for slot in client.slots]


def waits_for_all(store: HostBackend) -> Client:
    """For two, and takes one along of a shadow policy."""
    client = Client(store, "a", "b", "shadow")
    client.slots = (*client.slots[:2], replace(client.slots[2], block=False, memo=[]))
    client.most = (100, 100, None)
    return client


HANDED, HEIR = (Slot("a", GLOBAL, 1, 60, token) for token in ("handed", "heir"))
#: Of the process that is killed.
dying: list[Client] = []


def claimed(store: HostBackend) -> None:
    assert store.claim([(HANDED, HEIR)])


def claimed_by_one_who_died(store: HostBackend) -> None:
    store.take([])
    pid = os.fork()
    if pid == 0:
        claimed(store)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    table_of(store).words[Header.SWEPT] = 0


def ready(store: HostBackend) -> None:
    dying[:] = [waits_for_all(store)]
    store.take([])


def standing(store: HostBackend) -> None:
    ready(store)
    assert isinstance(dying[0].ask(), Queued)


#: What is killed while it gives to the others.
GIVERS: dict[str, Killed] = {
    "give": (claimed, lambda store: store.give([HEIR])),
    "sweep": (claimed_by_one_who_died, lambda store: store.take([Slot("a", GLOBAL, 1, 60, "newcomer")])),
}
#: What is killed in a line.
WAITERS: dict[str, Killed] = {
    "join": (ready, lambda store: dying[0].ask()),
    "ask again": (standing, lambda store: dying[0].ask()),
    "leave": (standing, lambda store: dying[0].give()),
    "ask for the last time": (standing, lambda store: dying[0].ask_for_the_last_time()),
}


def points(killed: Callable[[int], int]) -> range:
    total = killed(0)
    assert total > 100
    step = max(1, total // POINTS)
    return range(random.randrange(1, step + 1), total + 1, step)


def empty(store: HostBackend) -> bool:
    return consistent(table_of(store)) == [] and held_by_state(table_of(store)) == {} and not store._ours.places


@pytest.mark.parametrize("name", list(GIVERS))
def test_killed_at_any_bytecode_who_gives_has_given_all_or_nothing(store: HostBackend, path: Path, name: str) -> None:
    def killed(point: int) -> int:
        """One who waits for all is in line before another one, as the process is killed that gives to it. What it would take
        along is not free."""
        store.take([HANDED])
        store.detach([HANDED])
        first, second = clients[:] = waits_for_all(store), Client(store, "a")
        assert (type(first.ask()), type(second.ask())) == (Queued, Queued)
        return killed_at(point, partial(made, path), GIVERS[name])

    def done() -> None:
        for client in clients:
            client.give()
            client.bell.close()
        store.give([HANDED])
        assert held_by_state(table_of(store)) == {HELD: 1}
        assert consistent(table_of(store)) == []

    shadow = Client(store, "shadow")
    shadow.ask()
    clients: list[Client] = []
    seen = set()
    every = points(killed)
    done()
    for point in every:
        assert killed(point) == 0 or may_be_over(point, every), "it was not killed"
        first, second = clients
        store.renew([])  # who comes next makes the index anew, and looks for nobody
        assert consistent(table_of(store)) == [], point
        found = tuple(states(first))
        assert found in [(HELD, HELD, FREE), (QUEUED, ASKED, ASKED)], point
        seen.add(found)
        assert states(second) == [QUEUED], point
        table_of(store).words[Header.SWEPT] = 0
        assert isinstance(Client(store, "a").take(), Full), "somebody waits for it"
        assert first.ask() == Taken((True, True, False), (1, 1, 1)), point
        first.give()
        assert states(second) == [HELD], point
        done()
    assert len(seen) == 2, "some of what may come did not"
    shadow.give()
    shadow.bell.close()
    assert empty(store)


@pytest.mark.parametrize("name", list(WAITERS))
def test_killed_at_any_bytecode_who_waits_is_in_nobodys_way(store: HostBackend, path: Path, name: str) -> None:
    killed = partial(killed_at, store=partial(made, path), calls=WAITERS[name])
    holder, before, behind = Client(store, "a"), Client(store, "a"), Client(store, "a")
    holder.ask()
    assert isinstance(before.ask(), Queued)
    every = points(killed)
    for point in every:
        assert killed(point) == 0 or may_be_over(point, every), "it was not killed"
        store.renew([])
        assert consistent(table_of(store)) == [], point
        behind.ask()
        holder.give()
        assert states(before) == [HELD], point
        before.give()
        assert states(behind) == [HELD], point
        behind.give()
        store.snapshot()
        assert empty(store), point
        holder.ask()
        before.ask()
    for client in (before, holder):
        client.give()
    for client in (holder, before, behind):
        client.bell.close()


class Struck(BaseException):
    """Raised by a signal handler."""


def test_exceptions_of_signal_handlers_leave_no_place_and_no_slot(store: HostBackend, path: Path) -> None:
    other = made(path)
    elsewhere = Client(other, "a", "b")
    struck = inside = 0
    armed = False

    def strike(number: int, frame: FrameType | None) -> None:
        nonlocal struck, inside
        if armed:
            struck += 1
            inside += frame is not None and PACKAGE in frame.f_code.co_filename
            raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    end = monotonic() + (600 if LONG else 60)
    try:
        while struck < INTERRUPTIONS and monotonic() < end:
            holder, first, second = Client(store, "a", "b"), waits_for_all(store), Client(store, "b", "a")
            clients = (holder, first, second)
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 600e-6))
                try:
                    for client in clients:
                        client.ask()
                    second.ask()
                    holder.give()
                    first.give()
                    second.ask_for_the_last_time()
                finally:
                    armed = False
            except Struck:
                armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            for client in clients:  # as whoever made the lease does
                client.give()
                client.bell.close()
            del client  # or it would go in the middle of the next round, where Python drops what a handler raises
            if struck % 20 == 0:
                assert elsewhere.ask() == Taken((True, True), (1, 1)), "somebody has left something"
                elsewhere.give()
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(f"struck {struck} times, {inside} of them inside the store")
    assert inside > INTERRUPTIONS / 10
    assert other.waiters() == other.snapshot() == []
    assert empty(store)
    assert all(state == FREE for state in table_of(store).map[table_of(store).states_at :][:64])
    elsewhere.bell.close()
    other.close()

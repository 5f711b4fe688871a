"""The host store among processes that die, and exceptions that come, at any point at all: nothing is lost, the cap holds."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from types import FrameType

import pytest

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.base import Restore
from django_concurrency_mw.backends.host.layout import Header
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.host.table import Table
from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Full, Slot, Taken
from django_concurrency_mw.tokens import new_token

from .. import killing as killing_itself
from ..host_file import consistent, held_by_state, tokens_there
from ..killing import PACKAGE, Killed, may_be_over
from ..support import SOON, wait_until
from . import LONG
from .kernel_gauge import Gauge

#: Points at which a process is killed: of each call, and where each outcome of one is to be seen among them.
POINTS, MANY_POINTS = (10**9, 10**9) if LONG else (18, 40)
INTERRUPTIONS = 40_000 if LONG else 1_500
#: Seconds of killing.
KILLING = 120.0 if LONG else 1.5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table"


@pytest.fixture
def store(path: Path) -> Iterator[HostBackend]:
    store = made(path)
    yield store
    store.close()


def made(path: Path) -> HostBackend:
    return HostBackend(BackendConfig("default", "host", options={"path": path, "slots": 64}))


#: What a process costs that is killed, and what its limit is: beside a cost of 1 it has room just so.
COST, LIMIT = 3, 4


def slot(policy: str, limit: int = LIMIT, token: str = "", block: bool = True, cost: int = 1) -> Slot:
    return Slot(policy, make_key("k"), limit, 3600, token or new_token(), block, "/path/", cost)


def table_of(store: HostBackend) -> Table:
    table = store._access._table
    assert table is not None
    return table


def look_for_the_dead(store: HostBackend) -> None:
    """As if nobody had looked lately."""
    table_of(store).words[Header.SWEPT] = 0


# -- killed at every point --------------------------------------------------------------------------------------------


def mine() -> list[Slot]:
    wanted = [("a", True), ("b", True), ("shadow", False)]
    return [slot(policy, token="dying", block=block, cost=COST) for policy, block in wanted]


def handed_over() -> list[tuple[Slot, Slot]]:
    return [(slot(policy, token="handed", cost=COST), slot(policy, token="heir", cost=COST)) for policy in ("a", "b")]


def nothing(store: HostBackend) -> None:
    store.take([slot("warm", 99)])


def taken(store: HostBackend) -> None:
    store.take(mine())


def beside_the_dead(store: HostBackend) -> None:
    """Another process has died with all there is, and this one finds out."""
    nothing(store)
    pid = os.fork()
    if pid == 0:
        store.take(mine())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    look_for_the_dead(store)


def unopened(store: HostBackend) -> None:
    pass


def lost(store: HostBackend) -> None:
    """It finds that its descriptor was closed, and opens the file again with what it holds."""
    taken(store)
    os.close(store._access._fd)


#: name -> (what a process does, then the call in which it is killed)
CALLS: dict[str, Killed] = {
    "take": (nothing, lambda store: store.take(mine())),
    "give": (taken, lambda store: store.give(mine())),
    "take one": (nothing, lambda store: store.take(mine()[:1])),
    "give one": (taken, lambda store: store.give(mine()[:1])),
    "renew": (taken, lambda store: store.renew([(one, 60) for one in mine()])),
    "restore": (nothing, lambda store: store.restore([Restore(one, 60, float("inf")) for one in mine()])),
    "evict": (taken, lambda store: store.evict("dying")),
    "sweep": (beside_the_dead, lambda store: store.take(mine())),
    "open": (unopened, lambda store: store.take(mine())),
    "open again": (lost, lambda store: store.give(mine()[:1])),
}
#: The same, of what outlives a process.
HAND_OVERS: dict[str, Killed] = {
    "detach": (taken, lambda store: store.detach(mine())),
    "claim": (nothing, lambda store: store.claim(handed_over())),
}


def killed_at(point: int, path: Path, name: str) -> int:
    """A process that kills itself before the bytecode of that number. Returns how many there were, 0 if it was killed."""
    return killing_itself.killed_at(point, partial(made, path), {**CALLS, **HAND_OVERS}[name])


@pytest.mark.parametrize("name", list(CALLS))
def test_killed_at_any_bytecode_a_process_leaves_nothing_behind(store: HostBackend, path: Path, name: str) -> None:
    own = [slot("a"), slot("b"), slot("shadow")]
    store.take(own)
    total = killed_at(0, path, name)
    assert total > 100
    step = max(1, total // POINTS)
    points, killed = range(random.randrange(1, step + 1), total + 1, step), 0
    for point in points:
        killed += killed_at(point, path, name) == 0
        look_for_the_dead(store)
        # One more of each is free, and only one: what the dead one held is back, and nothing else came with it.
        more = [slot("a", cost=COST), slot("b", cost=COST), slot("shadow", cost=COST)]
        assert store.take(more) == Taken((True,) * 3, (LIMIT,) * 3), point
        assert isinstance(store.take([slot("a")]), Full)
        assert list(store.give(more)) == [True] * 3
        assert sorted(holder.token for holder in store.snapshot()) == sorted(one.token for one in own), point
        assert consistent(table_of(store)) == [], point
        assert list(held_by_state(table_of(store)).values()) == [3], point
    # How many steps a call takes may vary a little, as where it meets others; who was through before has ended by itself.
    assert killed >= 0.9 * len(points) - 1
    print(f"{name}: {len(points)} of {total} points, {table_of(store).words[Header.REBUILT]} indexes made anew")


def points_of(path: Path, name: str) -> range:
    total = killed_at(0, path, name)
    assert total > 100
    step = max(1, total // MANY_POINTS)
    return range(random.randrange(1, step + 1), total + 1, step)


def test_killed_at_any_bytecode_a_claim_leaves_the_old_ones_or_the_new_ones(store: HostBackend, path: Path) -> None:
    own = slot("a")
    store.take([own])
    left = set()
    store.take([old for old, _ in handed_over()])
    every = points_of(path, "claim")
    for point in every:
        store.give([old for old, _ in handed_over()])  # what is left of the last time
        olds = [old for old, _ in handed_over()]
        assert store.take(olds) == Taken((True, True), (LIMIT, COST)), point
        store.detach(olds)
        assert killed_at(point, path, "claim") == 0 or may_be_over(point, every), "it was not killed"
        store.renew([])  # who comes next makes the index anew, and looks for nobody
        held = [tokens_there(table_of(store), policy) - {own.token} for policy in ("a", "b")]
        assert all(tokens and tokens <= {"handed", "heir"} for tokens in held), (point, held)
        assert consistent(table_of(store)) == [], point
        left |= {(*sorted(tokens),) for tokens in held}
        # The new ones were the dead one's, and go with it.
        now = {(holder.policy, holder.token) for holder in store.snapshot()}
        assert now == {("a", own.token)} | {
            (policy, "handed") for policy, tokens in zip("ab", held, strict=True) if "handed" in tokens
        }
        assert consistent(table_of(store)) == [], point
        assert len(now) == sum(held_by_state(table_of(store)).values()), point
    assert left == {("handed",), ("handed", "heir"), ("heir",)}, "some of what may come did not"


def test_killed_at_any_bytecode_a_hand_over_was_done_or_not(store: HostBackend, path: Path) -> None:
    store.take([slot("own")])
    left = set()
    every = points_of(path, "detach")
    for point in every:
        assert killed_at(point, path, "detach") == 0 or may_be_over(point, every), "it was not killed"
        holders = [holder for holder in store.snapshot() if holder.policy != "own"]
        assert all((holder.pid, holder.cost, holder.token) == (None, COST, "dying") for holder in holders), point
        left.add(len(holders))
        assert consistent(table_of(store)) == [], point
        assert len(holders) + 1 == sum(held_by_state(table_of(store)).values()), point
        store.evict("dying")
        table_of(store).drop([cell for cell in table_of(store)._used() if cell >= 1])
    assert left == {0, 1, 2, 3}


# -- exceptions at any point ------------------------------------------------------------------------------------------


class Struck(BaseException):
    """Raised by a signal handler."""


def test_exceptions_of_signal_handlers_leave_nothing_behind(store: HostBackend, path: Path) -> None:
    own, other = [slot("a"), slot("b")], made(path)
    store.take(own)
    struck = inside = 0
    armed = False

    def strike(number: int, frame: FrameType | None) -> None:
        nonlocal struck, inside
        if not armed:
            return
        struck += 1
        inside += frame is not None and PACKAGE in frame.f_code.co_filename
        raise Struck

    fd = os.open(path, os.O_RDWR)
    before = signal.signal(signal.SIGALRM, strike)
    end = monotonic() + (600 if LONG else 60)
    try:
        while struck < INTERRUPTIONS and monotonic() < end:
            one = [slot("a"), slot("b")][: random.choice((1, 2))]
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 60e-6))
                try:
                    store.take(one)
                    store.renew([(each, 60) for each in one])
                    store.give(one)
                finally:
                    armed = False
            except Struck:
                armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever else is there is not locked out
            fcntl.flock(fd, fcntl.LOCK_UN)
            store.give(one)  # as whoever made the lease does
            if struck % 50 == 0:
                assert len(other.snapshot()) == 2
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(fd)
    print(f"struck {struck} times, {inside} of them inside the store")
    assert inside > INTERRUPTIONS / 10
    assert sorted(holder.token for holder in other.snapshot()) == sorted(one.token for one in own)
    assert set(store._ours.places) == {(one.token, one.policy, one.key.digest) for one in own}
    thread = threading.Thread(target=store.give, args=(own,), daemon=True)
    thread.start()
    thread.join(SOON)
    assert not thread.is_alive(), "the other threads are locked out"
    assert other.snapshot() == []
    assert consistent(table_of(store)) == []
    other.close()


# -- killed under load ------------------------------------------------------------------------------------------------

CAP, WORKERS, THREADS = 5, 4, 2


def cost_of(place: int) -> int:
    """Of the thread that has this place in the gauge."""
    return 1 + place % 3


def worker(number: int, path: Path, limit: int, seen: mmap.mmap) -> None:
    """Takes and gives in some threads until it is killed. `seen`: the most ever inside, then a count for each thread."""
    gauge = Gauge(path.with_name("gauge"), WORKERS * THREADS)
    store = made(path)
    counts = memoryview(seen).cast("q")

    def work(place: int) -> None:
        chance = random.Random()
        while True:
            one = [slot("p", limit, cost=cost_of(place)), slot("q", 99)]
            try:
                if isinstance(store.take(one), Taken):
                    inside = sum(map(cost_of, gauge.enter(place)))
                    if inside > counts[0]:
                        counts[0] = inside
                    counts[1 + place] += 1
                    sleep(chance.random() * 0.0005)
                    gauge.leave(place)
                    store.give(one)
            except BackendError:
                counts[1 + WORKERS * THREADS] += 1

    for thread in range(THREADS):
        threading.Thread(target=work, args=(number * THREADS + thread,), daemon=True).start()
    while True:
        signal.pause()


def killing(path: Path, limit: int, seconds: float, at_least: int = 0) -> tuple[int, int, int, int]:
    """Workers are killed and replaced, for so long and so often at least, and then work until the limit was reached.

    Returns kills, the most inside, admissions and errors.
    """
    seen = mmap.mmap(-1, 8 * (2 + WORKERS * THREADS))
    workers: dict[int, int] = {}

    def start(number: int) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                worker(number, path, limit, seen)
            finally:
                os._exit(1)
        workers[number] = pid

    for number in range(WORKERS):
        start(number)
    kills, end = 0, monotonic() + seconds
    try:
        while monotonic() < end or kills <= at_least:
            sleep(random.random() * 0.04)
            number = random.randrange(WORKERS)
            os.kill(workers[number], signal.SIGKILL)
            os.waitpid(workers[number], 0)
            kills += 1
            start(number)

        def enough() -> bool:
            most, *admitted = struct.unpack_from(f"{1 + WORKERS * THREADS}q", seen)
            return most >= limit and sum(admitted) > 100

        wait_until(enough)
    finally:
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    counts = struct.unpack(f"{2 + WORKERS * THREADS}q", seen[:])
    seen.close()
    return kills, counts[0], sum(counts[1:-1]), counts[-1]


def test_the_cap_holds_while_processes_are_killed_and_nothing_is_left_of_them(store: HostBackend, path: Path) -> None:
    store.take([slot("own")])
    kills, most, admitted, errors = killing(path, CAP, KILLING, 20)
    print(f"{kills} kills, {admitted} admitted, {errors} errors, {table_of(store).words[Header.REBUILT]} made anew")
    assert most == CAP
    assert kills > 20
    assert [holder.policy for holder in store.snapshot()] == ["own"]
    assert consistent(table_of(store)) == []


def test_a_store_that_admits_one_too_many_is_caught(path: Path) -> None:
    _, most, _, _ = killing(path, CAP + 1, 0.2)
    assert most == CAP + 1

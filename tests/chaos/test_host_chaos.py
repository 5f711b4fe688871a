"""The host store among processes that die, and exceptions that come, at any point at all: nothing is lost, the cap holds."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any

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

from ..host_file import consistent, held_by_state
from ..support import wait_until
from . import LONG

#: Points at which a process is killed, of each call.
POINTS = 10**9 if LONG else 50
INTERRUPTIONS = 40_000 if LONG else 1_500
#: Seconds of killing.
KILLING = 120.0 if LONG else 3.0
PACKAGE = os.path.join("backends", "host", "")


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


def slot(policy: str, limit: int = 2, token: str = "", block: bool = True) -> Slot:
    return Slot(policy, make_key("k"), limit, 3600, token or new_token(), block, "/path/")


def table_of(store: HostBackend) -> Table:
    table = store._access._table
    assert table is not None
    return table


def look_for_the_dead(store: HostBackend) -> None:
    """As if nobody had looked lately."""
    table_of(store).words[Header.SWEPT] = 0


# -- killed at every point --------------------------------------------------------------------------------------------


def mine() -> list[Slot]:
    return [slot("a", token="dying"), slot("b", token="dying"), slot("shadow", token="dying", block=False)]


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
CALLS: dict[str, tuple[Callable[[HostBackend], None], Callable[[HostBackend], Any]]] = {
    "take": (nothing, lambda store: store.take(mine())),
    "give": (taken, lambda store: store.give(mine())),
    "renew": (taken, lambda store: store.renew([(one, 60) for one in mine()])),
    "restore": (nothing, lambda store: store.restore([Restore(one, 60, float("inf")) for one in mine()])),
    "evict": (taken, lambda store: store.evict("dying")),
    "sweep": (beside_the_dead, lambda store: store.take(mine())),
    "open": (unopened, lambda store: store.take(mine())),
    "open again": (lost, lambda store: store.give(mine()[:1])),
}


def killed_at(point: int, path: Path, name: str) -> int:
    """A process that kills itself before the bytecode of that number. Returns how many there were, 0 if it was killed."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            store = made(path)
            prepare, call = CALLS[name]
            prepare(store)
            seen = 0

            def trace(frame: FrameType, event: str, argument: object) -> Any:
                nonlocal seen
                if PACKAGE not in frame.f_code.co_filename:
                    return None
                frame.f_trace_opcodes = True
                if event == "opcode":
                    seen += 1
                    if seen == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys._getframe().f_trace_opcodes = True
            sys.settrace(trace)
            call(store)
            sys.settrace(None)
            os.write(tell, struct.pack("i", seen))
        finally:
            os._exit(0)
    os.close(tell)
    answer = os.read(told, 4)
    os.close(told)
    os.waitpid(pid, 0)
    return struct.unpack("i", answer)[0] if answer else 0


@pytest.mark.parametrize("name", list(CALLS))
def test_killed_at_any_bytecode_a_process_leaves_nothing_behind(store: HostBackend, path: Path, name: str) -> None:
    own = [slot("a"), slot("b"), slot("shadow")]
    store.take(own)
    total = killed_at(0, path, name)
    assert total > 100
    step = max(1, total // POINTS)
    points = range(random.randrange(1, step + 1), total + 1, step)
    for point in points:
        assert killed_at(point, path, name) == 0, "it was not killed"
        look_for_the_dead(store)
        # One more of each is free, and only one: what the dead one held is back, and nothing else came with it.
        more = [slot("a"), slot("b"), slot("shadow")]
        assert store.take(more) == Taken((True,) * 3, (2, 2, 2)), point
        assert isinstance(store.take([slot("a")]), Full)
        assert list(store.give(more)) == [True] * 3
        assert sorted(holder.token for holder in store.snapshot()) == sorted(one.token for one in own), point
        assert consistent(table_of(store)) == [], point
        assert list(held_by_state(table_of(store)).values()) == [3], point
    print(f"{name}: {len(points)} of {total} points, {table_of(store).words[Header.REBUILT]} indexes made anew")


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
            one = [slot("a"), slot("b")]
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
    assert set(store._known) == {(one.token, one.policy, one.key.digest) for one in own}
    thread = threading.Thread(target=store.give, args=(own,), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "the other threads are locked out"
    assert other.snapshot() == []
    assert consistent(table_of(store)) == []
    other.close()


# -- killed under load ------------------------------------------------------------------------------------------------

CAP, WORKERS, THREADS = 3, 4, 2


class Gauge:
    """How many are inside, counted by the kernel: one locked byte each, which is free the moment its process is dead.

    These locks go before those of the store do, so whoever takes a dead one's slot does not find it here any more.
    """

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.one_at_a_time = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self.mutex = threading.Lock()
        self.here: set[int] = set()

    def enter(self, place: int) -> int:
        """Returns how many are inside now."""
        with self.mutex:
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_EX)
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            self.here.add(place)
            count = len(self.here) + sum(self._is_locked(each) for each in range(WORKERS * THREADS))
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_UN)
        return count

    def leave(self, place: int) -> None:
        with self.mutex:
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_EX)
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, place)
            self.here.discard(place)
            fcntl.flock(self.one_at_a_time, fcntl.LOCK_UN)

    def _is_locked(self, place: int) -> bool:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
        answer = fcntl.fcntl(self.fd, fcntl.F_GETLK, asked)
        return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def worker(number: int, path: Path, limit: int, seen: mmap.mmap) -> None:
    """Takes and gives in some threads until it is killed. `seen`: the most ever inside, then a count for each thread."""
    gauge = Gauge(path.with_name("gauge"))
    store = made(path)
    counts = memoryview(seen).cast("q")

    def work(place: int) -> None:
        chance = random.Random()
        while True:
            one = [slot("p", limit), slot("q", 99)]
            try:
                if isinstance(store.take(one), Taken):
                    inside = gauge.enter(place)
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


def killing(path: Path, limit: int, seconds: float) -> tuple[int, int, int, int]:
    """Workers are killed and replaced. Returns kills, the most inside, admissions and errors."""
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
        while monotonic() < end:
            sleep(random.random() * 0.04)
            number = random.randrange(WORKERS)
            os.kill(workers[number], signal.SIGKILL)
            os.waitpid(workers[number], 0)
            kills += 1
            start(number)
        wait_until(lambda: sum(struct.unpack_from(f"{WORKERS * THREADS}q", seen, 8)) > 100, 30)
    finally:
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    counts = struct.unpack(f"{2 + WORKERS * THREADS}q", seen[:])
    seen.close()
    return kills, counts[0], sum(counts[1:-1]), counts[-1]


def test_the_cap_holds_while_processes_are_killed_and_nothing_is_left_of_them(store: HostBackend, path: Path) -> None:
    store.take([slot("own")])
    kills, most, admitted, errors = killing(path, CAP, KILLING)
    print(f"{kills} kills, {admitted} admitted, {errors} errors, {table_of(store).words[Header.REBUILT]} made anew")
    assert most == CAP
    assert kills > 20
    assert [holder.policy for holder in store.snapshot()] == ["own"]
    assert consistent(table_of(store)) == []


def test_a_store_that_admits_one_too_many_is_caught(path: Path) -> None:
    _, most, _, _ = killing(path, CAP + 1, 0.5)
    assert most == CAP + 1

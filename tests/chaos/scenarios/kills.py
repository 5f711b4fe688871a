"""Processes in which many wait for few slots, over and over, while something is done to them: they are killed and replaced, or
the connections are cut by which Redis wakes them."""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from django_concurrency_mw import ConcurrencyLimitExceeded, hold
from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.outcomes import Queued, Taken
from django_concurrency_mw.tokens import process_id, process_of

from ..kernel_gauge import Gauge
from .common import SOON, Child, Client, apart, site, until

WORKERS, CREW = 4, 4
PLACES = WORKERS * CREW
#: Slots. Each place takes 1 or 2 of them.
CAP, LARGEST = 6, 2
#: Seconds that each one waits at most; nobody has to.
WAIT = 60
#: Seconds that a slot is used at most.
JOB = 0.004


def cost_of(place: int) -> int:
    return 1 + place % LARGEST


class Board:
    """What all these processes know of each other, in memory that they share."""

    def __init__(self) -> None:
        words = memoryview(mmap.mmap(-1, 8 * (3 + 2 * PLACES + WORKERS))).cast("Q")
        #: The most slots that were ever in use.
        self.most = words[0:1]
        #: Not 0: everybody is to come to an end.
        self.over = words[1:2]
        #: How many were turned away, for any reason. Nobody is to be.
        self.rejected = words[2:3]
        #: By place: since when it is inside (monotonic nanoseconds), 0 where it is not; and how often it was.
        self.entered = words[3 : 3 + PLACES]
        self.admitted = words[3 + PLACES : 3 + 2 * PLACES]
        #: By worker: its `process_id`.
        self.processes = words[3 + 2 * PLACES :]


class Worker:
    """One process: half of them have threads, half an event loop."""

    def __init__(self, number: int, board: Board, folder: Path, ttl: float) -> None:
        self.number, self.board, self.ttl = number, board, ttl
        self.gauge = Gauge(folder / "gauge", PLACES)
        self.log = os.open(folder / "admissions", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.chance = random.Random()

    def run(self) -> None:
        self.board.processes[self.number] = int(process_id(), 16)
        places = range(self.number * CREW, (self.number + 1) * CREW)
        if self.number % 2:
            asyncio.run(self._on_a_loop(places))
            return
        threads = [threading.Thread(target=self._in_a_thread, args=(place,)) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _in_a_thread(self, place: int) -> None:
        while not self.board.over[0]:
            try:
                with hold("p", cost=cost_of(place)):
                    self._come_in(place)
                    sleep(self.chance.random() * JOB)
                    self._go(place)
            except ConcurrencyLimitExceeded:
                self.board.rejected[0] += 1

    async def _on_a_loop(self, places: Sequence[int]) -> None:
        async def work(place: int) -> None:
            while not self.board.over[0]:
                try:
                    async with hold("p", cost=cost_of(place)):
                        self._come_in(place)
                        await asyncio.sleep(self.chance.random() * JOB)
                        self._go(place)
                except ConcurrencyLimitExceeded:
                    self.board.rejected[0] += 1

        await asyncio.gather(*map(work, places))

    def _come_in(self, place: int) -> None:
        now = monotonic()
        os.write(self.log, f"{now}\n".encode())
        self.board.entered[place] = int(now * 1e9)
        inside = self.gauge.enter(place)
        # Who stalls for half of its lease may have lost it by now: that is not promised.
        stalled = int((now - self.ttl / 2) * 1e9)
        count = sum(cost_of(each) for each in inside if self.board.entered[each] > stalled)
        self.board.most[0] = max(self.board.most[0], count)
        self.board.admitted[place] += 1

    def _go(self, place: int) -> None:
        self.gauge.leave(place)
        self.board.entered[place] = 0


class Chaos:
    """The site's processes, and what is done to them."""

    def __init__(self, backend: dict[str, Any], folder: Path, ttl: float, limit: int) -> None:
        self.backend, self.folder, self.ttl = backend, folder, ttl
        self.policies = {"p": {"key": "global", "max_concurrent": limit, "wait": WAIT, "max_waiting": 100, "ttl": ttl}}
        self.board = Board()
        self.store: BaseBackend = apart(backend)
        self.workers: dict[int, Child] = {}
        self.kills = {"holding": 0, "waiting": 0}
        #: (from, until, slots): what the killed held, and the store has to keep until the leases' ends.
        self.dead: list[tuple[float, float, int]] = []

    def start(self, number: int) -> None:
        def work(orders: int, answers: int) -> None:
            worker = Worker(number, self.board, self.folder, self.ttl)  # its gauge before its store
            site(self.backend, self.policies, MAX_SYNC_WAITERS=CREW)
            worker.run()

        self.workers[number] = Child(work)

    def kill_one(self) -> None:
        """By turns one that holds a slot, and one that only waits, if there is one soon."""
        holding = sum(self.kills.values()) % 2 == 0
        number = random.randrange(WORKERS)
        for _ in range(1000):
            if any(self._inside(number)) == holding:
                break
            number = random.randrange(WORKERS)
            sleep(0.0001)
        self.workers.pop(number).kill()
        killed = monotonic()
        self.kills["holding" if any(self._inside(number)) else "waiting"] += 1
        self._inside(number)[:] = memoryview(bytes(8 * CREW)).cast("Q")
        if self.backend["BACKEND"] == "redis":
            process = f"{self.board.processes[number]:016x}"
            mine = [one for one in self.store.snapshot() if process_of(one.token) == process]
            self.dead += [(killed, monotonic() + one.lease_left, one.cost) for one in mine]
        self.start(number)

    def _inside(self, number: int) -> memoryview:
        """Since when each of a worker's places is inside."""
        return self.board.entered[number * CREW : (number + 1) * CREW]

    def go_on(self, times: int = 3) -> bool:
        """Does everybody get a slot so many times more?"""
        goal = [admitted + times for admitted in self.board.admitted]
        return until(lambda: all(now >= then for now, then in zip(self.board.admitted, goal, strict=True)))

    def end(self) -> list[int]:
        """All come to their end by themselves. Returns their exit codes."""
        self.board.over[0] = 1
        return [worker.end() for worker in self.workers.values()]

    def stop(self) -> list[int]:
        """They would not."""
        for worker in self.workers.values():
            worker.kill()
        return []


def killing(
    backend: dict[str, Any], folder: str, lasting: float, pause: float, ttl: float, limit: int = CAP
) -> dict[str, Any]:
    """Processes are killed for so long, one each `pause` on average, and replaced."""

    def kill(chaos: Chaos) -> None:
        end = monotonic() + lasting
        while monotonic() < end:
            sleep(random.random() * 2 * pause)
            chaos.kill_one()

    return _run(Chaos(backend, Path(folder), ttl, limit), kill)


def cutting(backend: dict[str, Any], folder: str, times: int, pause: float, ttl: float) -> dict[str, Any]:
    """All connections by which Redis wakes who waits are cut so many times."""
    import redis

    cut = 0

    def disconnect(chaos: Chaos) -> None:
        nonlocal cut
        with redis.Redis.from_url(backend["LOCATION"]) as client:
            for _ in range(times):
                sleep(random.random() * 2 * pause)
                cut += int(client.execute_command("CLIENT", "KILL", "TYPE", "pubsub"))

    return _run(Chaos(backend, Path(folder), ttl, CAP), disconnect) | {"cut": cut}


def behind_the_dead(backend: dict[str, Any], dead: int) -> dict[str, Any]:
    """So many stand in line before somebody, all of one process, which is killed. How long does that one wait after that?"""

    def work(orders: int, answers: int) -> None:
        store = apart(backend)
        clients = [Client(store, "p") for _ in range(dead)]
        os.write(answers, b"y" if all(isinstance(client.ask(), Queued) for client in clients) else b"n")
        os.read(orders, 1)

    gate = Child(lambda orders, answers: _hold_until_told(backend, orders, answers))
    assert gate.hear() == b"y"
    child = Child(work)
    stand = child.hear() == b"y"
    store = apart(backend)
    behind = Client(store, "p")
    reply = behind.ask()
    child.kill()
    began = monotonic()
    gate.ask(b"g")
    got = behind.wait(2 * SOON)
    waited = monotonic() - began
    behind.give()
    return {"stand": stand, "ahead": getattr(reply, "ahead", None), "got": got, "waited": waited}


def _hold_until_told(backend: dict[str, Any], orders: int, answers: int) -> None:
    holder = Client(apart(backend), "p")
    os.write(answers, b"y" if isinstance(holder.ask(), Taken) else b"n")
    os.read(orders, 1)
    holder.give()
    os.write(answers, b"y")
    os.read(orders, 1)


def _run(chaos: Chaos, trouble: Callable[[Chaos], None]) -> dict[str, Any]:
    store, board = chaos.store, chaos.board
    for number in range(WORKERS):
        chaos.start(number)
    began = chaos.go_on()
    before, since = sum(board.admitted), monotonic()
    if began:
        trouble(chaos)
    during, troubled = sum(board.admitted) - before, monotonic() - since
    calm = monotonic()
    goes_on = chaos.go_on(10)
    last = monotonic()
    codes = chaos.end() if goes_on else chaos.stop()
    over = monotonic()
    empty = until(lambda: not store.snapshot() and not store.waiters())
    stamps = sorted(map(float, (chaos.folder / "admissions").read_text().split()))
    return {
        "began": began,
        "goes on": goes_on,
        "calm": last - calm,
        "codes": codes,
        "most": board.most[0],
        "rejected": board.rejected[0],
        "kills": chaos.kills,
        "admitted": during,
        "seconds": troubled,
        "stall": stall([stamp for stamp in stamps if since <= stamp <= last], chaos.dead),
        "emptied": monotonic() - over,
        "left": [] if empty else [repr(one) for one in (*store.snapshot(), *store.waiters())],
    }


def stall(stamps: Sequence[float], dead: Sequence[tuple[float, float, int]]) -> float:
    """The longest time without an admission. It does not begin as long as the dead leave too little free for anybody."""
    longest = 0.0
    for before, after in pairwise(stamps):
        began = max([before, *(end for end in _ends_of_nothing_free(dead) if end < after)])
        longest = max(longest, after - began)
    return longest


def _ends_of_nothing_free(dead: Sequence[tuple[float, float, int]]) -> list[float]:
    """The moments at which the dead leave enough for anybody again."""
    return [
        end for _, end, cost in dead if CAP - sum(more for since, until, more in dead if since < end <= until) < LARGEST
    ]

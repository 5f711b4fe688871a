"""Some take a slot of A, some of B, and some of both, in two processes. Those of A meet inside: all of A's slots are in use at
once, again and again."""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from django_concurrency_mw import ConcurrencyLimitExceeded, conf
from django_concurrency_mw.blocks import Block
from django_concurrency_mw.effects import Steps
from django_concurrency_mw.lease import Lease
from django_concurrency_mw.limiter import store_of
from django_concurrency_mw.outcomes import Asked, Slot
from django_concurrency_mw.steps import acquire
from django_concurrency_mw.tokens import new_token

from ..kernel_gauge import Gauge
from .common import KEY, SOON, Child, Client, apart, site, until

PROCESSES = 2
#: Slots of A and of B; and how many of each process want one of A, of B, and one of both.
A, B = 4, 1
OF_A, OF_B, OF_BOTH = A // PROCESSES, 2, 4
#: How often somebody has to have had both in the end.
MANY = 10
#: Between two slots. Whoever wants both seldom finds both free where others take either all the time.
PAUSE = [(None, None)] * 4
POLICIES = {
    name: {"key": "global", "max_concurrent": limit, "wait": 120, "max_waiting": 100, "ttl": 60}
    for name, limit in {"a": A, "b": B}.items()
}


class Together(Block[None]):
    """A slot of each of these, as a request has them."""

    called = "Together"

    def __init__(self, *names: str, waits: bool = True) -> None:
        super().__init__()
        self.names, self.waits = names, waits

    def steps(self, lease: Lease) -> Steps[None]:
        config = conf.current()
        policies = [config.table.get(name) for name in self.names]
        asked = [Asked(policy, KEY, policy.max_concurrent) for policy in policies]
        stores = {policy.backend: store_of(policy, config) for policy in policies}
        threads = config.max_sync_waiters if self.waits else None
        verdict = yield from acquire(asked, stores, lease, new_token(), "/", "deny", threads)
        if verdict.concurrency.rejection is not None:
            raise ConcurrencyLimitExceeded(verdict.concurrency.rejection)


class Board:
    """What the processes know of each other."""

    def __init__(self) -> None:
        words = memoryview(mmap.mmap(-1, 8 * (6 + A))).cast("Q")
        #: The round that may begin; not 0: it is over; turned away; the most ever inside of A and of B.
        self.round, self.over, self.rejected = words[0:1], words[1:2], words[2:3]
        self.most = {"a": words[3:4], "b": words[4:5]}
        #: How often somebody had both.
        self.both = words[5:6]
        #: By place of those of A: the round for which it is inside.
        self.inside = words[6:]


class Worker:
    """One process: the first one has threads, the other one an event loop. What they do is the same: a pause is a yield."""

    def __init__(self, number: int, board: Board, folder: Path, ordered: int) -> None:
        self.number, self.board, self.ordered = number, board, ordered
        places = PROCESSES * (OF_A + OF_B + OF_BOTH)
        self.gauges = {name: Gauge(folder / f"gauge-{name}", places) for name in "ab"}

    def run(self) -> None:
        of_a, of_b, of_both = self._take_a, self._take_b, self._take_both
        work = [*[of_a] * OF_A, *[of_b] * OF_B, *[of_both] * OF_BOTH]
        if self.number:
            asyncio.run(self._on_a_loop(work))
            return
        threads = [threading.Thread(target=self._in_a_thread, args=pair) for pair in enumerate(work)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _in_a_thread(self, index: int, work: Callable[..., Any]) -> None:
        for block, during in work(index):
            if block is None:
                sleep(0.001)
                continue
            try:
                with block:
                    for _ in during():
                        sleep(0.001)
            except ConcurrencyLimitExceeded:
                self.board.rejected[0] += 1

    async def _on_a_loop(self, work: Sequence[Callable[..., Any]]) -> None:
        async def run(index: int, work: Callable[..., Any]) -> None:
            for block, during in work(index):
                if block is None:
                    await asyncio.sleep(0.001)
                    continue
                try:
                    async with block:
                        for _ in during():
                            await asyncio.sleep(0.001)
                except ConcurrencyLimitExceeded:
                    self.board.rejected[0] += 1

        await asyncio.gather(*[run(*pair) for pair in enumerate(work)])

    # What each one does: pairs of a block and what happens inside; None for a pause.

    def _take_a(self, index: int) -> Any:
        place, board = self.number * OF_A + index, self.board
        number = 0
        while not board.over[0]:
            number += 1
            while board.round[0] < min(number, self.ordered + 1) and not board.over[0]:
                yield None, None
            yield Together("a", waits=number > self.ordered), lambda number=number: self._meet(index, place, number)
            yield from PAUSE

    def _take_b(self, index: int) -> Any:
        while not self.board.over[0]:
            yield Together("b"), lambda: self._use(index, "b")
            yield from PAUSE

    def _take_both(self, index: int) -> Any:
        while not self.board.over[0]:
            yield Together("a", "b"), lambda: self._use(index, "a", "b")
            yield from PAUSE

    def _meet(self, index: int, place: int, number: int) -> Any:
        """It leaves when all others are inside too."""
        self._count(index, "a")
        self.board.inside[place] = number
        while min(self.board.inside) < number and not self.board.over[0]:
            yield
        self._uncount(index, "a")

    def _use(self, index: int, *names: str) -> Any:
        self._count(index, *names)
        yield
        self.board.both[0] += len(names) - 1
        self._uncount(index, *names)

    def _count(self, index: int, *names: str) -> None:
        for name in names:
            inside = self.gauges[name].enter(self._place(index))
            self.board.most[name][0] = max(self.board.most[name][0], len(inside))

    def _uncount(self, index: int, *names: str) -> None:
        for name in names:
            self.gauges[name].leave(self._place(index))

    def _place(self, index: int) -> int:
        return self.number * (OF_A + OF_B + OF_BOTH) + index


def both(backend: dict[str, Any], folder: str, ordered: int, rounds: int) -> dict[str, Any]:
    """So many times those of A meet while B is held all the while, and nobody of them waits; then as often as `rounds` in the
    thick of it. Returns how often they have met."""
    board = Board()

    def start(number: int) -> Child:
        def work(orders: int, answers: int) -> None:
            worker = Worker(number, board, Path(folder), ordered)
            site(backend, POLICIES, MAX_SYNC_WAITERS=OF_A + OF_B + OF_BOTH)
            worker.run()

        return Child(work)

    children = [start(number) for number in range(PROCESSES)]
    store = apart(backend)
    of_a = Slot("a", KEY, A, 60.0, new_token())
    holder = Client(store, "b", B)
    assert holder.wait(SOON), "nobody gets B"
    others = PROCESSES * (OF_B + OF_BOTH)
    # It has come in between those who use B; whoever wants it waits now, and they hold nothing of A.
    in_line = until(lambda: len({one.token for one in store.waiters() if one.policy == "b"}) == others)
    in_order = in_line and until(lambda: list(store.counts([of_a])) == [0])
    for number in range(1, ordered + 1 if in_order else 0):
        board.round[0] = number
        in_order = in_order and until(lambda number=number: min(board.inside) >= number)
        in_order = in_order and until(lambda: list(store.counts([of_a])) == [0])
    met, rejected = min(board.inside), board.rejected[0]
    board.both[0], board.round[0] = 0, ordered + 1
    holder.give()
    went_on = in_order and until(lambda: min(board.inside) >= ordered + rounds and board.both[0] >= MANY)
    answer = {
        "in line": in_line,
        "in order": met,
        "rejected": rejected,
        "under load": min(board.inside) - ordered,
        "both": board.both[0],
    }
    board.over[0] = 1
    return answer | {
        "codes": [child.end() if went_on else child.kill() for child in children],
        "most": {name: most[0] for name, most in board.most.items()},
        "rejected at all": board.rejected[0],
        "empty": until(lambda: not store.snapshot() and not store.waiters()),
    }

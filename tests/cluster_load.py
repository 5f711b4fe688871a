"""A load on one store: threads and an event loop that take and give all the time, and count how many hold one slot at once."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from time import sleep
from types import TracebackType
from typing import Any, Self

from django_concurrency_mw.exceptions import BackendError
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot, Taken
from django_concurrency_mw.tokens import new_token

from .support import wait_until

CAP = 5
THREADS, TASKS, KEYS = 8, 12, 2


def pause() -> float:
    """Seconds until one asks again. At random: a loop that gives and takes in one packet would leave threads nothing."""
    return random.uniform(0, 0.005)


class Crew:
    """Threads that work between `with` and its end, which they see by `_ended`."""

    _threads: Sequence[threading.Thread]
    _ended = False

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads)


class Load(Crew):
    """Between `with` and its end. `errors`: the calls that failed, which is no end of it."""

    def __init__(
        self,
        take: Callable[[Sequence[Slot]], Any],
        give: Callable[[Sequence[Slot]], Any],
        atake: Callable[[Sequence[Slot]], Awaitable[Any]],
        agive: Callable[[Sequence[Slot]], Awaitable[Any]],
        ttl: float = 60.0,
    ) -> None:
        self._take, self._give, self._atake, self._agive, self._ttl = take, give, atake, agive, ttl
        self._lock = threading.Lock()
        self._inside: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._in_thread, args=(number,)) for number in range(THREADS)]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._on_loop())))
        #: Answers so far, of threads and of the loop; of those the refusals.
        self.answers = Counter[str]()
        self.full = self.most = 0
        self.errors: list[BackendError] = []

    def goes_on(self, answers: int = 60) -> bool:
        """So many more answers have come to the threads and to the loop, each."""
        before = Counter(self.answers)
        return wait_until(lambda: all(self.answers[half] >= before[half] + answers for half in ("threads", "loop")))

    def _slot(self, number: int) -> Slot:
        key = f"k{number % KEYS}"
        return Slot("load", make_key(key), CAP, self._ttl, new_token())

    def _heard(self, half: str, reply: Any, key: str) -> bool:
        with self._lock:
            self.answers[half] += 1
            if isinstance(reply, BackendError):
                self.errors.append(reply)
            elif not isinstance(reply, Taken):
                self.full += 1
            else:
                self._inside[key] += 1
                self.most = max(self.most, self._inside[key])
                return True
        return False

    def _leaves(self, key: str) -> None:
        with self._lock:
            self._inside[key] -= 1

    def _in_thread(self, first: int) -> None:
        for number in count(first):
            if self._ended:
                return
            one = self._slot(number)
            try:
                reply: Any = self._take([one])
            except BackendError as error:
                reply = error
            if self._heard("threads", reply, one.key.text):
                sleep(0.001)
                self._leaves(one.key.text)
                self._give([one])
            sleep(pause())

    async def _on_loop(self) -> None:
        await asyncio.gather(*(self._in_task(number) for number in range(TASKS)))

    async def _in_task(self, first: int) -> None:
        for number in count(first):
            if self._ended:
                return
            one = self._slot(number)
            try:
                reply: Any = await self._atake([one])
            except BackendError as error:
                reply = error
            if self._heard("loop", reply, one.key.text):
                await asyncio.sleep(0.001)
                self._leaves(one.key.text)
                await self._agive([one])
            await asyncio.sleep(pause())

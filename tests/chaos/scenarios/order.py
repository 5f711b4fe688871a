"""Many wait for one slot in several processes. They join one at a time, at the word of one who counts; each writes into one
file when it is in, and when it is about to leave."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from time import monotonic
from typing import Any

from django_concurrency_mw import hold
from django_concurrency_mw.backends import BaseBackend
from django_concurrency_mw.outcomes import Queued

from .common import Child, site

#: Seconds that each one waits at most.
WAIT = 300
GATE, OPEN = b"g", b"o"

#: To be called when this waiter stands in the line.
_joined: ContextVar[Callable[[], object]] = ContextVar("joined")


def order(backend: dict[str, Any], file: str, waiters: int, processes: int, half: str) -> dict[str, Any]:
    """`waiters` join one after another. Returns the seconds that it took them to join, and then to be served."""
    policies = {"line": {"key": "global", "max_concurrent": 1, "wait": WAIT, "max_waiting": waiters, "ttl": 600}}

    def work(orders: int, answers: int) -> None:
        store = site(backend, policies, MAX_SYNC_WAITERS=waiters)
        watch(store)
        log = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        if half == "threads":
            in_threads(orders, answers, log)
        else:
            asyncio.run(on_a_loop(orders, answers, log))

    children = [Child(work) for _ in range(processes)]
    began = monotonic()
    assert children[0].ask(GATE) == GATE
    for number in range(waiters):
        assert random.choice(children).ask(b"%4d" % number) == b"q"
    joined = monotonic()
    children[0].tell(OPEN)
    assert [child.end() for child in children] == [0] * processes
    return {"joining": joined - began, "serving": monotonic() - joined}


def watch(store: BaseBackend) -> None:
    """Whoever is told that it stands in line says so."""
    queue, aqueue = store.queue, store.aqueue

    def seen(reply: Any) -> Any:
        if isinstance(reply, Queued):
            _joined.get()()
        return reply

    async def awatched(*arguments: Any) -> Any:
        return seen(await aqueue(*arguments))

    store.queue = lambda *arguments: seen(queue(*arguments))  # type: ignore[method-assign]
    store.aqueue = awatched  # type: ignore[method-assign]


def write(log: int, number: int, what: str) -> None:
    os.write(log, f"{number} {what} {monotonic()}\n".encode())


def in_threads(orders: int, answers: int, log: int) -> None:
    threads: list[threading.Thread] = []
    gate = hold("line")

    def wait(number: int, joined: threading.Event) -> None:
        _joined.set(joined.set)
        with hold("line"):
            write(log, number, "in")
            write(log, number, "out")

    while first := os.read(orders, 1):
        if first == GATE:
            gate.__enter__()
            os.write(answers, GATE)
        elif first == OPEN:
            gate.__exit__(None, None, None)
        else:
            joined = threading.Event()
            threads.append(threading.Thread(target=wait, args=(int(first + os.read(orders, 3)), joined)))
            threads[-1].start()
            os.write(answers, b"q" if joined.wait(60) else b"?")
    for thread in threads:
        thread.join()


async def on_a_loop(orders: int, answers: int, log: int) -> None:
    tasks: list[asyncio.Task[None]] = []
    gate = hold("line")
    loop = asyncio.get_running_loop()

    async def wait(number: int, joined: asyncio.Event) -> None:
        _joined.set(joined.set)
        async with hold("line"):
            write(log, number, "in")
            write(log, number, "out")

    async def read(size: int) -> bytes:
        readable = asyncio.Event()
        loop.add_reader(orders, readable.set)
        await readable.wait()
        loop.remove_reader(orders)
        return os.read(orders, size)

    while first := await read(1):
        if first == GATE:
            await gate.__aenter__()
            os.write(answers, GATE)
        elif first == OPEN:
            await gate.__aexit__(None, None, None)
        else:
            joined = asyncio.Event()
            tasks.append(loop.create_task(wait(int(first + os.read(orders, 3)), joined)))
            await asyncio.wait_for(joined.wait(), 60)
            os.write(answers, b"q")
    await asyncio.gather(*tasks)


def lines_of(file: str) -> Sequence[tuple[int, str, float]]:
    """Who came in and left, in that order."""
    return [
        (int(number), what, float(stamp)) for number, what, stamp in map(str.split, Path(file).read_text().splitlines())
    ]

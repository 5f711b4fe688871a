"""How long a slot lies idle between two who want it: ours, beside polling `take` every 20 ms; and what a line costs others.

    python benchmarks/waiting.py [--seconds 3] [--waiters 20] [--json FILE]

Handover: in two processes 20 waiters want the one slot there is. It lasts from the moment before a holder gives back to the
moment at which the next one knows that it holds, be it in the other process; clocks are the same in both. `burst`: they come
together, each of them is served once, and so again; `steady`: whoever was served comes back at once, so that there are always
20, whose polls spread over the 20 ms. In turn, ours and polling, in threads and on event loops, on the host store and on a
Redis of its own (left out where there is no redis-server on PATH).

A give elsewhere: a take and give of another key whose policy waits too, with and without 1,000 waiters in another key's line.

Prints a table; --json writes the figures (seconds) to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from time import monotonic_ns, perf_counter, sleep
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django_concurrency_mw.backends import BackendConfig, BaseBackend
from django_concurrency_mw.backends.host.opening import SHARED_MEMORY
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.backends.memory import MemoryBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Queued, Slot, Taken
from django_concurrency_mw.tokens import new_token

PROCESSES = 2
#: Seconds between two questions of one who polls.
POLL = 0.02
#: Seconds that a slot is used.
USE = 0.0005
KEY, OTHER = make_key("user:42"), make_key("user:43")
#: Who waits in another key's line while gives are timed.
ELSEWHERE = 1000
Make = Callable[[], BaseBackend]


def slots(policy: str = "bench", key: Any = KEY, limit: int = 1) -> tuple[Slot, ...]:
    return (Slot(policy, key, limit, 60.0, new_token(), True, "/reports/export/", waits=True),)


class Shift:
    """What the processes of one measurement share. But for its end, only who holds the slot writes here."""

    def __init__(self, crowd: int, comes_back: bool) -> None:
        self.words = memoryview(mmap.mmap(-1, 32)).cast("Q")
        self.crowd, self.comes_back = crowd, comes_back
        self.times: list[float] = []

    @property
    def over(self) -> bool:
        return bool(self.words[1])

    def may_come(self, times: int) -> bool:
        """May one come who was served so many times?"""
        return self.over or self.comes_back or self.words[2] >= times * self.crowd

    def got(self) -> None:
        """Somebody holds it now."""
        now, gave = monotonic_ns(), self.words[0]
        if gave:
            self.times.append((now - gave) / 1e9)

    def give(self) -> None:
        self.words[2] += 1
        ends = not self.comes_back and self.words[2] % self.crowd == 0
        self.words[0] = 0 if ends else monotonic_ns()


def in_a_thread(store: BaseBackend, shift: Shift, polls: bool) -> None:
    times = 0
    while not shift.over:
        mine, bell = slots(), store.bell()
        while True:
            reply = store.take(mine) if polls else store.queue(mine, (1000,), bell)
            if isinstance(reply, Taken) or shift.over:
                break
            if isinstance(reply, Queued):
                bell.wait(reply.again)
            else:
                sleep(POLL)
        if isinstance(reply, Taken):
            shift.got()
            sleep(USE)
            shift.give()
        store.give(mine)
        bell.close()
        times += 1
        if polls and shift.comes_back:
            sleep(POLL)  # or it would take its own slot again, every time
        while not shift.may_come(times):
            sleep(0.001)


async def as_a_task(store: BaseBackend, shift: Shift, polls: bool) -> None:
    times = 0
    while not shift.over:
        mine, bell = slots(), store.abell()
        while True:
            reply = await store.atake(mine) if polls else await store.aqueue(mine, (1000,), bell)
            if isinstance(reply, Taken) or shift.over:
                break
            if isinstance(reply, Queued):
                await bell.await_(reply.again)
            else:
                await asyncio.sleep(POLL)
        if isinstance(reply, Taken):
            shift.got()
            await asyncio.sleep(USE)
            shift.give()
        await store.agive(mine)
        bell.close()
        times += 1
        if polls and shift.comes_back:
            await asyncio.sleep(POLL)
        while not shift.may_come(times):
            await asyncio.sleep(0.001)


def in_threads(store: BaseBackend, shift: Shift, crew: int, polls: bool) -> None:
    threads = [threading.Thread(target=in_a_thread, args=(store, shift, polls)) for _ in range(crew)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def on_a_loop(store: BaseBackend, shift: Shift, crew: int, polls: bool) -> None:
    async def main() -> None:
        await asyncio.gather(*[as_a_task(store, shift, polls) for _ in range(crew)])

    asyncio.run(main())


HALVES = {"threads": in_threads, "asyncio": on_a_loop}


def handovers(make: Make, half: str, shift: Shift, polls: bool, seconds: float) -> list[float]:
    """The seconds of each handover, in the order of their length."""
    children = []
    for _ in range(PROCESSES):
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                HALVES[half](make(), shift, shift.crowd // PROCESSES, polls)
                with os.fdopen(tell, "w") as answer:
                    json.dump(shift.times, answer)
            finally:
                os._exit(0)
        os.close(tell)
        children.append((pid, told))
    sleep(seconds)
    shift.words[1] = 1
    times: list[float] = []
    for pid, told in children:
        with os.fdopen(told) as answer:
            found = json.load(answer)
        times += found[len(found) // 10 :]  # until all of them stand in line
        os.waitpid(pid, 0)
    return sorted(times)


def gives(make: Make, waiters: int, rounds: int, calls: int) -> float:
    """Seconds of a take and give of another key than so many wait for: the best round, in which little else went on."""
    store = make()
    standing = [slots("elsewhere", OTHER) for _ in range(waiters + 1)]
    bell = store.bell()
    for one in standing if waiters else []:
        store.queue(one, (waiters,), bell)
    times = []
    for _ in range(rounds):
        began = perf_counter()
        for _ in range(calls):
            mine = slots(limit=1000)
            store.take(mine)
            store.give(mine)
        times.append((perf_counter() - began) / calls)
    for one in reversed(standing):
        store.give(one)
    bell.close()
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--waiters", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    server = None
    base = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None
    with tempfile.TemporaryDirectory(dir=base) as folder:
        table = {"path": Path(folder) / "table", "slots": 2 * ELSEWHERE + 200}
        stores: dict[str, Make] = {"host": lambda: HostBackend(BackendConfig("default", "host", options=table))}
        if shutil.which("redis-server"):
            from django_concurrency_mw.backends.redis.store import RedisBackend
            from tests.redis_server import RedisServer

            server = RedisServer()
            config = BackendConfig("default", "redis", server.url, "bench", {"socket_timeout": 5})
            stores["redis"] = lambda: RedisBackend(config)
        else:
            print("no redis-server on PATH, so Redis is left out")
        try:
            figures = measure(stores, options.waiters, options.seconds)
        finally:
            if server is not None:
                server.stop()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(stores: dict[str, Make], waiters: int, seconds: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"handover": {}, "give": {}}
    print(f"Python {sys.version.split()[0]}; handover, limit 1, {waiters} waiters over {PROCESSES} processes")
    print(f"{'':24}{'ours p50':>10}{'p99':>10}{'polling p50':>13}{'p99':>10}{'ratio p50':>11}")
    for name, half, comes in product(stores, HALVES, ("burst", "steady")):
        row = {}
        for way in ("ours", "polling"):
            shift = Shift(waiters, comes == "steady")
            times = handovers(stores[name], half, shift, way == "polling", seconds)
            row[way] = {
                "p50": statistics.median(times),
                "p99": times[len(times) * 99 // 100],
                "handovers": len(times),
            }
        ratio = row["ours"]["p50"] / row["polling"]["p50"]
        figures["handover"][f"{name}, {half}, {comes}"] = row | {"ratio": ratio}
        shown = [f"{row[way][each] * 1e3:.2f}ms" for way in row for each in ("p50", "p99")]
        print(f"{f'{name}, {half}, {comes}':24}{shown[0]:>10}{shown[1]:>10}{shown[2]:>13}{shown[3]:>10}{ratio:11.3f}")
    print(f"\n{'take and give':20}{'alone':>10}{f'{ELSEWHERE} wait elsewhere':>24}{'ratio':>9}")
    for name, make in {"memory": lambda: MemoryBackend(BackendConfig("default", "memory")), **stores}.items():
        alone, beside = gives(make, 0, 40, 250), gives(make, ELSEWHERE, 40, 250)
        figures["give"][name] = {"alone": alone, "beside": beside, "ratio": beside / alone}
        print(f"{name:20}{alone * 1e6:8.1f}us{beside * 1e6:22.1f}us{beside / alone:9.2f}")
    return figures


if __name__ == "__main__":
    main()

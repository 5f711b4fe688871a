"""What one slot costs on Redis, beside the two round trips that redis-py itself would make: EVALSHA, then ZREM.

    python benchmarks/redis_round_trips.py [--rounds 7] [--calls 3000]

Starts a Redis of its own, pins itself and Redis to one core (so that the figures are work, not luck with wake-ups), and runs
both in turn, round by round. Prints microseconds per acquire and release, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

import redis
import redis.asyncio

from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.redis.store import RedisBackend
from django_concurrency_mw.backends.redis.wire import TAKE
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.tokens import new_token
from tests.redis_server import RedisServer

KEY = make_key("user:42")
LIMIT, TTL = 1000, 60.0


def slots() -> tuple[Slot, ...]:
    return (Slot("report-exports", KEY, LIMIT, TTL, new_token(), True, "/reports/export/"),)


def in_threads(work: Callable[[int], None], threads: int, calls: int) -> float:
    """Seconds per call, `calls` shared out among the threads."""
    each = calls // threads
    start = perf_counter()
    if threads == 1:
        work(each)
    else:
        crowd = [threading.Thread(target=work, args=(each,)) for _ in range(threads)]
        for thread in crowd:
            thread.start()
        for thread in crowd:
            thread.join()
    return (perf_counter() - start) / (each * threads)


def on_a_loop(work: Callable[[int], object], at_once: int, calls: int) -> float:
    each = calls // at_once

    async def main() -> float:
        await work(20)  # type: ignore[misc]  # a coroutine: connections are made, scripts loaded
        start = perf_counter()
        await asyncio.gather(*(work(each) for _ in range(at_once)))  # type: ignore[misc]  # coroutines
        return (perf_counter() - start) / (each * at_once)

    return asyncio.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    server = RedisServer()
    try:
        client = redis.Redis(port=server.port)
        hiredis = "with" if redis.utils.HIREDIS_AVAILABLE else "without"
        print(
            f"Redis {server.version}, redis-py {redis.__version__} {hiredis} hiredis, Python {sys.version.split()[0]}, one core"
        )
        sha = client.script_load(TAKE.text.decode())
        store = RedisBackend(BackendConfig("default", "redis", server.url, "bench"))
        tokens = count()

        def ours(calls: int) -> None:
            for _ in range(calls):
                mine = slots()
                store.take(mine)
                store.give(mine)

        def raw(calls: int) -> None:
            for _ in range(calls):
                token = f"token-{next(tokens)}"
                client.evalsha(sha, 1, "raw", LIMIT, 60000, 1, token)
                client.zrem("raw", token)

        async def aours(calls: int) -> None:
            for _ in range(calls):
                mine = slots()
                await store.atake(mine)
                await store.agive(mine)

        def araw_with(aclient: redis.asyncio.Redis) -> Callable[[int], object]:
            async def araw(calls: int) -> None:
                for _ in range(calls):
                    token = f"token-{next(tokens)}"
                    await aclient.evalsha(sha, 1, "raw", str(LIMIT), "60000", "1", token)
                    await aclient.zrem("raw", token)

            return araw

        rows: list[tuple[str, Callable[[], float], Callable[[], float]]] = []
        for threads in (1, 8, 32):
            rows.append(
                (
                    f"threads, {threads} at once",
                    lambda threads=threads: in_threads(ours, threads, options.calls),
                    lambda threads=threads: in_threads(raw, threads, options.calls),
                )
            )
        for at_once in (1, 10, 100):
            rows.append(
                (
                    f"asyncio, {at_once} at once",
                    lambda at_once=at_once: on_a_loop(aours, at_once, options.calls),
                    lambda at_once=at_once: on_a_loop(
                        araw_with(redis.asyncio.Redis(port=server.port, max_connections=200)),
                        at_once,
                        options.calls,
                    ),
                )
            )
        print(f"{'':24}{'ours':>9}{'redis-py':>10}{'ratio':>8}")
        for name, mine, theirs in rows:
            mine(), theirs()
            pairs = [(mine(), theirs()) for _ in range(options.rounds)]
            a, b = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
            print(f"{name:24}{a:7.1f}us{b:8.1f}us{a / b:8.2f}")
    finally:
        server.stop()


if __name__ == "__main__":
    main()

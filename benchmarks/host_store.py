"""What one slot costs on the host store, beside SQLite (WAL) doing the same on one machine, and Redis's two round trips.

    python benchmarks/host_store.py [--rounds 20] [--slice 0.01]

Runs all of them in turn, in many short rounds, in one process on one core. Prints the microseconds of the best round, in which
the machine did little else, how often a take and give on the host store goes into that, and the other way round. Making the
slots is in each row; it is also shown by itself. SQLite has its file in the same directory in memory, and the settings that
people use with WAL. Redis is left out where there is no redis-server on PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from benchmarks.room import Cell, Effort, Room
from django_concurrency_mw.backends import BackendConfig
from django_concurrency_mw.backends.host.opening import SHARED_MEMORY
from django_concurrency_mw.backends.host.store import HostBackend
from django_concurrency_mw.keys import make_key
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.tokens import new_token

KEY = make_key("user:42")
TTL = 60.0
Work = Callable[[int], None]


def slots(limit: int, *policies: str) -> tuple[Slot, ...]:
    token = new_token()
    return tuple(Slot(policy, KEY, limit, TTL, token, True, "/reports/export/") for policy in policies)


def slots_alone(*policies: str) -> Work:
    def work(calls: int) -> None:
        for _ in range(calls):
            slots(1000, *policies)

    return work


def on_the_host(store: HostBackend, limit: int, *policies: str) -> Work:
    def work(calls: int) -> None:
        for _ in range(calls):
            mine = slots(limit, *policies)
            store.take(mine)
            store.give(mine)

    return work


def rejected(store: HostBackend, policy: str, limit: int) -> Work:
    def work(calls: int) -> None:
        for _ in range(calls):
            store.take(slots(limit, policy))

    return work


def on_sqlite(directory: Path) -> Work:
    base = sqlite3.connect(directory / "slots.sqlite3", isolation_level=None)
    base.execute("PRAGMA journal_mode=WAL")
    base.execute("PRAGMA synchronous=NORMAL")
    base.execute(
        "CREATE TABLE held (semaphore TEXT, token TEXT, ends REAL, PRIMARY KEY (semaphore, token)) WITHOUT ROWID"
    )

    def work(calls: int) -> None:
        for _ in range(calls):
            (mine,) = slots(1000, "sqlite")
            now = time()
            base.execute("BEGIN IMMEDIATE")
            (held,) = base.execute("SELECT count(*) FROM held WHERE semaphore = ? AND ends > ?", ("s", now)).fetchone()
            if held < mine.limit:
                base.execute("INSERT INTO held VALUES (?, ?, ?)", ("s", mine.token, now + TTL))
            base.execute("COMMIT")
            base.execute("DELETE FROM held WHERE semaphore = ? AND token = ?", ("s", mine.token))

    return work


def on_redis(port: int) -> Work:
    import redis

    client = redis.Redis(port=port)
    take = client.register_script(
        "if redis.call('ZCARD', KEYS[1]) < tonumber(ARGV[1]) then redis.call('ZADD', KEYS[1], ARGV[2], ARGV[3]) return 1 end"
    )

    def work(calls: int) -> None:
        for _ in range(calls):
            (mine,) = slots(1000, "redis")
            take(["raw"], [mine.limit, int(TTL), mine.token])
            client.zrem("raw", mine.token)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slice", type=float, default=0.01, help="seconds that each is timed at once")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    server = None
    base = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        directory = Path(name)
        store = HostBackend(BackendConfig("default", "host", options={"path": directory / "table"}))
        rows: dict[str, Work] = {"host: take + give": on_the_host(store, 1000, "one")}
        rows["host: three policies at once"] = on_the_host(store, 1000, "one", "two", "three")
        rows["one slot made, nothing else"] = slots_alone("one")
        rows["three slots made"] = slots_alone("one", "two", "three")
        for holders in (1, 10, 100, 1000):
            policy = f"full-{holders}"
            for _ in range(holders):
                store.take(slots(holders, policy))
            rows[f"host: rejection at {holders}"] = rejected(store, policy, holders)
        rows["SQLite, WAL: take + give"] = on_sqlite(directory)
        if shutil.which("redis-server"):
            from tests.redis_server import RedisServer

            server = RedisServer()
            rows["Redis: EVALSHA, ZREM"] = on_redis(server.port)
        else:
            print("no redis-server on PATH, so Redis is left out")
        room = Room(Effort(options.rounds, 3, options.slice))
        try:
            seconds = room.compare({row: Cell(work) for row, work in rows.items()})
        finally:
            room.close()
            if server is not None:
                server.stop()
        store.close()
    first = min(seconds["host: take + give"])
    print(f"Python {sys.version.split()[0]}, one core, {options.rounds} rounds")
    for row, times in seconds.items():
        print(f"{row:30}{min(times) * 1e6:9.1f} us{min(times) / first:8.2f}{first / min(times):8.3f}")


if __name__ == "__main__":
    main()

"""What the views themselves count, across processes and threads: in a file, or in a Redis that the limiter does not use.

With TEST_GAUGE_FILE: one line per entry and exit. Times are CLOCK_MONOTONIC, which all processes of a machine share. With
TEST_GAUGE_REDIS, a URL: one script per entry and exit, so what it counts is the order that they had there. Either way an
entry is counted after the slot was taken and an exit before it is given back, so the most ever inside is never more than the
limiter admitted.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic_ns
from typing import Any

STEP = """
local inside = redis.call('HINCRBY', KEYS[1], 'inside', ARGV[1])
if ARGV[1] == '1' then
  redis.call('HINCRBY', KEYS[1], 'admitted', 1)
  if inside > tonumber(redis.call('HGET', KEYS[1], 'most') or '0') then redis.call('HSET', KEYS[1], 'most', inside) end
  redis.call('SADD', 'processes', ARGV[2])
end
return inside
"""


@dataclass
class Reading:
    admitted: int = 0
    inside: int = 0
    most: int = 0


@cache
def _script(url: str, pid: int) -> Any:
    # Imported here: the file needs no redis-py.
    import redis

    return redis.Redis.from_url(url).register_script(STEP)


def _write(name: str, change: int) -> None:
    url = os.environ.get("TEST_GAUGE_REDIS")
    if url:
        _script(url, os.getpid())(keys=[name], args=[change, os.getpid()])
    path = os.environ.get("TEST_GAUGE_FILE")
    if path:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(fd, f"{monotonic_ns()} {change:+d} {name}\n".encode())
        finally:
            os.close(fd)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Count somebody in for the length of the block."""
    _write(name, 1)
    try:
        yield
    finally:
        _write(name, -1)


def read(path: str) -> dict[str, Reading]:
    """Replay the file. An exit and an entry at one stamp: the exit first, as nothing tells their order."""
    readings: defaultdict[str, Reading] = defaultdict(Reading)
    with open(path) as lines:
        events = sorted((int(stamp), int(change), name) for stamp, change, name in (line.split() for line in lines))
    for _, change, name in events:
        reading = readings[name]
        reading.inside += change
        reading.admitted += change > 0
        reading.most = max(reading.most, reading.inside)
    return readings


def read_redis(client: Any, name: str) -> Reading:
    """What was counted in the Redis since it was last flushed. Its set `processes` has the pids of those who counted."""
    return Reading(**{field.decode(): int(value) for field, value in client.hgetall(name).items()})

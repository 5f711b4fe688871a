"""The floor: two raw redis-py round trips, EVALSHA of the least script that counts holders, and ZREM."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import redis
import redis.asyncio

if TYPE_CHECKING:
    from .room import Awork, Work

#: Let in who finds room among those whose lease has not ended: what any semaphore on a sorted set has to ask.
TAKE = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[2])
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], ARGV[3], ARGV[4])
redis.call('PEXPIRE', KEYS[1], 60000)
return 1
"""
_tokens = count()


def raw2(url: str) -> Work:
    client = redis.Redis.from_url(url)
    sha = client.script_load(TAKE)

    def work(calls: int) -> None:
        for _ in range(calls):
            token = f"token-{next(_tokens)}"
            client.evalsha(sha, 1, "raw", 1000, 1, 9_000_000, token)
            client.zrem("raw", token)

    return work


def araw2(url: str) -> Awork:
    client = redis.asyncio.Redis.from_url(url, max_connections=200)
    sha = redis.Redis.from_url(url).script_load(TAKE)

    async def work(calls: int) -> None:
        for _ in range(calls):
            token = f"token-{next(_tokens)}"
            await client.evalsha(sha, 1, "raw", 1000, 1, 9_000_000, token)
            await client.zrem("raw", token)

    return work

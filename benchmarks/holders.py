"""Fills a key: so many others hold it while requests take and give, until the process ends."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from time import time
from typing import Any

from django.core.handlers.wsgi import WSGIRequest

from django_concurrency_mw import conf
from django_concurrency_mw.backends import get_backend
from django_concurrency_mw.outcomes import Slot
from django_concurrency_mw.tokens import new_token

from . import handlers

#: Seconds for which they hold: longer than any run.
LEASE = 3600.0


@cache
def fill(store_name: str, path: str, holders: int, middleware: bool = False) -> None:
    """So many hold what a request for this path takes."""
    if not holders:
        return
    store = get_backend(store_name, conf.current().backends)
    slot = _slot_of(store, path, middleware)
    if store_name == "redis":
        _fill_redis(store, slot, holders)
        return
    for _ in range(holders):
        store.take((replace(slot, token=new_token(), ttl=LEASE, memo=[]),))


def _slot_of(store: Any, path: str, middleware: bool) -> Slot:
    """What a request for the path asks the store for."""
    seen: list[Slot] = []
    take = store.take

    def told(slots: tuple[Slot, ...]) -> Any:
        seen.extend(slots)
        return take(slots)

    store.take = told
    try:
        handlers.handler(False, middleware).get_response(WSGIRequest(handlers.environ(path)))
    finally:
        del store.take
    return seen[0]


def _fill_redis(store: Any, slot: Slot, holders: int) -> None:
    """Without a round trip each: one is taken, and the others are copies of its member under tokens of their own."""
    import redis

    client = redis.Redis.from_url(store.config.location)
    first = replace(slot, token=new_token(), ttl=LEASE, memo=[])
    store.take((first,))
    key = next(
        key for key in client.scan_iter(match="{bench*", count=1000, _type="zset") if slot.policy.encode() in key
    )
    member: bytes = client.zrange(key, 0, -1)[0]  # type: ignore[assignment]  # as no decoding is asked for
    _, _, rest = member.partition(b"\n")
    ends = (time() + LEASE) * 1000
    for start in range(1, holders, 10_000):
        many = {new_token().encode() + b"\n" + rest: ends for _ in range(start, min(holders, start + 10_000))}
        client.zadd(key, many)
    client.pexpire(key, int(LEASE * 1000))
    held = client.zcard(key)
    assert held == holders, f"{held} hold {key!r}, not {holders}"

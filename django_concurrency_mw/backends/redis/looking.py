"""The looks: what people ask of the store by hand, over an ordinary client; and the evictions that they order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redis.exceptions import NoPermissionError

from ...tokens import process_of
from ..base import Holder, Waiter
from . import wire
from .connecting import Recipe
from .errors import classed


class Looks:
    """At one alias. Each takes its own time, and a connection of its own. Raises: BackendError."""

    def __init__(self, recipe: Recipe, keys: wire.Keys) -> None:
        self._recipe, self._keys = recipe, keys

    def holders(self) -> Sequence[Holder]:
        """Who holds what now."""
        found: list[Holder] = []
        with self._client() as client:
            now = _micros(client) / 1000
            for key in client.scan_iter(match=self._keys.pattern, count=1000, _type="zset"):
                for member, ends in client.zrangebyscore(key, now, "+inf", withscores=True):
                    if not wire.is_filler(member):
                        found.append(wire.holder(key, self._keys.prefix, member, ends, now))
            known = self._processes(client, {process_of(one.token) for one in found})
        return [wire.with_process(one, known) for one in found]

    def waiters(self) -> Sequence[Waiter]:
        """Who waits for what now; without those who have not asked for long."""
        found: list[Waiter] = []
        with self._client() as client:
            now = _micros(client)
            for line in client.scan_iter(match=self._keys.lines_pattern, count=1000, _type="zset"):
                standing = client.zrangebyscore(line, "-inf", "+inf", withscores=True)
                if not standing:
                    continue
                records = client.mget([self._keys.waiter(token) for token, _ in standing])
                living = [(joined, record) for (_, joined), record in zip(standing, records, strict=True) if record]
                found += [
                    wire.waiting(line, self._keys.prefix, place, joined, now, record)
                    for place, (joined, record) in enumerate(living, 1)
                ]
            known = self._processes(client, {process_of(one.token) for one in found})
        return [wire.with_process(one, known) for one in found]

    def evict(self, token: str) -> bool:
        """Take a holder's slots away. Was there such a holder?"""
        found = False
        mine = wire.exactly(token.encode() + b"\n") + b"*"
        with self._client() as client:
            for key in client.scan_iter(match=self._keys.pattern, count=1000, _type="zset"):
                for member, _ in client.zscan_iter(key, match=mine, count=1000):
                    if not wire.is_filler(member):
                        gone = client.eval(wire.EVICT.text, 2, key, self._keys.tombstones, member, token)
                        found = bool(gone) or found
        return found

    def peaks(self) -> Mapping[str, int]:
        """Policy -> the most that was in flight on one of its keys."""
        with self._client() as client:
            found = client.zrangebyscore(self._keys.peaks, "-inf", "+inf", withscores=True)
        return {policy.decode("utf-8", "replace"): int(most) for policy, most in found}

    def reset_peaks(self) -> None:
        """Forget them."""
        with self._client() as client:  # a command that requests need, too: no more has to be allowed
            client.zremrangebyscore(self._keys.peaks, "-inf", "+inf")

    def _processes(self, client: Any, names: Collection[str]) -> dict[str, bytes | None]:
        """What these processes say of themselves; nothing where the user of LOCATION may not read that."""
        if not names:
            return {}
        try:
            return dict(zip(names, client.mget([self._keys.process(name) for name in names]), strict=True))
        except NoPermissionError:
            return {}

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            with self._recipe.client() as client:
                yield client
        except Exception as error:
            raise classed(error, self._keys) from error


def _micros(client: Any) -> int:
    """The server's clock."""
    seconds, micros = client.time()
    return int(seconds) * 1_000_000 + int(micros)

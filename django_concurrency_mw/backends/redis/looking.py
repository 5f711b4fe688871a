"""The looks: what people ask of the store by hand, over ordinary clients; and the evictions that they order.

In a Cluster, keys may be at two nodes while their slot moves: then both are asked, the one that it is leaving first. A key that
moves meanwhile answers with Ask there, and comes at the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import redis
from redis.exceptions import ConnectionError, NoPermissionError, TimeoutError

from ...tokens import process_of
from ..base import Holder, Waiter
from . import wire
from .connecting import Recipe
from .errors import classed
from .redirects import Ask, Moved

Answer = TypeVar("Answer")
Clients = Sequence[Any]


class Looks:
    """At one alias. Each takes its own time, and connections of its own. Raises: BackendError."""

    def __init__(self, recipe: Recipe, keys: wire.Keys) -> None:
        self._recipe, self._keys = recipe, keys

    def holders(self) -> Sequence[Holder]:
        """Who holds what now."""
        return self._ask(self._holders)

    def waiters(self) -> Sequence[Waiter]:
        """Who waits for what now; without those who have not asked for long."""
        return self._ask(self._waiters)

    def evict(self, token: str) -> bool:
        """Take a holder's slots away. Was there such a holder?"""
        return self._ask(lambda clients: self._evict(clients, token))

    def peaks(self) -> Mapping[str, int]:
        """Policy -> the most that was in flight on one of its keys."""
        return self._ask(self._peaks)

    def reset_peaks(self) -> None:
        """Forget them."""
        self._ask(self._reset_peaks)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _holders(self, clients: Clients) -> Sequence[Holder]:
        now = _micros(clients[0]) / 1000
        found: dict[tuple[bytes, bytes], Holder] = {}  # one whose key moves meanwhile may be met twice
        for client, key in _keys(clients, self._keys.pattern):
            with suppress(Ask):
                for member, ends in client.zrangebyscore(key, now, "+inf", withscores=True):
                    if not wire.is_filler(member):
                        found[key, member] = wire.holder(key, self._keys.prefix, member, ends, now)
        known = self._processes(clients, {process_of(one.token) for one in found.values()})
        return [wire.with_process(one, known) for one in found.values()]

    def _waiters(self, clients: Clients) -> Sequence[Waiter]:
        now = _micros(clients[0])
        lines: dict[bytes, list[tuple[bytes, float]]] = {}
        for client, line in _keys(clients, self._keys.lines_pattern):
            with suppress(Ask):
                lines[line] = client.zrangebyscore(line, "-inf", "+inf", withscores=True) or lines.get(line, [])
        found: list[Waiter] = []
        for line, standing in lines.items():
            records = _values(clients, [self._keys.waiter(token) for token, _ in standing])
            living = [(joined, record) for (_, joined), record in zip(standing, records, strict=True) if record]
            found += [
                wire.waiting(line, self._keys.prefix, place, joined, now, record)
                for place, (joined, record) in enumerate(living, 1)
            ]
        known = self._processes(clients, {process_of(one.token) for one in found})
        return [wire.with_process(one, known) for one in found]

    def _evict(self, clients: Clients, token: str) -> bool:
        found = False
        mine = wire.exactly(token.encode() + b"\n") + b"*"
        for client, key in _keys(clients, self._keys.pattern):
            with suppress(Ask):
                for member, _ in client.zscan_iter(key, match=mine, count=1000):
                    if not wire.is_filler(member):
                        gone = client.eval(wire.EVICT.text, 2, key, self._keys.tombstones, member, token)
                        found = bool(gone) or found
        return found

    def _peaks(self, clients: Clients) -> Mapping[str, int]:
        found: dict[bytes, float] = {}
        for client in clients:
            with suppress(Ask):
                found |= client.zrangebyscore(self._keys.peaks, "-inf", "+inf", withscores=True)
        return {policy.decode("utf-8", "replace"): int(most) for policy, most in found.items()}

    def _reset_peaks(self, clients: Clients) -> None:
        for client in clients:
            with suppress(Ask):  # by a command that requests need, too: no more has to be allowed
                client.zremrangebyscore(self._keys.peaks, "-inf", "+inf")

    def _processes(self, clients: Clients, names: Collection[str]) -> dict[str, bytes | None]:
        """What these processes say of themselves; nothing where the user of LOCATION may not read that."""
        try:
            return dict(zip(names, _values(clients, [self._keys.process(name) for name in names]), strict=True))
        except NoPermissionError:
            return {}

    def _ask(self, ask: Callable[[Clients], Answer]) -> Answer:
        def answer() -> Answer:
            with self._clients() as clients:
                return ask(clients)

        try:
            try:
                return answer()
            except Moved as error:  # meanwhile
                self._recipe.where.was_wrong(error)
                return answer()
        except Exception as error:
            raise classed(error, self._keys) from error

    @contextmanager
    def _clients(self) -> Iterator[Clients]:
        """One for each node that has keys of this alias: one, but two while the slot moves, the old one first.

        Raises: RedisError, OSError.
        """
        with ExitStack() as stack:
            if not self._recipe.nodes:
                yield [stack.enter_context(self._recipe.client())]
                return
            for last in (False, False, True):
                try:
                    client = stack.enter_context(self._recipe.client())
                    found = [client]
                    # There is never such a key: so a node that the slot is leaving says which one it is moving to.
                    client.zcard(self._keys.prefix + b"!nothing")
                except Ask as asked:
                    found.append(stack.enter_context(self._recipe.client(asked.node, _AskingClient)))
                except (ConnectionError, TimeoutError) as error:
                    if not self._recipe.where.was_wrong(error) or last:
                        raise
                    continue
                break
            yield found


class _AskingClient(redis.Redis):
    """For the node that a slot is moving to, whose keys it names only to those who say ASKING before each command."""

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        ask: Any = super().execute_command
        ask("ASKING")
        return ask(*arguments, **options)


def _keys(clients: Clients, pattern: bytes) -> Iterator[tuple[Any, bytes]]:
    """Each sorted set of this name, with who has it."""
    for client in clients:
        for key in client.scan_iter(match=pattern, count=1000, _type="zset"):
            yield client, key


def _values(clients: Clients, names: Sequence[bytes]) -> list[bytes | None]:
    """What these strings are, wherever they are."""
    if not names:
        return []
    if len(clients) == 1:
        return list(clients[0].mget(names))
    found: dict[bytes, bytes | None] = dict.fromkeys(names)
    for client in clients:
        for name in names:
            with suppress(Ask):
                (value,) = client.mget([name])
                found[name] = found[name] or value
    return [found[name] for name in names]


def _micros(client: Any) -> int:
    """The server's clock."""
    seconds, micros = client.time()
    return int(seconds) * 1_000_000 + int(micros)

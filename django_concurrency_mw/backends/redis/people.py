"""What is asked by hand or once in a while: who holds what, peaks, evicting. By ordinary clients, which nobody waits for.

In a Cluster, keys may be at two nodes while their slot moves: then both are asked, the one that it is leaving first. A key that
moves meanwhile answers with Ask there, and comes at the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.exceptions import ConnectionError, NoPermissionError, ResponseError, TimeoutError

from ...tokens import process_of
from ..base import Holder
from . import wire
from .connecting import Recipe
from .redirects import Ask, tries_again


class _AskingClient(redis.Redis):
    """For the node that a slot is moving to, whose keys it names only to those who say ASKING before each command."""

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        ask: Any = super().execute_command
        ask("ASKING")
        return ask(*arguments, **options)


@contextlib.contextmanager
def clients(recipe: Recipe, keys: wire.Keys) -> Iterator[list[redis.Redis]]:
    """Ordinary clients of all nodes that have keys of this alias: one, but two while the slot moves, the old one first.

    Raises: RedisError, OSError.
    """
    with contextlib.ExitStack() as stack:
        if not recipe.nodes:
            yield [stack.enter_context(recipe.client())]
            return
        for last in (False, False, True):
            try:
                client = stack.enter_context(recipe.client())
                found = [client]
                # There is never such a key: so a node that the slot is leaving says which one it is moving to.
                client.zcard(keys.prefix + b"!nothing")
            except Ask as asked:
                found.append(stack.enter_context(recipe.client(asked.node, _AskingClient)))
            except (ConnectionError, TimeoutError) as error:
                if not recipe.where.was_wrong(error) or last:
                    raise
                continue
            break
        yield found


def evict(clients: Sequence[Any], keys: wire.Keys, token: str) -> bool:
    found = False
    named = wire.exactly(token.encode() + b"\n") + b"*"
    for client, key in _semaphores(clients, keys):
        with contextlib.suppress(Ask):
            for member, _ in client.zscan_iter(key, match=named, count=1000):
                if not wire.is_filler(member):
                    gone = client.eval(wire.EVICT.text, 2, key, keys.tombstones, member, token)
                    found = bool(gone) or found
    return found


def snapshot(clients: Sequence[Any], keys: wire.Keys) -> Sequence[Holder]:
    seconds, micros = clients[0].time()
    now = seconds * 1000 + micros / 1000
    holders: dict[tuple[bytes, bytes], Holder] = {}  # one whose key moves meanwhile may be met twice
    for client, key in _semaphores(clients, keys):
        with contextlib.suppress(Ask):
            for member, ends in client.zrangebyscore(key, now, "+inf", withscores=True):
                if not wire.is_filler(member):
                    holders[key, member] = wire.holder(key, keys.prefix, member, ends, now)
    names = {process_of(one.token) for one in holders.values()}
    known: dict[str, bytes | None] = {}
    for client in clients:
        known |= {name: said for name, said in _processes(client, keys, names).items() if said is not None}
    return [wire.with_process(one, known) for one in holders.values()]


def peaks(clients: Sequence[Any], keys: wire.Keys) -> Mapping[str, int]:
    found: dict[bytes, int] = {}
    for client in clients:
        with contextlib.suppress(Ask):
            said = client.zrangebyscore(keys.peaks, "-inf", "+inf", withscores=True)
            found |= {policy: int(most) for policy, most in said}
    return {policy.decode("utf-8", "replace"): most for policy, most in found.items()}


def reset_peaks(clients: Sequence[Any], keys: wire.Keys) -> None:
    for client in clients:
        with contextlib.suppress(Ask):  # by a command that requests need, too: no more has to be allowed
            client.zremrangebyscore(keys.peaks, "-inf", "+inf")


def _semaphores(clients: Sequence[Any], keys: wire.Keys) -> Iterator[tuple[Any, bytes]]:
    """Each semaphore, with who has it."""
    for client in clients:
        for key in client.scan_iter(match=keys.pattern, count=1000, _type="zset"):
            yield client, key


def _processes(client: Any, keys: wire.Keys, names: Collection[str]) -> dict[str, bytes | None]:
    """What these processes say of themselves; nothing where the user of LOCATION may not read that."""
    if not names:
        return {}
    try:
        return dict(zip(names, client.mget([keys.process(name) for name in names]), strict=True))
    except NoPermissionError:
        return {}
    except ResponseError as error:
        if isinstance(error, Ask) or tries_again(error):  # some are at the other node
            return {}
        raise

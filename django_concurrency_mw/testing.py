"""Tools for a project's own tests: fill a limit's slots, and assert that none was left behind.

Both read the settings in force when they are entered, so `override_settings` may stand around them or inside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from time import monotonic, sleep
from types import TracebackType

from asgiref.sync import sync_to_async
from django.core.exceptions import ImproperlyConfigured

from . import conf, decorators
from .backends import BaseBackend, Holder
from .backends.base import Restore, Waiter
from .blocks import Block
from .effects import Ask, Steps, Take
from .exceptions import BackendError, did_you_mean, shown
from .held import Held, by_store
from .kept import is_kept_of
from .keys import make_key, written
from .lease import Lease
from .limiter import store_of
from .outcomes import UNLIMITED, Key, Slot, StoreFailed, Taken
from .policies import Policy
from .steps import failed
from .tokens import new_token

__all__ = ["aassert_no_slots_held", "assert_no_slots_held", "hold_slots"]

#: The path of the holders that `hold_slots` makes, for whoever reads a list of holders.
PATH = "hold_slots()"
#: Slots that one take asks for.
AT_ONCE = 100
#: Seconds between two looks at what is held.
LOOK_EVERY = 0.01
#: Seconds that the end of `hold_slots` waits for its releases to be carried out.
GIVEN_WITHIN = 1.0


def hold_slots(policy: str, key: str | None = None, n: int = 1) -> HeldSlots:
    """Fill `n` slots for the length of a `with` or `async with` block, whatever the limit: nested blocks add up.

    `policy` is the name of a policy of the table, or the `name=` of a `@concurrency_limit`. `key` is resolved text as in
    `per_key` ("user:42"; a header's or session's value raw or as a digest); only `key: global` may go without. The slots are
    renewed until the block ends, whatever the policy's `renew` and `max_age`, and no signal tells of them. When it ends
    exactly these are given back to the store they were taken from, and the store has been seen to have done it (within 1 s).

    Raises, when the block is entered: ImproperlyConfigured for an unknown policy or store; BackendError where the store
    fails; TypeError or ValueError for wrong arguments, at once.
    """
    return HeldSlots(policy, key, n)


class HeldSlots(Block[None]):
    """One block of `hold_slots`, or several one after another."""

    called = "hold_slots"

    def __init__(self, policy: str, key: str | None, n: int) -> None:
        if not isinstance(policy, str):
            raise TypeError(f"hold_slots: expected the name of a policy, got {shown(policy)}")
        if key is not None and (not isinstance(key, str) or not key):
            raise TypeError(f"hold_slots: expected key to be text such as 'user:42', got {shown(key)}")
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"hold_slots: expected n to be a number of slots, got {shown(n)}")
        if n < 0:
            raise ValueError(f"hold_slots: expected n to be 0 or more, got {n}")
        super().__init__()
        self._name, self._key, self._number = policy, key, n

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease = self._end()
        held = lease.holdings()
        lease.release()
        _await_given(held)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease = self._end()
        held = lease.holdings()
        await lease.arelease()
        await sync_to_async(_await_given, thread_sensitive=False)(held)

    def steps(self, lease: Lease) -> Steps[None]:
        for store, policy, key in self._semaphores():
            for first in range(0, self._number, AT_ONCE):
                yield from self._fill(lease, store, policy, key, min(AT_ONCE, self._number - first))

    def _semaphores(self) -> list[tuple[BaseBackend, Policy, Key]]:
        """Usually one. Decorators of one name may have several stores, and a key that was written raw may be a digest too."""
        config = conf.current()
        known = _policies(self._name, config)
        if not known:
            raise _unknown("hold_slots", self._name, config)
        found: dict[tuple[int, bytes], tuple[BaseBackend, Policy, Key]] = {}
        for policy in known:
            if self._key is not None:
                keys = written(policy, self._key)
            elif policy.key.kind == "global":
                keys = (make_key("global"),)
            else:
                raise TypeError(
                    f"hold_slots: policy {policy.name} counts by {policy.key.text!r}; give key, such as 'user:42'"
                )
            store = store_of(policy, config)
            for key in keys:
                found.setdefault((id(store), key.digest), (store, replace(policy, renew=True, max_age=None), key))
        return list(found.values())

    def _fill(self, lease: Lease, store: BaseBackend, policy: Policy, key: Key, number: int) -> Steps[None]:
        slots = tuple(
            Slot(policy.name, key, UNLIMITED, policy.ttl, new_token(), path=PATH, waits=policy.wait > 0)
            for _ in range(number)
        )
        lease.expect(store, [policy] * number, slots)
        reply = yield from Take(store, slots)
        if isinstance(reply, StoreFailed):
            failed(lease, slots, reply)
            raise BackendError(f"hold_slots: backend {store.config.alias} fails: {reply.error}") from reply.error
        got = slots if isinstance(reply, Taken) else (yield from _past_the_line(store, slots))
        lease.confirm(slots, got)
        if len(got) < number:
            raise BackendError(
                f"hold_slots: backend {store.config.alias} is full, though no limit was asked for: requests wait in line there"
            )


def _past_the_line(store: BaseBackend, slots: tuple[Slot, ...]) -> Steps[tuple[Slot, ...]]:
    """No take overtakes those who wait; a holder that is counted again asks neither the limit nor the line. Returns who is."""
    holders = [Restore(slot, slot.ttl, float("inf")) for slot in slots]
    counted = yield from Ask[Sequence[bool]](store.restore, (holders,))
    return tuple(slot for slot, is_counted in zip(slots, counted, strict=True) if is_counted)


def assert_no_slots_held(policy: str | None = None, key: str | None = None, *, timeout: float = 1.0) -> None:
    """Assert that nobody holds a slot or waits for one, in any store that the settings in force use; or none of this policy,
    of this key.

    Waits up to `timeout` seconds for what is just being given back. A store that others share (Redis, `host`) is asked for
    all holders under its KEY_PREFIX, those of other processes included. `key` is as in `hold_slots`.

    Raises: AssertionError, a line for each holder and waiter with its policy, key, age and path; ImproperlyConfigured for an
    unknown policy (a name with a dot may be a view's); BackendError where a store cannot be asked; NotImplementedError where
    one cannot list its holders. Blocks: on an event loop use `aassert_no_slots_held`.
    """
    look = _Look(policy, key)
    end = monotonic() + timeout
    while (found := look.found()) and monotonic() < end:
        sleep(LOOK_EVERY)
    look.refuse(found)


async def aassert_no_slots_held(policy: str | None = None, key: str | None = None, *, timeout: float = 1.0) -> None:
    """`assert_no_slots_held` on an event loop, which goes on meanwhile, and with it whatever gives slots back there."""
    look = _Look(policy, key)
    end = monotonic() + timeout
    while (found := await sync_to_async(look.found, thread_sensitive=False)()) and monotonic() < end:
        await asyncio.sleep(LOOK_EVERY)
    look.refuse(found)


class _Look:
    """What is asked about: the stores in use, and which of their holders and waiters count."""

    def __init__(self, policy: str | None, key: str | None) -> None:
        config = conf.current()
        known = () if policy is None else _policies(policy, config)
        if policy is not None and not known and "." not in policy:
            raise _unknown("assert_no_slots_held", policy, config)
        self._policy = policy
        self._keys: set[str] | None = None
        if key is not None:
            self._keys = {key} | {each.text for one in known for each in written(one, key)}
        self._stores = _stores(config)

    def found(self) -> list[tuple[BaseBackend, Holder | Waiter]]:
        # Waiters first: one whose turn comes in between is seen twice, and not never.
        waiters: list[tuple[BaseBackend, Holder | Waiter]] = [
            (store, waiter) for store in self._stores for waiter in store.waiters()
        ]
        holders = [(store, holder) for store in self._stores for holder in store.snapshot()]
        return [(store, one) for store, one in [*holders, *waiters] if self._is_meant(one)]

    def refuse(self, found: Sequence[tuple[BaseBackend, Holder | Waiter]]) -> None:
        """Raises: AssertionError where there are any."""
        if found:
            lines = [
                f"policy {one.policy}, key {one.key!r}, {_stands(one)}for {one.age:.1f} s, path {one.path!r} "
                f"(backend {store.config.alias})"
                for store, one in found
            ]
            held = sum(isinstance(one, Holder) for _, one in found)
            said = []
            if held:
                said.append("1 slot is held" if held == 1 else f"{held} slots are held")
            if len(lines) > held:
                waiting = len(lines) - held
                said.append("1 place in a line is taken" if waiting == 1 else f"{waiting} places in lines are taken")
            raise AssertionError("\n  ".join([f"{' and '.join(said)}:", *lines]))

    def _is_meant(self, holder: Holder | Waiter) -> bool:
        if self._policy is not None and not is_kept_of(holder.policy, self._policy):
            return False
        return self._keys is None or any(is_kept_of(holder.key, key) for key in self._keys)


def _stands(one: Holder | Waiter) -> str:
    return f"waits at place {one.place} " if isinstance(one, Waiter) else ""


def _policies(name: str, config: conf.Config) -> list[Policy]:
    """The table's policy of that name, else those of the decorators with that `name=`."""
    policy = config.table.get(name)
    if policy is not None:
        return [policy]
    return [limit.policy(name, config) for limit in _limits() if limit.name == name]


def _unknown(tool: str, name: str, config: conf.Config) -> ImproperlyConfigured:
    names = [known.name for known in config.table] + [limit.name for limit in _limits() if limit.name is not None]
    return ImproperlyConfigured(
        f"{tool}: no policy {name!r} in CONCURRENCY_LIMIT['POLICIES'], and no @concurrency_limit(name={name!r}) "
        "that is imported" + did_you_mean(name, names)
    )


def _stores(config: conf.Config) -> list[BaseBackend]:
    """Those that policies and decorators use, and those that were used under this configuration."""
    stores = {id(store): store for store in list(config.stores.values())}
    for policy in (*config.table, *_made(config)):
        try:
            store = store_of(policy, config)
        except ImproperlyConfigured:  # it holds nothing: every request that would use it gets this error
            continue
        stores[id(store)] = store
    return list(stores.values())


def _made(config: conf.Config) -> Iterator[Policy]:
    """A policy of each decorator that is imported, by a name that the table does not have where the view's is not known."""
    name = "view"
    while config.table.get(name) is not None:
        name += "_"
    for limit in _limits():
        try:
            yield limit.policy(name, config)
        except ImproperlyConfigured:
            continue


def _limits() -> list[decorators.Limit]:
    return sorted(decorators.limits, key=lambda limit: limit.place)


def _await_given(held: Sequence[Held]) -> None:
    """Until the stores have carried it out: a release to Redis is sent, and the next request must not overtake it."""
    end = monotonic() + GIVEN_WITHIN
    for store, group in by_store(held):
        tokens = {one.slot.token for one in group}
        while not _is_given(store, tokens) and monotonic() < end:
            sleep(LOOK_EVERY)


def _is_given(store: BaseBackend, tokens: set[str]) -> bool:
    try:
        return tokens.isdisjoint(holder.token for holder in store.snapshot())
    except Exception:  # a store that is away, or that cannot list its holders: a block's end raises nothing of its own
        return True

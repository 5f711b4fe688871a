"""The decisions of an acquisition, without any I/O: a generator of typed effects that two drivers carry out.

The same steps serve threads and event loops. They only take: before a take is asked for, what it will hold is written into
the lease, and whoever called them gives the lease back. (Steps that gave back in their own `finally` would leak whenever
the generator is closed half way.)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .effects import Give, Steps, Take
from .outcomes import (
    Asked,
    Concurrency,
    Full,
    KeyMissing,
    LimitField,
    PolicyResult,
    Reason,
    Rejection,
    Slot,
    State,
    StoreFailed,
    Taken,
    TakeReply,
    Verdict,
)
from .queueing import Waited, Waiting, wait

if TYPE_CHECKING:
    from .policies import Policy

OnError = Literal["local", "allow", "deny"]

#: Seconds, at random, until the line itself can tell how long a slot takes.
RETRY_AFTER = (1, 5)


class Store(Protocol):
    """What the steps need to know of a backend."""

    @property
    def is_local(self) -> bool: ...


class Ledger(Waiting, Protocol):
    """The lease, as the steps see it."""

    def expect(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> None:
        """These slots, one for each policy, may be held from now on."""

    def confirm(self, asked: Sequence[Slot], got: Sequence[Slot]) -> bool:
        """Of what one take asked for, these are held and the others are not. False: all was given back meanwhile, which the
        take may have overtaken."""

    def holds_elsewhere(self, store: Any) -> bool:
        """Is something held, or in the course of being taken, in another store?"""

    def doubt(self, asked: Sequence[Slot]) -> None:
        """The take failed, so nobody knows whether they are held: they have to be given back all the same."""

    def uncounted(self, store: Any, slots: Sequence[Slot]) -> tuple[int, ...]:
        """After `confirm`: how many of each are held in the store's stead, and not counted there; empty where none is."""

    def stand_in(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> tuple[bool, tuple[int, ...]]:
        """The store failed: this process's own count decides. All of the slots or none; with the counts."""

    def release(self) -> None:
        """Give everything back."""

    def hand_over(self) -> str:
        """See `Concurrency.hand_over`."""


class Begun(Take):
    """A take that was asked for at once, at the monotonic second `began`, and its reply."""

    __slots__ = ("asked", "began", "reply")

    def __init__(
        self,
        store: Any,
        slots: tuple[Slot, ...],
        asked: Sequence[Asked],
        reply: TakeReply | StoreFailed,
        began: float,
    ) -> None:
        super().__init__(store, slots)
        self.asked, self.reply, self.began = asked, reply, began


@dataclass(slots=True)
class _Account:
    """What is known so far of each policy asked, in table order."""

    states: dict[str, tuple[State, int | None]]
    full: dict[str, int | None]

    def result(self, asked: Asked) -> PolicyResult:
        state, in_flight = self.states.get(asked.policy.name, ("skipped", None))
        return PolicyResult(asked.policy.name, asked.key.text, state, in_flight, asked.limit)


def acquire(
    asked: Sequence[Asked | KeyMissing],
    stores: dict[str, Any],
    lease: Ledger,
    token: str,
    path: str,
    on_error: OnError,
    threads: int | None = None,
    private_loop: bool = False,
    begun: Begun | None = None,
) -> Steps[Verdict]:
    """Take what the policies ask for, or find out why not. `stores` maps a policy's `backend` to its store.

    `begun`: all of it has been asked for at once, and was not had.

    `on_error` is the setting; a policy's own `on_backend_error` goes before it. `threads` is how many threads of this process
    may wait at once; None: nobody may wait here. `private_loop`: see `Enter`. On a rejection the caller gives back what the
    lease got in this call.
    """
    account = _Account({}, {})
    wanted: list[Asked] = []
    refused: dict[str, None] = {}
    hopeless: dict[str, None] = {}
    for entry in asked:
        if isinstance(entry, KeyMissing):
            if entry.rejects:
                refused[entry.policy.name] = None
        elif entry.cost == 1 or not above_limit(entry):
            wanted.append(entry)
        elif entry.policy.block:
            hopeless[entry.policy.name] = None
        else:  # a shadow policy's: it would never be let in, so it is not asked
            account.states[entry.policy.name] = ("over", None)
    if refused:
        return _rejected(asked, account, "key_missing", refused, ())
    if hopeless:
        return _rejected(asked, account, "cost_above_limit", hopeless, ())
    fields: list[LimitField] = []
    waited = Waited(Taken((), ()))
    # Whoever holds a slot of one store, from this step or from an earlier one, does not wait for one of another.
    may_wait = len({id(stores[entry.policy.backend]) for entry in wanted}) == 1
    for store, group in _rounds(wanted, stores) if begun is None else [(begun.store, wanted)]:
        if begun is None:
            slots = expected(store, group, lease, token, path)
            reply = yield from Take(store, slots)
        else:
            slots, reply = begun.slots, begun.reply
        waited = Waited(reply)
        if isinstance(reply, Full) and may_wait and threads is not None and not lease.holds_elsewhere(store):
            waited = yield from wait(store, group, slots, reply, lease, threads, private_loop)
            reply = waited.reply
        if isinstance(reply, StoreFailed):
            failed(lease, slots, reply, in_doubt=waited.in_doubt)
            reason = _fail_over(store, group, slots, lease, account, on_error, fields)
        else:
            got = reply.held if isinstance(reply, Taken) else ()
            if not lease.confirm(slots, [slot for slot, held in zip(slots, got, strict=False) if held]):
                yield from Give(store, slots)
            reason = _settle(store, reply, group, slots, lease, account)
            if reason == "full" and isinstance(reply, Full):
                reason = waited.reason
            fields += _remaining(group, reply)
        if reason is not None:
            return _rejected(asked, account, reason, account.full, tuple(fields), waited)
    results = _results(asked, account)
    return Verdict(
        Concurrency(any(result.state != "skipped" for result in results), results, waited=waited.seconds, _lease=lease),
        fields=tuple(fields),
    )


def expected(store: Any, group: Sequence[Asked], lease: Ledger, token: str, path: str) -> tuple[Slot, ...]:
    """What to ask for; from now on the lease may hold it."""
    slots = tuple([entry.slot(token, path) for entry in group])
    lease.expect(store, [entry.policy for entry in group], slots)
    return slots


def failed(lease: Ledger, slots: Sequence[Slot], reply: StoreFailed, *, in_doubt: bool = False) -> None:
    """What was asked for may be held, unless nothing was asked at all: neither now nor, `in_doubt`, before."""
    if reply.sent or in_doubt:
        lease.doubt(slots)
    else:
        lease.confirm(slots, ())


def above_limit(entry: Asked) -> bool:
    """Does it ask for more than there is, so that waiting cannot help? (A limit of 0 is full, whatever the cost.)"""
    return entry.limit is not None and 0 < entry.limit < entry.cost


def lease_seconds(policy: Policy) -> float:
    """How long a take is good for without a renewal."""
    most = policy.max_age
    return policy.ttl if most is None or most >= policy.ttl else most


def _rounds(wanted: Sequence[Asked], stores: dict[str, Any]) -> list[tuple[Any, list[Asked]]]:
    """One take per store, local ones first; what never rejects is asked last, and with a take that may reject if it can.

    A shadow policy must not be asked before the last blocking one has been: of a rejected request it counts nothing.
    """
    blocking: dict[int, tuple[Any, list[Asked]]] = {}
    shadow: dict[int, tuple[Any, list[Asked]]] = {}
    for entry in wanted:
        store = stores[entry.policy.backend]
        (blocking if entry.policy.block else shadow).setdefault(id(store), (store, []))[1].append(entry)
    rounds = sorted(blocking.values(), key=lambda pair: not pair[0].is_local)
    if rounds:
        store, group = rounds[-1]
        together = shadow.pop(id(store), None)
        if together is not None:
            group += together[1]
    return rounds + sorted(shadow.values(), key=lambda pair: not pair[0].is_local)


def _settle(
    store: Any, reply: TakeReply, group: Sequence[Asked], slots: Sequence[Slot], lease: Ledger, account: _Account
) -> Reason | None:
    if isinstance(reply, Full):
        for entry, full, count in zip(group, reply.full, reply.in_flight, strict=True):
            if full:
                account.full[entry.policy.name] = count
                account.states[entry.policy.name] = ("over", count)
        return "full"
    assert isinstance(reply, Taken)
    for entry, held, count in zip(group, reply.held, reply.in_flight, strict=True):
        account.states[entry.policy.name] = ("held" if held else "over", count)
    for entry, count, more in zip(group, reply.in_flight, lease.uncounted(store, slots), strict=False):
        # The store has just come back, or has failed once, and does not count all that this process has let in.
        if entry.policy.block and entry.limit is not None and count + more > entry.limit:
            account.full[entry.policy.name] = entry.limit
            account.states[entry.policy.name] = ("over", entry.limit)
    return "full" if account.full else None


def _fail_over(
    store: Any,
    group: Sequence[Asked],
    slots: Sequence[Slot],
    lease: Ledger,
    account: _Account,
    on_error: OnError,
    fields: list[LimitField],
) -> Reason | None:
    """The store cannot say. Among the blocking policies deny beats local beats allow."""
    modes = {entry.policy.on_backend_error or on_error for entry in group if entry.policy.block}
    mode = next((mode for mode in ("deny", "local") if mode in modes), "allow")
    if mode == "deny":
        for entry in group:
            if entry.policy.block and (entry.policy.on_backend_error or on_error) == "deny":
                account.full[entry.policy.name] = None
        return "backend_unavailable"
    for entry in group:
        account.states[entry.policy.name] = ("unprotected", None)
    local = [
        (entry, slot)
        for entry, slot in zip(group, slots, strict=True)
        if entry.policy.block and (entry.policy.on_backend_error or on_error) == "local"
    ]
    if local:
        held, counts = lease.stand_in(store, [entry.policy for entry, _ in local], [slot for _, slot in local])
        for (entry, slot), count in zip(local, counts, strict=True):
            if entry.limit is not None:
                fields.append((entry.policy.name, slot.limit, max(0, slot.limit - count)))
            if held:
                account.states[entry.policy.name] = ("local", count)
            elif count + slot.cost > slot.limit:
                account.full[entry.policy.name] = count
                account.states[entry.policy.name] = ("over", count)
        if not held:
            return "full"
    return None


def _remaining(group: Sequence[Asked], reply: TakeReply) -> list[LimitField]:
    """Of one that is full, though there be room, nothing remains: others wait for that."""
    full = reply.full if isinstance(reply, Full) else (False,) * len(group)
    return [
        (entry.policy.name, entry.limit, 0 if is_full else max(0, entry.limit - count))
        for entry, count, is_full in zip(group, reply.in_flight, full, strict=True)
        if entry.policy.block and entry.limit is not None
    ]


def _results(asked: Sequence[Asked | KeyMissing], account: _Account) -> tuple[PolicyResult, ...]:
    return tuple(
        PolicyResult(entry.policy.name, entry.text, "skipped", None, None)
        if isinstance(entry, KeyMissing)
        else account.result(entry)
        for entry in asked
    )


def _rejected(
    asked: Sequence[Asked | KeyMissing],
    account: _Account,
    reason: Reason,
    violated: Mapping[str, int | None],
    fields: tuple[LimitField, ...],
    waited: Waited | None = None,
) -> Verdict:
    # A round that was taken before the one that rejected is given back, so nothing is held.
    account.states = {name: state for name, state in account.states.items() if name in violated}
    against = [entry for entry in asked if entry.policy.name in violated]
    first = against[0]
    policy = first.policy
    if isinstance(first, Asked):
        limit, key = first.limit, first.key.text
    else:
        limit, key = policy.max_concurrent if isinstance(policy.max_concurrent, int) else None, first.text
    hopeless = reason in ("key_missing", "cost_above_limit") or any(
        isinstance(entry, Asked) and entry.limit == 0 for entry in against
    )
    rejection = Rejection(
        policy=policy.name,
        key=key,
        reason=reason,
        limit=limit,
        in_flight=violated[policy.name],
        retry_after=None if hopeless else (waited and waited.retry_after) or _some_seconds(),
        status=503 if reason == "backend_unavailable" else policy.status,
        violated=tuple(entry.policy.name for entry in against),
    )
    seconds = 0.0 if waited is None else waited.seconds
    return Verdict(Concurrency(True, _results(asked, account), rejection, seconds), policy, fields)


def _some_seconds() -> int:
    """One of RETRY_AFTER, by a third of what `randint` takes."""
    first, last = RETRY_AFTER
    return first + int(random.random() * (last + 1 - first))


def full_at_once(begun: Begun) -> Asked | None:
    """The one policy that was asked and is full, where nobody may wait for it: all that `acquire` would find out."""
    reply = begun.reply
    if type(reply) is not Full or len(begun.asked) != 1 or not reply.full[0]:
        return None
    (entry,) = begun.asked
    policy, limit = entry.policy, entry.limit
    return entry if policy.block and limit is not None and not (policy.wait and limit) else None


def refused_at_once(entry: Asked, in_flight: int) -> Verdict:
    """What `acquire` would come to. For one that is `full_at_once`; the caller tells the lease that nothing is held."""
    policy, limit, text = entry.policy, entry.limit, entry.key.text
    assert limit is not None
    name = policy.name
    retry_after = _some_seconds() if limit else None
    rejection = Rejection(name, text, "full", limit, in_flight, retry_after, policy.status, (name,))
    results = (PolicyResult(name, text, "over", in_flight, limit),)
    return Verdict(Concurrency(True, results, rejection), policy, ((name, limit, 0),))

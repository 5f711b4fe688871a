"""The outcomes: frozen answers of a take and of a whole acquisition, so that nothing is ever a bare bool.

A request that was let in because the store is down is not a request that holds a slot; each has its own state here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

if TYPE_CHECKING:
    from .policies import Policy

#: The `limit` of a slot that is counted and never full; a whole number that every store can compare exactly.
UNLIMITED: Final = 2**52

#: What the text of a hand-over begins with, and the whole of it where nothing is held. No policy's name has a colon.
HANDED_OVER: Final = "slots:1:"

State = Literal["held", "over", "local", "unprotected", "skipped"]
Reason = Literal["full", "queue_full", "wait_timeout", "cost_above_limit", "key_missing", "backend_unavailable"]


#: (policy, limit, remaining), for the RateLimit header fields.
LimitField = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Key:
    """A resolved key: `text` for people (`user:42`), `digest` (16 bytes) for stores. Equal digests share a semaphore."""

    text: str
    digest: bytes


@dataclass(slots=True, unsafe_hash=True)  # nobody changes one; to make a frozen one takes a microsecond more
class Slot:
    """One slot of one semaphore, asked for or held: enough to take it, to renew it and to give it back.

    `limit` is in slots, `ttl` in seconds. `cost` is how many of the limit it takes; counts are sums of costs. A slot with
    `block` false never makes a take fail: it is held where one is free. `token` names the holder, made by us; asking twice
    with one token is asking once.
    """

    policy: str
    key: Key
    limit: int
    ttl: float
    token: str
    block: bool = True
    path: str = ""
    cost: int = 1
    #: Whoever asks for it may wait: when it is given back, the store has to look whether somebody does.
    waits: bool = False
    #: Seconds since the epoch by our own clock; for people, and for the age of what is handed over, never for who is let in.
    since: float = field(default_factory=time, compare=False)
    #: How many of these it stood in line, and was not held.
    waited: float = field(default=0.0, compare=False)
    #: For the store that holds it: what it made of this slot and needs again.
    memo: list[Any] = field(default_factory=list, repr=False, compare=False)

    @property
    def semaphore(self) -> tuple[str, bytes]:
        """What is counted: the policy's name and the key's digest."""
        return (self.policy, self.key.digest)

    @property
    def told_limit(self) -> int | None:
        """The limit as people are told of it: None where it is never full."""
        return None if self.limit == UNLIMITED else self.limit


@dataclass(frozen=True, slots=True)
class Taken:
    """Every blocking slot is held. `held` and `in_flight` (own slot included) stand in the order of the slots asked for."""

    held: tuple[bool, ...]
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Full:
    """None is held, as a blocking one was at its limit. `full` and `in_flight` stand in the order of the slots asked for."""

    full: tuple[bool, ...]
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Queued:
    """None is held, as a blocking one is full, or others wait for it: the asker stands in the lines of those. `full` and
    `in_flight` as above.

    `ahead`: how many stand before it in the longest of these lines; a store that would have to count may say more. It is
    worth asking again in `again` seconds, though no bell may ring by then.
    """

    full: tuple[bool, ...]
    in_flight: tuple[int, ...]
    ahead: int
    again: float


@dataclass(frozen=True, slots=True)
class LineFull:
    """None is held and the asker stands in no line, as too many wait for one of those that are full."""

    full: tuple[bool, ...]
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """The store could not say. Whether it took anything is unknown, so what was asked for is given back all the same."""

    error: Exception
    #: False: nothing was asked at all, as the store is known to fail.
    sent: bool = True


TakeReply = Taken | Full
QueueReply = Taken | Full | Queued | LineFull


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """What one policy meant for one request.

    `held`: a slot of the store. `over`: over capacity (a shadow policy's request runs all the same, without a slot).
    `local`: the store failed and this process's own count stands in. `unprotected`: the store failed and the request
    was let in. `skipped`: it has no key here, or the request was rejected before it was asked.
    `in_flight` is the count as the take saw it, own slot included; None where nobody counted. `limit` is the one that was
    applied, None for what is counted and never full.
    """

    policy: str
    key: str
    state: State
    in_flight: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a request was turned away: the first violated policy in table order, and the names of all of them.

    `retry_after` is in seconds, None where waiting cannot help (a limit of 0, a cost above the limit, a missing key).
    """

    policy: str
    key: str
    reason: Reason
    limit: int | None
    in_flight: int | None
    retry_after: int | None
    status: int
    violated: tuple[str, ...]


class Owner(Protocol):
    """The lease behind a `Concurrency`."""

    def release(self) -> None:
        """Give everything back."""

    def hand_over(self) -> str:
        """A token for whoever is to hold it from now on."""


@dataclass(frozen=True, slots=True)
class Concurrency:
    """`request.concurrency`: what the limits decided for this request. `waited` is in seconds."""

    limited: bool = False
    policies: tuple[PolicyResult, ...] = ()
    rejection: Rejection | None = None
    waited: float = 0.0
    _lease: Owner | None = field(default=None, repr=False, compare=False)
    #: Of one that nobody has looked at yet: what was asked for, all of which is held, and the counts.
    _taken: tuple[Sequence[Asked], Sequence[int]] | None = field(default=None, repr=False, compare=False)

    def __getattr__(self, name: str) -> Any:
        """What nobody has looked at yet."""
        if name not in ("limited", "policies", "rejection", "waited"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        asked, counts = self._taken or ((), ())
        policies = tuple(
            PolicyResult(entry.policy.name, entry.key.text, "held", count, entry.limit)
            for entry, count in zip(asked, counts, strict=True)
        )
        for field_name, value in (("limited", True), ("policies", policies), ("rejection", None), ("waited", 0.0)):
            _set(self, field_name, value)
        return getattr(self, name)

    def release(self) -> None:
        """Give this request's slots back now, for a view that is done with the limited part. Further calls do nothing."""
        if self._lease is not None:
            self._lease.release()

    def hand_over(self) -> str:
        """Pass this request's slots on: text for `hold`, which claims them in a thread, a task or another process.

        The response does not give them back any more, and until they are claimed nobody renews them: unclaimed they end with
        their lease. Where the request holds none (it is not limited, or the store fails) the text claims none.
        """
        return HANDED_OVER if self._lease is None else self._lease.hand_over()


def remaining(asked: Sequence[Asked], counts: Sequence[int]) -> tuple[LimitField, ...]:
    """Of what was asked for and may be full: what is left, by the counts of a take."""
    return tuple(
        [
            (entry.policy.name, entry.limit, max(0, entry.limit - count))
            for entry, count in zip(asked, counts, strict=True)
            if entry.policy.block and entry.limit is not None
        ]
    )


def all_held(told: tuple[Sequence[Asked], Sequence[int]], lease: Owner) -> Concurrency:
    """All that was asked for is held, with these counts. Most views never look at it, so what it says is made when one does."""
    made = _new(Concurrency)
    _set(made, "_lease", lease)
    _set(made, "_taken", told)
    return made


_new, _set = object.__new__, object.__setattr__

#: Of a request to which no policy applied.
NOT_LIMITED = Concurrency()


@dataclass(frozen=True, slots=True)
class Asked:
    """A policy that applies to this request, with its key: what an acquisition is about."""

    policy: Policy
    key: Key
    #: None: counted, never full.
    limit: int | None
    cost: int = 1

    def slot(self, token: str, path: str) -> Slot:
        """What a store is asked for. Made by hand, as each request makes one: that takes half the time."""
        policy, slot = self.policy, _new(Slot)
        ttl, longest = policy.ttl, policy.max_age
        slot.policy = policy.name
        slot.key = self.key
        slot.limit = UNLIMITED if self.limit is None else self.limit
        slot.ttl = ttl if longest is None or longest >= ttl else longest  # as `lease_seconds`
        slot.token = token
        slot.block = policy.block
        slot.path = path
        slot.cost = self.cost
        slot.waits = policy.wait > 0
        slot.since = time()
        slot.waited = 0.0
        slot.memo = []
        return slot


@dataclass(frozen=True, slots=True)
class KeyMissing:
    """A policy whose key has no value for this request. `rejects`: the policy says `missing: reject`."""

    policy: Policy
    text: str
    rejects: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of an acquisition: what to tell the request, and which policies (with their counts) to tell the client of.

    `fields`: of every blocking policy that was asked and has a limit.
    """

    concurrency: Concurrency
    rejected_by: Policy | None = None
    fields: tuple[LimitField, ...] = ()

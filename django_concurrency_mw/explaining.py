"""The explanation: which policies a request would meet, why not the others, and what would be answered now.

It runs the decisions of real requests, the same steps, over stores that are only looked at: each take is answered from the
counts and the lines, and nothing is taken. A request that would wait is followed as if its turn had come. What it cannot see
is what another process counts by itself while a store fails, and how many threads of another process wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import conf
from .backends import BaseBackend
from .bells import Bell
from .chain import positions
from .decorated import Decorated, decorated
from .drivers import run
from .effects import Enter, Queue, Steps, Take
from .kept import is_kept_of
from .keys import Resolver
from .limiter import is_replaced, policies_of, store_of
from .middleware import authenticates_itself, is_ours, throttles_itself
from .outcomes import (
    Asked,
    Full,
    KeyMissing,
    LineFull,
    Queued,
    QueueReply,
    Rejection,
    Slot,
    State,
    StoreFailed,
    Taken,
    TakeReply,
    Verdict,
)
from .policies import Policy, left_out
from .steps import acquire
from .tokens import new_token

if TYPE_CHECKING:
    from django.http import HttpRequest

#: Where a policy is taken.
MIDDLEWARE, THROTTLE, DECORATOR = "middleware", "throttle", "decorator"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one policy means for the request.

    `taken_by` says where it is taken: the middleware, the throttle of a view of Django REST framework, or a decorator.
    `why_not` is empty where it applies. `in_flight` is what is held now, without this request; None where the store does
    not say, or was not asked as an earlier policy rejects. `state` is what the request would be told of it. `waiting` is how
    many stand in its line now, and `place` where the request would stand there, 1 for the first; None: it would not wait.
    """

    policy: Policy
    taken_by: str
    why_not: str = ""
    key: str | None = None
    limit: int | None = None
    cost: int = 1
    in_flight: int | None = None
    state: State | None = None
    waiting: int = 0
    place: int | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """`findings` in the order in which they are asked, then those that do not apply; `notes` say what to keep in mind.

    `waits`: seconds that the request would stand in line at most, before it is rejected after all; 0 where it would not.
    """

    view_name: str
    findings: tuple[Finding, ...]
    rejection: Rejection | None
    notes: tuple[str, ...] = ()
    waits: float = 0.0


def explain(request: HttpRequest, config: conf.Config) -> Explanation:
    """What would become of this request, whose `resolver_match` is set and whose user and session are as they would be.

    Asks the project's own callables, reads the session and the user; changes nothing. Raises what the callables raise, and
    ImproperlyConfigured for a store or a decorator that cannot be used.
    """
    match = request.resolver_match
    assert match is not None
    view, notes = match.func, []
    by_table = policies_of(request, view, config)
    where = THROTTLE if throttles_itself(view) else MIDDLEWARE
    if not config.enabled:
        notes.append("ENABLED is False: nothing is limited")
    elif by_table and where == MIDDLEWARE and not positions(is_ours):
        notes.append("ConcurrencyLimitMiddleware is not in MIDDLEWARE: the table is not applied")
        by_table = ()
    if by_table and where == MIDDLEWARE and authenticates_itself(view):
        notes.append(
            "Django REST framework knows a token's user inside the view only: to the policies that the middleware takes it is "
            "anonymous, whatever --user says"
        )
    others = [
        Finding(policy, where, _why_not(policy, match.view_name, request.method or "", view))
        for policy in config.table
        if policy not in by_table and config.enabled
    ]
    decorators = decorated(view, config) if config.enabled else []
    outer = [one for one in decorators if one.method is None]
    look = _Look(request, match.kwargs, config)
    if where == THROTTLE:
        others += look.at_decorators(outer)
        outer = []
    look.at(by_table, where)
    others += look.at_decorators([*outer, *(one for one in decorators if one.method is not None)])
    return Explanation(
        match.view_name,
        (*look.findings, *look.skipped, *others),
        look.rejection,
        (*notes, *dict.fromkeys(look.notes)),
        look.waits,
    )


def _why_not(policy: Policy, view_name: str, method: str, view: Any) -> str:
    reason = left_out(policy, view_name, method)
    if reason == "url_names" and not policy.url_names:
        return "no url_names: only for policy= and hold()"
    if reason == "url_names":
        return f"url_names: none of {', '.join(policy.url_names)} is {view_name}"
    if reason == "exclude":
        return f"exclude: {', '.join(policy.exclude)} has {view_name}"
    if reason == "methods":
        return _methods(policy)
    if is_replaced(policy, view):
        return "overridable: a decorator on the view takes its place, or exempts the view"
    return "the middleware is not there to apply it"


def _methods(policy: Policy) -> str:
    return f"methods: {', '.join(sorted(policy.methods or ()))} only"


@dataclass
class _Look:
    """One request's way through its policies, as far as it would get."""

    request: HttpRequest
    kwargs: Mapping[str, Any]
    config: conf.Config
    findings: list[Finding] = field(default_factory=list)
    skipped: list[Finding] = field(default_factory=list)
    rejection: Rejection | None = None
    notes: list[str] = field(default_factory=list)
    waits: float = 0.0
    #: Where something is held, by the ids of the stores.
    stores: set[int] = field(default_factory=set)
    _held: set[tuple[str, bytes]] = field(default_factory=set)
    #: Policy -> what is in flight, how many stand in its line, and at which place the request would stand there.
    _counts: dict[str, int] = field(default_factory=dict)
    _lines: dict[str, int] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)

    def at(self, policies: Sequence[Policy], taken_by: str) -> None:
        """The policies that are taken together here. After a rejection nothing is asked any more."""
        if self.rejection is not None:
            self.skipped += [
                Finding(policy, taken_by, "not asked: the request is rejected before") for policy in policies
            ]
            return
        resolver = _Resolver(self.request, self.kwargs, self.config.trusted, self.config.client_header)
        asking = run(resolver.resolve(policies))
        stores = {policy.backend: store_of(policy, self.config) for policy in policies}
        fresh = [entry for entry in asking if isinstance(entry, KeyMissing) or _semaphore(entry) not in self._held]
        # How many threads of the server wait cannot be seen, so one more may; 0 here is said in a note.
        path, on_error = self.request.path, self.config.on_backend_error
        steps = acquire(fresh, stores, _Nothing(self), new_token(), path, on_error, self.config.max_sync_waiters)
        verdict: Verdict = run(self._looked_at(steps, {policy.name: policy.wait for policy in policies}))
        self.rejection = verdict.concurrency.rejection
        states = {result.policy: result.state for result in verdict.concurrency.policies}
        for entry in asking:
            policy = entry.policy
            if isinstance(entry, KeyMissing):
                if entry.rejects:
                    self.findings.append(Finding(policy, taken_by, key=entry.text, limit=None, state="skipped"))
                else:
                    self.skipped.append(Finding(policy, taken_by, f"key: {entry.text} has no value here"))
                continue
            if entry not in fresh:
                self.skipped.append(Finding(policy, taken_by, "this request has its slot already", key=entry.key.text))
                continue
            state = states[policy.name]
            self.findings.append(
                Finding(
                    policy,
                    taken_by,
                    "",
                    entry.key.text,
                    entry.limit,
                    entry.cost,
                    self._counts.get(policy.name),
                    state,
                    self._lines.get(policy.name, 0),
                    None if self.rejection is not None else self._places.get(policy.name),
                )
            )
            if self.rejection is None and (state in ("held", "local") or not policy.block):
                self._held.add(_semaphore(entry))
            if self.rejection is None and state in ("held", "local"):
                self.stores.add(id(stores[policy.backend]))
        applied = {entry.policy for entry in asking}
        self.skipped += [
            Finding(policy, taken_by, resolver.reasons.get(policy, "")) for policy in policies if policy not in applied
        ]

    def at_decorators(self, decorators: Sequence[Decorated]) -> list[Finding]:
        """One after the other. Returns those that are not about this method."""
        method, others = self.request.method, []
        for one in decorators:
            if one.method is not None and one.method != method and not (one.method == "GET" and method == "HEAD"):
                others.append(Finding(one.policy, DECORATOR, f"it is on the method {one.method}"))
            elif one.policy.methods is not None and method not in one.policy.methods:
                others.append(Finding(one.policy, DECORATOR, _methods(one.policy)))
            else:
                self.at((one.policy,), DECORATOR)
        return others

    def _looked_at(self, steps: Steps[Verdict], waits: Mapping[str, float]) -> Steps[Verdict]:
        """The same steps; what they want to take, or to wait for, is looked at instead. `waits`: seconds by policy."""
        try:
            effect = next(steps)
            while True:
                if type(effect) is Take:
                    effect = steps.send(self._reply(effect.store, effect.slots))
                elif type(effect) is Enter:
                    effect = steps.send(Bell())  # nobody rings it
                elif type(effect) is Queue:
                    reply = self._in_line(effect.store, effect.slots, effect.most)
                    if isinstance(reply, Queued):
                        reply = self._its_turn(effect.slots, reply, waits)
                    effect = steps.send(reply)
                else:
                    effect = steps.send((yield effect))
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # a generator's return value is untyped here

    def _reply(self, store: BaseBackend, slots: Sequence[Slot]) -> TakeReply | StoreFailed:
        try:
            counts = tuple(store.counts(slots))
            lines = _lengths(store, slots)
        except NotImplementedError:
            raise
        except Exception as error:  # as a take would be
            self.notes.append(f"backend {store.config.alias} fails: {error}")
            return StoreFailed(error)
        blind = store.blind_spot()
        if blind:
            self.notes.append(f"backend {store.config.alias}: {blind}")
        self._counts.update({slot.policy: count for slot, count in zip(slots, counts, strict=True)})
        self._lines.update({slot.policy: waiting for slot, waiting in zip(slots, lines, strict=True)})
        # Nobody overtakes those who wait, though there be room.
        fits = tuple(
            not waiting and count + slot.cost <= slot.limit
            for slot, count, waiting in zip(slots, counts, lines, strict=True)
        )
        full = tuple(slot.block and not room for slot, room in zip(slots, fits, strict=True))
        if True in full:
            return Full(full, counts)
        return Taken(
            fits, tuple(count + room * slot.cost for slot, count, room in zip(slots, counts, fits, strict=True))
        )

    def _in_line(
        self, store: BaseBackend, slots: Sequence[Slot], most: Sequence[int | None]
    ) -> QueueReply | StoreFailed:
        """What a store says to one who stands at the end of each line that it has to."""
        reply = self._reply(store, slots)
        if not isinstance(reply, Full):
            return reply
        lines = [self._lines[slot.policy] for slot in slots]
        rooms = [
            None if room is None else room - waiting
            for room, waiting, full in zip(most, lines, reply.full, strict=True)
            if full
        ]
        if None in rooms:
            return reply
        if any(room is not None and room <= 0 for room in rooms):
            return LineFull(reply.full, reply.in_flight)
        ahead = max(waiting for waiting, full in zip(lines, reply.full, strict=True) if full)
        return Queued(reply.full, reply.in_flight, ahead, 0.0)

    def _its_turn(self, slots: Sequence[Slot], reply: Queued, waits: Mapping[str, float]) -> Taken:
        """Remember that it stands in line, and go on as if it had come forward: what is asked further in is asked then."""
        full = [slot for slot, is_full in zip(slots, reply.full, strict=True) if is_full]
        self._places.update({slot.policy: self._lines[slot.policy] + 1 for slot in full})
        self.waits += min(waits[slot.policy] for slot in full)
        self.notes.append(self._note_on_waiting())
        held = tuple(
            slot.block or (count + slot.cost <= slot.limit and not self._lines[slot.policy])
            for slot, count in zip(slots, reply.in_flight, strict=True)
        )
        return Taken(held, reply.in_flight)

    def _note_on_waiting(self) -> str:
        threads = self.config.max_sync_waiters
        if not threads:
            return "MAX_SYNC_WAITERS is 0: it waits on an event loop only; a thread rejects it at once (queue_full)"
        return (
            f"a process in which {threads} threads wait already (MAX_SYNC_WAITERS) rejects it at once (queue_full), and so "
            "does a server of a single thread (full)"
        )


def _lengths(store: BaseBackend, slots: Sequence[Slot]) -> tuple[int, ...]:
    """How many wait for each slot's semaphore. Who waits is known by what the store keeps of names and keys."""
    waiters = store.waiters()
    return tuple(
        sum(is_kept_of(one.policy, slot.policy) and is_kept_of(one.key, slot.key.text) for one in waiters)
        for slot in slots
    )


def _semaphore(entry: Asked) -> tuple[str, bytes]:
    return (entry.policy.name, entry.key.digest)


class _Resolver(Resolver):
    """Remembers why a policy does not apply."""

    __slots__ = ("reasons",)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.reasons: dict[Policy, str] = {}

    def leave_out(self, policy: Policy, field: str) -> None:
        self.reasons[policy] = _REASONS[field](policy)


_REASONS: Mapping[str, Callable[[Policy], str]] = {
    "except_ips": lambda policy: "except_ips: the address is in " + ", ".join(map(str, policy.except_ips)),
    "except_users": lambda policy: "except_users: the user is one of " + ", ".join(map(str, policy.except_users)),
    "when": lambda policy: f"when: the request is not {policy.when}",
    "key": lambda policy: "key: the callable says that the policy does not apply",
}


class _Nothing:
    """A lease that holds nothing."""

    given_up = False

    def __init__(self, look: _Look) -> None:
        self._look = look

    def expect(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> None:
        """Nothing is taken."""

    def confirm(self, asked: Sequence[Slot], got: Sequence[Slot]) -> bool:
        """Nothing was."""
        return True

    def expects(self, slots: Sequence[Slot]) -> bool:
        """Nobody waits."""
        return True

    def holds_elsewhere(self, store: Any) -> bool:
        """What the request would hold by then."""
        return bool(self._look.stores - {id(store)})

    def wake_by(self, bell: Bell) -> None:
        """Nobody waits."""

    def begin_anew(self, slots: Sequence[Slot], since: float) -> None:
        """Nobody waits."""

    def doubt(self, asked: Sequence[Slot]) -> None:
        """There is no doubt."""

    def uncounted(self, store: Any, slots: Sequence[Slot]) -> tuple[int, ...]:
        """None is known here."""
        return ()

    def stand_in(self, store: Any, policies: Sequence[Policy], slots: Sequence[Slot]) -> tuple[bool, tuple[int, ...]]:
        """Each process counts by itself then; this is the answer of one that holds nothing."""
        self._look.notes.append(
            "while a store fails, each process counts by itself: this is the answer of a process that holds nothing"
        )
        fits = all(slot.cost <= slot.limit for slot in slots)
        return fits, tuple(slot.cost if fits else 0 for slot in slots)

    def release(self) -> None:
        """There is nothing."""

    def hand_over(self) -> str:
        """There is nothing."""
        raise NotImplementedError

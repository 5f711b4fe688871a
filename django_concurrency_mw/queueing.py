"""The wait: one who found a semaphore full stands in line, until it is its turn or its time is over.

The store keeps the line, and is asked again whenever the bell rings, and after a while when it does not: what it answers is
the truth, a ring only a hint. So it is one question, `Queue`, that joins the line, sees how it stands, joins again where the
store has lost the place, and in the end takes or leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from . import pace
from .bells import Bell
from .effects import Enter, Give, Queue, Steps, Wait
from .outcomes import Asked, Full, LineFull, Queued, QueueReply, Reason, Slot, StoreFailed, Taken


class Waiting(Protocol):
    """The lease, as one who waits sees it."""

    @property
    def given_up(self) -> bool:
        """Nobody is there any more for whom it is worth waiting."""

    def expects(self, slots: Sequence[Slot]) -> bool:
        """Has nobody given them back yet?"""

    def wake_by(self, bell: Bell) -> None:
        """This is to ring when it is given up, until it is closed."""

    def begin_anew(self, slots: Sequence[Slot], since: float) -> None:
        """These are held since then (monotonic seconds) at the earliest, and not since they were first asked for."""


@dataclass(frozen=True, slots=True)
class Waited:
    """How it ended: the store's last word, why it rejects if it does, seconds in line, and, if it is known, in how many
    seconds it is worth coming back."""

    reply: Taken | Full | StoreFailed
    reason: Reason = "full"
    seconds: float = 0.0
    retry_after: int | None = None
    #: It may stand in line, or hold, whatever the last word was about.
    in_doubt: bool = False


def wait(
    store: Any,
    group: Sequence[Asked],
    slots: tuple[Slot, ...],
    full: Full,
    lease: Waiting,
    threads: int,
    private_loop: bool = False,
) -> Steps[Waited]:
    """Wait for these slots, of which some were found full. As long as the shortest `wait` of those that are full allows.

    `threads` and `private_loop`: see `Enter`.
    """
    waits = [entry.policy.wait if entry.limit != 0 else 0.0 for entry in group]
    began = asked = monotonic()
    until = began + _shortest(waits, full)
    if until <= began or lease.given_up:
        return Waited(full)
    first = group[full.full.index(True)].policy
    bell = yield from Enter(store, threads, private_loop)
    if not isinstance(bell, Bell):
        return Waited(full, bell, 0.0, pace.retry_after(first, 1) if bell == "queue_full" else None)
    most = tuple([entry.policy.max_waiting if seconds else None for entry, seconds in zip(group, waits, strict=True)])
    nobody = (None,) * len(slots)
    joined = moved_from = 0
    joined_at = began
    stands = False
    try:
        lease.wake_by(bell)
        while True:
            before, asked = asked, monotonic()
            if not lease.expects(slots):  # nor is it asked for any more, as what is free would be nobody's
                yield from Give(store, slots)  # the last question may have overtaken what gave it back
                return Waited(full, "wait_timeout", monotonic() - began)
            in_time = asked < until and not lease.given_up
            reply: QueueReply | StoreFailed = yield from Queue(store, slots, most if in_time else nobody, bell)
            waited = monotonic() - began
            if isinstance(reply, Queued):
                if not stands:
                    stands, joined, joined_at = True, reply.ahead + 1, asked
                moved_from = reply.ahead + 1
                until = began + _shortest(waits, reply)
                yield from Wait(bell, max(0.0, min(reply.again, until - monotonic())))
                continue
            if isinstance(reply, Taken):
                if stands:
                    pace.seen(first, joined, monotonic() - joined_at)
                lease.begin_anew(slots, before)
                return Waited(reply, seconds=waited)
            if isinstance(reply, StoreFailed):
                return Waited(reply, seconds=waited, in_doubt=stands)
            if isinstance(reply, LineFull):
                last = Full(reply.full, reply.in_flight)
                return Waited(last, "queue_full", waited, pace.retry_after(first, first.max_waiting + 1))
            if in_time:  # one that is not waited for is full
                return Waited(reply, seconds=waited)
            if stands and not lease.given_up:
                pace.seen(first, joined - moved_from, monotonic() - joined_at)
            return Waited(reply, "wait_timeout", waited, pace.retry_after(first, moved_from or 1))
    finally:
        bell.close()


def _shortest(waits: Sequence[float], reply: Full | Queued) -> float:
    return min(seconds for seconds, full in zip(waits, reply.full, strict=True) if full)

"""One process gives a slot back while another one, which has waited for it, asks for the last time; and a third one waits
behind that."""

from __future__ import annotations

import mmap
import os
import random
from collections import Counter
from time import monotonic, monotonic_ns
from typing import Any

from django_concurrency_mw.backends.base import ASK_AGAIN
from django_concurrency_mw.outcomes import Full, Queued, Taken

from .common import SOON, Child, Client, apart, until

#: Orders to the process that gives. The holder takes; the next one joins the line; the holder gives, at the moment agreed on;
#: the next one asks once; it waits for its turn; it gives back.
TAKE, JOIN, RACE, ASK, AWAIT, GIVE = b"t", b"j", b"r", b"a", b"w", b"g"
YES, NO = b"y", b"n"
#: Seconds within which one hears that it is its turn, also on a busy machine, mostly.
LATE = 0.1
#: Nanoseconds until both begin, and that one of them may begin later than the other.
AHEAD, SPREAD = 300_000, 100_000


def race(backend: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Returns how often the last question was answered how; how long the next one waited at most after that, and how often for
    so long that nobody can have told it."""
    moment = memoryview(mmap.mmap(-1, 8)).cast("Q")
    chance = random.Random()

    def work(orders: int, answers: int) -> None:
        """The process that gives."""
        store = apart(backend)
        holder, following = Client(store, "race"), Client(store, "race")
        while order := os.read(orders, 1):
            if order == TAKE:
                holder = Client(store, "race")
                answer = until(lambda one=holder: isinstance(one.ask(None), Taken))
            elif order == JOIN:
                following = Client(store, "race")
                answer = isinstance(following.ask(), Queued)
            elif order == RACE:
                spin_until(moment[0])
                holder.give()
                answer = True
            elif order == ASK:
                answer = isinstance(following.ask(), Taken)
            elif order == AWAIT:
                following.bell.wait(ASK_AGAIN)  # as one does who was told that it stands in line
                answer = following.wait(SOON)
            else:
                following.give()
                answer = True
            os.write(answers, YES if answer else NO)

    giver = Child(work)
    store = apart(backend)
    seen: Counter[str] = Counter()
    slowest, late, offset = 0.0, 0, 0
    for number in range(rounds):
        assert giver.ask(TAKE) == YES, f"round {number}: a slot is lost"
        waiter = Client(store, "race")
        assert isinstance(waiter.ask(), Queued)
        assert giver.ask(JOIN) == YES
        moment[0] = begin = monotonic_ns() + AHEAD
        giver.tell(RACE)
        spin_until(begin + offset + chance.randrange(-SPREAD, SPREAD))
        reply = waiter.ask(None)
        assert giver.hear() == YES
        seen[type(reply).__name__] += 1
        if isinstance(reply, Taken):
            assert giver.ask(ASK) == NO, f"round {number}: it is held twice"
        else:
            assert isinstance(reply, Full)
        offset += SPREAD // 10 if isinstance(reply, Full) else -SPREAD // 10  # so that it stays a race
        waiter.give()  # as one does who is turned away, too
        gave = monotonic()
        assert giver.ask(AWAIT) == YES, f"round {number}: after {reply} the next one waits for ever"
        waited = monotonic() - gave
        slowest, late = max(slowest, waited), late + (waited > LATE)
        assert isinstance(store.take(Client(store, "race").slots), Full), f"round {number}: it is held twice"
        assert giver.ask(GIVE) == YES
    codes = [giver.end()]
    empty = until(lambda: not store.snapshot() and not store.waiters())
    return {"seen": dict(seen), "slowest": slowest, "late": late, "codes": codes, "empty": empty}


def spin_until(moment: int) -> None:
    while monotonic_ns() < moment:
        pass

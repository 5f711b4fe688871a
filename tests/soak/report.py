"""The soak's report: what people read, and the same as JSON; and what in it breaks a promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .fleet import BOUNDS
from .sampling import JUDGED, WARM_UP, Life
from .verdict import Count

#: Seconds of load after which workers of each server have been looked at.
LONG_ENOUGH = 3 * (WARM_UP + JUDGED)
WHY = {
    "a": "(a) the store had lost its state",
    "b": "(b) beside a process that stood still",
    "d": "(d) processes counted by themselves",
    "broken": "BROKEN",
}


@dataclass
class Happened:
    """Something that was done. Seconds: after the load began; until there was a new master; until nobody was affected."""

    at: float
    what: str
    seconds: float
    served: float | None = None
    affected: int = 0
    affected_for: float = 0.0


@dataclass
class Report:
    kind: str
    seconds: float
    ttl: float
    #: Status -> how many; 0: no answer on a new connection.
    answers: dict[int, int] = field(default_factory=dict)
    left: int = 0
    again: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)
    counts: dict[str, Count] = field(default_factory=dict)
    happened: list[Happened] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    #: Slots and places in lines: at the end of the load, and a lease later; seconds until there were none.
    held: tuple[int, int] = (0, 0)
    free_after: float | None = None
    #: Tracebacks in the servers' logs.
    tracebacks: int = 0
    #: What went wrong besides.
    wrong: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Promises that were not kept, in words."""
        errors = sum(number for status, number in self.answers.items() if status >= 500)
        said = [*self.wrong]
        if errors:
            said.append(f"{errors} answers of 5xx: {self.failures[:3]}")
        for count in self.counts.values():
            if count.broken:
                said.append(f"a cap was broken {len(count.broken)} times: {'; '.join(count.broken[:3])}")
        if not self.counts or not all(count.admitted for count in self.counts.values()):
            said.append("a policy has admitted nobody")
        if self.held[1]:
            said.append(f"{self.held[1]} slots are held a lease after the end")
        for life in self.lives:
            if life.is_judged and not life.is_flat:
                said.append(f"{life.server} {life.pids} grows: {life.megabytes} MB, {life.descriptors} descriptors")
        judged = {life.server for life in self.lives if life.is_judged}
        if self.seconds >= LONG_ENOUGH and judged != {life.server for life in self.lives}:
            said.append(f"only of {sorted(judged)} workers lived long enough to be looked at")
        return said

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "broken": self.broken}

    def as_text(self) -> str:
        answers = Counter(self.answers)
        admitted, rejected = answers[200], answers[429]
        errors = sum(number for status, number in answers.items() if status >= 500)
        lines = [
            f"{self.kind}: {self.seconds:.0f} s of load, leases of {self.ttl:g} s",
            f"  answers         {admitted} admitted, {rejected} rejected, {errors} errors (5xx), {answers[0]} without one",
            f"  clients         {self.left} left, {self.again} asked again; the slowest answer took {self.slowest:.2f} s",
        ]
        for name, count in self.counts.items():
            lines.append(
                f"  {name:15} {count.admitted} admitted {dict(count.states)}, most in flight {count.most} "
                f"({count.most_of_the_store} of the store's), "
                f"limit {BOUNDS[name]}"
            )
            lines += [
                f"                  above it for {length:.2f} s: {WHY[why]}" for why, length in count.above.items()
            ]
        for each in self.happened:
            served = "" if each.served is None else f", a new master after {each.served:.2f} s"
            until = f" (the last after {each.affected_for:.2f} s)" if each.affected else ""
            affected = f", {each.affected} requests counted by their process{until}"
            lines.append(f"  at {each.at:5.0f} s      {each.what}: {each.seconds:.1f} s{served}{affected}")
        for life in self.lives:
            judged = "" if life.is_judged else " (too short to be judged)"
            memory, descriptors = life.megabytes, life.descriptors
            lines.append(
                f"  {life.server:15} {len(life.pids)} workers for {life.seconds:.0f} s: {memory[0]:.1f} -> {memory[1]:.1f} MB, "
                f"{descriptors[0]:.0f} -> {descriptors[1]:.0f} descriptors{judged}"
            )
        free = "not" if self.free_after is None else f"none after {self.free_after:.1f} s"
        lines.append(f"  held            {self.held[0]} at the end, {self.held[1]} a lease later ({free})")
        lines.append(f"  logs            {self.tracebacks} tracebacks")
        lines += [f"  BROKEN          {each}" for each in self.broken] or ["  every promise was kept"]
        return "\n".join(lines)

"""The semaphore of the memory store: who holds it, at which cost and how long. Callers hold the store's lock."""

from __future__ import annotations

from ..outcomes import Slot


class Held:
    """One holder of one semaphore: its cost, since when and until when (monotonic seconds), and what it asked for."""

    __slots__ = ("cost", "ends", "since", "slot")

    def __init__(self, slot: Slot, since: float, ends: float) -> None:
        self.slot, self.since, self.ends, self.cost = slot, since, ends, slot.cost


class Semaphore(dict[str, Held]):
    """token -> holder. `earliest` is never later than the first lease's end: until then no look for lapsed ones is due.

    `_more` is what the holders cost beyond 1 each. It is None while that changes: an exception may come from anywhere, and
    whoever finds None there adds it up.
    """

    __slots__ = ("_more", "earliest")

    def __init__(self) -> None:
        self.earliest = float("inf")
        self._more: int | None = 0

    def total(self) -> int:
        """What is in flight, by cost."""
        more = self._more
        if more is None:
            more = self._more = sum([held.cost - 1 for held in self.values()])
        return len(self) + more

    def counted(self, now: float) -> int:
        """The same, without those whose lease has ended."""
        return self.total() if self.earliest > now else sum([held.cost for held in self.values() if held.ends > now])

    def add(self, token: str, held: Held) -> None:
        """Somebody who is not there yet."""
        if held.cost == 1:
            self[token] = held
        else:
            more, self._more = self._more, None
            self[token] = held
            self._more = None if more is None else more + held.cost - 1

    def remove(self, token: str) -> Held | None:
        """Returns who it was."""
        held = self.get(token)
        if held is None:
            return None
        if held.cost == 1:
            del self[token]
        else:
            more, self._more = self._more, None
            del self[token]
            self._more = None if more is None else more - held.cost + 1
        return held

    def drop_lapsed(self, now: float) -> None:
        if self.earliest > now:
            return
        for token in [token for token, held in self.items() if held.ends <= now]:
            self.remove(token)
        self.earliest = min((held.ends for held in self.values()), default=float("inf"))

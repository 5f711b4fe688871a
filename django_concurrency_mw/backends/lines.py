"""The lines: who waits for which semaphore of the memory store, in which order. Callers hold the store's lock."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ..bells import Bell
from ..outcomes import Slot
from .base import PLACE_FOR

#: A semaphore: the policy's name, the key's digest.
Name = tuple[str, bytes]


class Waiting:
    """One who waits: for which slots, in which lines (with its number there), and until when it keeps its places (monotonic
    seconds)."""

    __slots__ = ("bell", "numbers", "since", "slots", "token", "until")

    def __init__(self, slots: Sequence[Slot], bell: Bell, now: float) -> None:
        self.slots, self.token, self.since = tuple(slots), slots[0].token, now
        self.numbers: dict[Name, int] = {}
        self.bell, self.until = bell, now + PLACE_FOR


class Lines:
    """All lines that somebody stands in."""

    def __init__(self) -> None:
        #: Who stands anywhere, by token.
        self.waiting: dict[str, Waiting] = {}
        #: Each in its order.
        self._lines: dict[Name, dict[str, Waiting]] = {}

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def first(self, name: Name) -> Waiting | None:
        """Who is next."""
        line = self._lines.get(name)
        return None if line is None else next(iter(line.values()))

    def is_turn_of(self, token: str, name: Name) -> bool:
        """Does nobody stand before this one there?"""
        line = self._lines.get(name)
        return line is None or next(iter(line)) == token

    def length(self, name: Name, but: str) -> int:
        """How many wait there, without this one; 0 where it has its place."""
        line = self._lines.get(name, ())
        return 0 if but in line else len(line)

    def ahead(self, token: str) -> int:
        """How many have joined before this one since the first that still stands there, in the longest of its lines."""
        numbers = self.waiting[token].numbers
        return max(number - next(iter(self._lines[name].values())).numbers[name] for name, number in numbers.items())

    def stand(self, slots: Sequence[Slot], names: Collection[Name], bell: Bell, now: float) -> list[Name]:
        """It stands in these lines, at its place or at the end, and in no other. Returns those that it left."""
        token = slots[0].token
        waiting = self.waiting.get(token)
        if waiting is None:
            waiting = self.waiting[token] = Waiting(slots, bell, now)
        waiting.bell, waiting.until = bell, now + PLACE_FOR
        for name in names:
            if name not in waiting.numbers:
                line = self._lines.setdefault(name, {})
                waiting.numbers[name] = next(reversed(line.values())).numbers[name] + 1 if line else 1
                line[token] = waiting
        left = [name for name in waiting.numbers if name not in names]
        for name in left:
            self.leave_one(token, name)
        return left

    def leave(self, token: str) -> list[Name]:
        """It does not wait any more. Returns which lines it stood in."""
        waiting = self.waiting.pop(token, None)
        if waiting is None:
            return []
        left = list(waiting.numbers)
        for name in left:
            self._step_out(name, token)
        return left

    def leave_one(self, token: str, name: Name) -> None:
        """It does not wait there any more; it forgets nothing else, and may stand in no line at all now."""
        waiting = self.waiting[token]
        del waiting.numbers[name]
        self._step_out(name, token)
        if not waiting.numbers:
            del self.waiting[token]

    def places(self, now: float) -> Iterator[tuple[Name, int, Waiting]]:
        """Everybody's, from 1 on."""
        for name, line in self._lines.items():
            living = [waiting for waiting in line.values() if waiting.until > now]
            for place, waiting in enumerate(living, 1):
                yield name, place, waiting

    def _step_out(self, name: Name, token: str) -> None:
        line = self._lines[name]
        del line[token]
        if not line:
            del self._lines[name]

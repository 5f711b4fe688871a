"""Slots: a number for every key of every policy that was met, small enough for millions of them."""

from __future__ import annotations

from array import array
from collections import defaultdict
from pathlib import Path

from ..keys import limits_of
from ..outcomes import UNLIMITED, Asked


class Slots:
    """Every key of every policy that was met, as a number: its policy, its limit, and its text, which lies on disk."""

    def __init__(self, directory: Path) -> None:
        self.policies = array("H")
        self.limits = array("q")
        #: Does `per_key` give it a limit of its own?
        self.own = array("b")
        self._numbers: dict[int, dict[bytes, int]] = defaultdict(dict)
        self._texts = (directory / "keys").open("w+b")
        self._places = array("Q", [0])

    def __len__(self) -> int:
        return len(self.policies)

    def number(self, policy: int, asked: Asked) -> int:
        """Of this key."""
        numbers = self._numbers[policy]
        found = numbers.get(asked.key.digest)
        if found is None:
            found = numbers[asked.key.digest] = len(self.policies)
            self.policies.append(policy)
            self.limits.append(UNLIMITED if asked.limit is None else asked.limit)
            self.own.append(asked.key.digest in limits_of(asked.policy) if asked.policy.per_key else False)
            data = asked.key.text.encode("utf-8", "backslashreplace")
            self._texts.write(data)
            self._places.append(self._places[-1] + len(data))
        return found

    def text(self, number: int) -> str:
        """The key, as `per_key` and the command show it."""
        start, end = self._places[number], self._places[number + 1]
        self._texts.flush()
        self._texts.seek(start)
        data = self._texts.read(end - start)
        self._texts.seek(0, 2)
        return data.decode()

    def close(self) -> None:
        self._texts.close()

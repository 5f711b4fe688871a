"""The trial: what `manage.py check` asks a server for, once, all of it in the time of one call."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from django.core.checks import CheckMessage, Warning

from . import rights, wire
from .connecting import Recipe
from .leftovers import Leftovers
from .line import Undo, nothing
from .lines import Lines

#: Says maxmemory and its policy, to a user who may not CONFIG GET.
INFO = wire.pack(b"INFO", b"memory")


class Trial(Lines):
    """The stack of a check. `answered`: the server has carried out a call."""

    def __init__(self, recipe: Recipe, leftovers: Leftovers) -> None:
        super().__init__(recipe, leftovers, lambda: None)
        self.deadline = monotonic() + recipe.timeout
        self.answered = False

    def call(self, packed: bytes, undo: Undo, whole: Callable[[], bytes]) -> Any:
        reply = self._call(packed, undo, whole, self.deadline)
        self.answered = True
        return reply

    @property
    def over(self) -> bool:
        """Is there no time left?"""
        return monotonic() >= self.deadline

    def advice(self, keys: wire.Keys, place: str) -> list[CheckMessage]:
        """What is said of a server that works."""
        unknown, evicts = any(line.client is None for line in self._free), self._evicts()
        missing, fences = self._rights(keys)
        messages = rights.messages(place, unknown, fences, missing)
        if evicts:
            hint = "Set maxmemory-policy to noeviction there, or give the limits a Redis of their own."
            message = (
                f"{place}: the server has a maxmemory and the policy {evicts}: when its memory is full it may remove who holds "
                "slots, and more are admitted than the limit"
            )
            messages.append(Warning(message, hint=hint, id="django_concurrency_mw.W018"))
        return messages

    def close(self) -> None:
        if self.over:  # nothing more is waited for
            while self._free:
                self._lost(self._free.popleft())
        super().close()

    def _evicts(self) -> str:
        """The server's maxmemory-policy, if it may remove our keys; empty if not, and where it does not say."""
        try:
            text = bytes(self.call(INFO, nothing, lambda: INFO)).decode("utf-8", "replace")
        except Exception:  # forbidden, renamed, or no time left: it is only a piece of advice
            return ""
        said = dict(line.partition(":")[::2] for line in text.splitlines())
        limited = said.get("maxmemory", "0") != "0"
        policy = said.get("maxmemory_policy", "noeviction")
        return policy if limited and policy != "noeviction" else ""

    def _rights(self, keys: wire.Keys) -> tuple[list[str], bool]:
        """What its user lacks and whether it may fence off; nothing and yes where there is no time left to ask."""
        try:
            return rights.lacking(lambda packed: self.call(packed, nothing, lambda: packed), keys)
        except Exception:
            return [], True

"""The errors: what is wrong with a configuration, and what a caller may want to catch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

if TYPE_CHECKING:
    from .outcomes import Rejection

#: Characters of a value that an error message repeats.
SHOWN_LIMIT = 80


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where (`policies.yaml:3:12`, or the path into a setting), and the cure."""

    place: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


class ConfigurationError(ImproperlyConfigured):
    """Everything that is wrong with a configuration, one problem a line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class DecoratorUsageError(ConfigurationError, TypeError):
    """A decorator was written in a way that cannot work."""


class BackendError(Exception):
    """The store failed, and may work again: connection lost, timeout, loading, out of memory.

    `whole`: it fails for every request, so it is left alone until it answers a probe; False where this one call failed.
    """

    def __init__(self, message: str = "", *, whole: bool = True) -> None:
        self.whole = whole
        super().__init__(message)


class PermanentBackendError(BackendError):
    """The store fails until somebody changes something: no permission, wrong password, unknown command. `cure` says what."""

    def __init__(self, message: str = "", *, cure: str = "", whole: bool = True) -> None:
        self.cure = cure
        super().__init__(message, whole=whole)


class ConcurrencyLimitExceeded(Exception):
    """No slot was free. `rejection` says which policy, key and limit."""

    def __init__(self, rejection: Rejection) -> None:
        self.rejection = rejection
        super().__init__(rejection)

    def __str__(self) -> str:
        return f"policy {self.rejection.policy}: {self.rejection.reason}"


class SlotLost(Exception):
    """The slot is not there any more: its lease has ended, or somebody else has claimed it."""


def shown(value: Any) -> str:
    """A value for an error message: one short line, whatever it is; null, true and false as in YAML."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        text = repr(value)
    except Exception:  # a repr of the project's own, or an integer of more digits than Python prints
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split())
    if len(text) > SHOWN_LIMIT:
        text = f"{text[:SHOWN_LIMIT]}..."
    return text.encode("ascii", "backslashreplace").decode() if _has_surrogates(text) else text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'ttl'?"` for the nearest of the known names, else an empty text."""
    names = list(known)
    short = name[:SHOWN_LIMIT]
    near = get_close_matches(short, names, n=1) or get_close_matches(short.strip().lower(), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)

"""The effects: what steps ask of the outside, each with the type of its answer. Two drivers carry them out.

`reply = yield from Take(...)` is typed, as an effect is a generator of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .bells import Bell
from .outcomes import QueueReply, Reason, Slot, StoreFailed, TakeReply

if TYPE_CHECKING:
    from django.dispatch import Signal
    from django.http import HttpRequest

R = TypeVar("R")
Steps = Generator["Effect[Any]", Any, R]


class Effect(Generic[R]):
    """Something the outside has to do. `reply = yield from effect` gets its typed answer."""

    __slots__ = ()

    def __iter__(self) -> Generator[Effect[R], R, R]:
        return (yield self)


@dataclass(slots=True, eq=False)
class LoadUser(Effect[None]):
    """After this `request.user` can be read in either half."""

    request: HttpRequest


@dataclass(slots=True, eq=False)
class Ask(Effect[R]):
    """Call something of the project's, sync or async, off the event loop where it is sync. What it raises propagates."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Take(Effect[TakeReply | StoreFailed]):
    """Ask a store for slots, all its blocking ones or none."""

    store: Any
    slots: tuple[Slot, ...]


@dataclass(slots=True, eq=False)
class Give(Effect[tuple[bool, ...] | StoreFailed]):
    """Give slots back to their store. The answer: which of them were still held."""

    store: Any
    slots: tuple[Slot, ...]


@dataclass(slots=True, eq=False)
class Claim(Effect[bool | StoreFailed]):
    """Take over from the first slot of each pair, as the second one. All of them or none."""

    store: Any
    slots: tuple[tuple[Slot, Slot], ...]


@dataclass(slots=True, eq=False)
class Notify(Effect[None]):
    """Send a signal; a receiver that fails changes nothing."""

    signal: Signal
    arguments: dict[str, Any]


@dataclass(slots=True, eq=False)
class Enter(Effect[Bell | Reason]):
    """May this request wait for a slot? The answer is what will wake it, to be closed by whoever asked; or why not.

    `threads` is how many threads of this process may wait at once. `private_loop`: an event loop here serves this request
    alone, and so keeps a thread.
    """

    store: Any
    threads: int
    private_loop: bool = False


@dataclass(slots=True, eq=False)
class Queue(Effect[QueueReply | StoreFailed]):
    """Ask a store for slots, and stand in line for those that are full; or ask how that stands. See `BaseBackend.queue`."""

    store: Any
    slots: tuple[Slot, ...]
    most: tuple[int | None, ...]
    bell: Bell


@dataclass(slots=True, eq=False)
class Wait(Effect[None]):
    """Until the bell is rung, so many seconds at most."""

    bell: Bell
    seconds: float

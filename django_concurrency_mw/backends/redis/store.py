"""The Redis store: exact among all processes and hosts that share one Redis.

Threads use a stack of connections (`lines`), every event loop one multiplexed connection (`mux`). Both send one command to
take all of a request's slots, and one command per slot, in one packet, to give them back, whose replies nobody waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import weakref
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any, ClassVar, TypeVar

from django.core.checks import CheckMessage, Warning
from django.core.exceptions import ImproperlyConfigured
from redis.exceptions import RedisError, ResponseError

from ... import afresh
from ...bells import Bell
from ...exceptions import BackendError
from ...keeper import keeper
from ...outcomes import Queued, QueueReply, Slot, TakeReply
from ...tokens import process_id
from ..base import RESTORE_WITHIN, BackendConfig, BaseBackend, Holder, Restore, Waiter, check_message, probe_slot
from . import rights, tls, wire
from .errors import classed, is_replica
from .finding import recipe_for
from .leftovers import Leftovers
from .line import Undo, nothing
from .lines import Lines
from .listening import Ear
from .looking import Looks
from .mux import Mux
from .redirects import tries_again
from .trial import Trial
from .where import Fixed

logger = logging.getLogger("django_concurrency_mw")

#: Seconds between two looks at idle connections, at most.
TEND_EVERY = 5.0
#: Seconds between two tries to carry out what is left over.
DELIVER_AGAIN = 0.25
#: Seconds until idle connections are heard whose server may not be the one to ask any more.
HEAR_SOON = 0.1
#: Seconds until it is heard what became of a release, where its server may not be the one to ask any more. (By the look at idle
#: connections it was up to 6: nobody need ever ask again where it was sent.)
HEAR_WITHIN = 1.0
#: Seconds that stand for "no end": about 100 years.
FAR = 3e9
NO_END = float("inf")
T = TypeVar("T")
#: Slots that one renewal command is for, at most.
RENEW_AT_ONCE = 500


class RedisBackend(BaseBackend):
    """`LOCATION` is a URL; `OPTIONS` are the keywords of a redis-py connection, `socket_timeout` (0.25 s) first of all."""

    supports_semaphores: ClassVar[bool] = True
    supports_wait: ClassVar[bool] = True
    cancel_safe: ClassVar[bool] = True

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        if "{" in config.key_prefix or "}" in config.key_prefix:
            raise ImproperlyConfigured(
                f"{config.place}['KEY_PREFIX']: braces are the store's own "
                f"(the hash tag of a Cluster), got {config.key_prefix!r}"
            )
        self._recipe = recipe_for(config)
        self.timeout = self._recipe.timeout
        self.server = self._recipe.server
        self._keys = wire.Keys(config.key_prefix, of_a_cluster=bool(self._recipe.nodes))
        self._looks = Looks(self._recipe, self._keys)
        self._leftovers = Leftovers(self._wake)
        self._lines = Lines(self._recipe, self._leftovers, self._opened, self._astray)
        self._muxes: dict[asyncio.AbstractEventLoop, Mux] = {}
        self._ear = Ear(self._recipe, self._channel, self._deaf, self._stray)
        self._recipe.found = self._found
        #: May the server to ask be another one tomorrow?
        self._moves = type(self._recipe.where) is not Fixed
        self._tended = self._delivering = self._hearing = self._hearing_later = False
        #: What was logged last of what may come again and again.
        self._said = ""
        self.gives_on_loop = type(self).agive is RedisBackend.agive  # a subclass may do anything
        _stores.add(self)

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        keys = self._keys
        reply = self._call(keys.take(slots), lambda: keys.give(slots), lambda: keys.take(slots, whole=True))
        return wire.taken(reply, slots)

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        hears = self._ear.hears(slots[0].token, bell)
        ask = partial(self._keys.queue, slots, most, self._channel() if hears else b"")
        try:
            reply = self._call(ask(), partial(self._keys.give, slots), partial(ask, whole=True))
        except BackendError as error:
            return _later(error, slots, most)
        if wire.stands_still(reply, slots):
            self.give(slots)  # that it leaves is told until the slot has moved
        return wire.queued(reply, slots, hears=hears)

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        hears = await self._ear.ahears(slots[0].token, bell)
        ask = partial(self._keys.queue, slots, most, self._channel() if hears else b"")
        try:
            reply = await self._multiplexed(_as_it_is, slots, ask)
        except BackendError as error:
            return _later(error, slots, most)
        if wire.stands_still(reply, slots):
            await self.agive(slots)
        return wire.queued(reply, slots, hears=hears)

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        self._lines.tell(self._keys.give(slots))
        if self._moves and not self._hearing_later:
            self._hearing_later = True
            keeper.at(HEAR_WITHIN, self._hear_later)
        return [True] * len(slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        held: list[bool] = []
        for first in range(0, len(slots), RENEW_AT_ONCE):
            held += _in_parts(self._renew, slots[first : first + RENEW_AT_ONCE])
        return held

    def _renew(self, slots: Sequence[tuple[Slot, float]]) -> list[bool]:
        return self._held(self._call(self._keys.renew(slots), nothing, partial(self._keys.renew, slots, whole=True)))

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        held: list[bool] = []
        for first in range(0, len(holders), RENEW_AT_ONCE):
            held += _in_parts(self._restore, holders[first : first + RENEW_AT_ONCE])
        return held

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bool:
        packed = self._keys.claim(slots)
        # Whoever is not told that he has claimed does not hold: only behind the claim itself a release cannot overtake it.
        news = [new for _, new in slots]
        return wire.claimed(self._call(packed, partial(self._keys.give, news), lambda: packed), news)

    def _restore(self, holders: Sequence[Restore]) -> list[bool]:
        seconds, micros = self._call(wire.TIME, nothing, lambda: wire.TIME)
        # The server's clock was read before ours is: what is left of a lease by this reckoning is never too long.
        then, now = int(seconds) * 1000 + int(micros) // 1000, monotonic()
        packed = self._keys.restore(
            [(slot, lease, then + int(1000 * min(FAR, until - now))) for slot, lease, until in holders],
            then + int(1000 * min(RESTORE_WITHIN, self._recipe.timeout)),
        )
        reply = self._call(packed, nothing, lambda: packed)
        if 2 in reply:
            raise BackendError("the holders could not be counted again in time", whole=False)
        # A stand-in stays one where a key of another type is in the way: its process goes on counting it.
        return [
            back and (each == 1 or holder.until < NO_END)
            for back, each, holder in zip(self._held(reply), reply, holders, strict=True)
        ]

    def _held(self, reply: Sequence[int]) -> list[bool]:
        """A key of another type is said once; whom it is in the way of is tried again with the next renewal."""
        if -1 in reply:
            error = classed(ResponseError("WRONGTYPE"), self._keys)
            self._say(f"{error}: {getattr(error, 'cure', '')}", logging.ERROR)
        return [bool(each) for each in reply]

    def _say(self, text: str, level: int = logging.WARNING, *, trace: bool = False) -> None:
        """Not twice in a row."""
        if text != self._said:
            self._said = text
            logger.log(level, "backend %s: %s", self.config.alias, text, exc_info=trace)

    def probe(self) -> None:
        try:
            self._lines.refresh()
        except Exception as error:
            raise classed(error, self._keys) from error
        self._try_out()

    def recovered(self) -> None:
        for loop, mux in list(self._muxes.items()):
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(mux.retry_now)
        if self._leftovers:
            self._wake()

    def atake(self, slots: Sequence[Slot]) -> Coroutine[Any, Any, TakeReply]:
        return self._multiplexed(wire.taken, slots, self._keys.take, slots)

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        return self.give_on_loop(slots)

    def give_on_loop(self, slots: Sequence[Slot]) -> Sequence[bool]:
        self._mux().tell(self._keys.give(slots))
        return [True] * len(slots)

    def evict(self, token: str) -> bool:
        return self._looks.evict(token)

    def snapshot(self) -> Sequence[Holder]:
        return self._looks.holders()

    def waiters(self) -> Sequence[Waiter]:
        return self._looks.waiters()

    def counts(self, slots: Sequence[Slot]) -> Sequence[int]:
        if not slots:
            return []
        packed = self._keys.count(slots)
        reply: list[int] = self._call(packed, nothing, lambda: packed)
        return reply

    def note(self, peaks: Mapping[str, int]) -> None:
        packed = self._keys.note(peaks, process_id(), socket.gethostname(), os.getpid())
        self._call(packed, nothing, lambda: packed)

    def peaks(self) -> Mapping[str, int]:
        return self._looks.peaks()

    def reset_peaks(self) -> None:
        self._looks.reset_peaks()

    def count_place(self) -> Hashable:
        return self.server, self.config.key_prefix

    def check(self) -> Sequence[CheckMessage]:
        """Asks the server once, on a connection of its own, for `socket_timeout` at most in all.

        A server that answers, but not everything within that time, is not complained of: a request asks it for less.
        """
        tried = copy(self)
        lines = tried._lines = Trial(self._recipe, self._leftovers)
        try:
            tried._try_out()
            return lines.advice(self._keys, self.config.place)
        except Exception as error:
            if lines.answered and lines.over:
                return []
            hint = "Start it, or correct LOCATION. Until it works ON_BACKEND_ERROR decides about each request."
            hint += tls.suspicion(self._recipe.keywords)
            if is_replica(error):
                hint = "LOCATION is a replica, which takes no slots: give the master's URL. " + hint
            return [check_message(self, error, hint)]
        finally:
            lines.close()

    def check_waiting(self) -> Sequence[CheckMessage]:
        """Tries to listen once, for `socket_timeout` at most. Of a server that cannot be asked `check` has the word."""
        try:
            refusal = Ear(self._recipe, self._channel, self._deaf, self._stray).refusal()
        except Exception:
            return []
        if refusal is None:
            return []
        message = f"{self.config.place}: nobody can be told that it is his turn: {refusal}"
        hint = f"Until then those who wait ask every 50 ms. {rights.listening(self._keys)}"
        return [Warning(message, hint=hint, id="django_concurrency_mw.W025")]

    def close(self) -> None:
        """Close the idle connections of threads, and the ear if nobody waits; those of event loops end with their loop."""
        self._lines.close()
        self._ear.close()

    def _try_out(self) -> None:
        """Every command that a request needs, and each reply: nobody waits for that of a release, so a server that refuses
        those would never be noticed. Raises: BackendError."""
        super().probe()
        slot = probe_slot()
        self.take((replace(slot, limit=0),))  # what is done where there is no room
        for release in self._keys.give((slot,)):
            self._call(release.packed, nothing, partial(bytes, release.packed))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _call(self, packed: bytes, undo: Undo, whole: Callable[[], bytes]) -> Any:
        try:
            return self._lines.call(packed, undo, whole)
        except Exception as error:  # also what a keyword or a credential provider of the project's raises
            raise classed(error, self._keys) from error

    async def _multiplexed(
        self, read: Callable[[Any, Sequence[Slot]], T], slots: Sequence[Slot], pack: Callable[..., bytes], *about: Any
    ) -> T:
        """One round trip on the running loop's connection, and what its reply means. What it may have taken is given back if
        its reply does not come. One coroutine for all of it, as a request waits for no other."""
        mux = self._mux()
        try:
            waiter = mux.call(pack, *about)
        except RedisError as error:  # nothing was sent
            raise classed(error, self._keys) from error
        except BaseException:  # a signal handler's
            mux.tell(self._keys.give(slots))
            raise
        try:
            reply = await waiter
        except BaseException as error:
            mux.tell(self._keys.give(slots))  # behind the acquire, on its connection: only there it cannot overtake
            if isinstance(error, RedisError):
                raise classed(error, self._keys) from error
            raise
        return read(reply, slots)

    def _channel(self) -> bytes:
        return self._keys.channel(process_id())

    def _deaf(self, error: Exception) -> None:
        """Whoever waits here is told of nothing, and asks often."""
        self._say(
            f"nobody can be told that it is his turn, so those who wait ask every 50 ms: {error}: "
            + rights.listening(self._keys)
        )

    def _stray(self, token: str) -> None:
        """In the ear's thread, which has others to listen for: one was let in who does not wait any more."""
        keeper.at(0, partial(self._lines.tell, [self._keys.back(token.encode())]))

    def _mux(self) -> Mux:
        """The connection of the running loop. Those of loops that have ended are forgotten when a new one comes."""
        loop = asyncio.get_running_loop()
        mux = self._muxes.get(loop)
        if mux is None:
            self._drop_ended()
            mux = self._muxes[loop] = Mux(self._recipe, self._leftovers)
            self._opened()
        return mux

    def _wake(self) -> None:
        """There are releases that no connection was at hand for: the keeper connects, requests do not."""
        if not self._delivering:
            self._delivering = True
            keeper.at(0, self._deliver)

    def _deliver(self) -> None:
        """In the keeper's thread."""
        if self.failure is not None and not keeper.exiting:  # nobody connects but the probe
            keeper.at(DELIVER_AGAIN, self._deliver)
            return
        try:
            self._lines.deliver()
        except (RedisError, OSError):
            keeper.at(DELIVER_AGAIN, self._deliver)
            return
        except Exception as error:
            self._say(f"releases could not be delivered, it will be tried again: {error!r}", trace=True)
            keeper.at(DELIVER_AGAIN, self._deliver)
            return
        self._delivering = False
        if self._leftovers:  # added since it looked
            self._wake()

    def _found(self) -> None:
        """It is known where to connect to. Whoever is connected elsewhere is not told of anything there, and tells in vain."""
        self._ear.leave()
        if self._lines.have_to_leave:
            self._astray()

    def _astray(self) -> None:
        """The server to ask is another one now, or soon: so it is for releases that idle connections have sent."""
        if self._moves and not self._hearing:
            self._hearing = True
            keeper.at(HEAR_SOON, self._hear)

    def _hear(self) -> None:
        """In the keeper's thread."""
        self._hearing = False
        self._lines.hear_all()
        self._leave()

    def _hear_later(self) -> None:
        """In the keeper's thread."""
        self._hearing_later = False
        self._lines.hear_all()

    def _opened(self) -> None:
        """There is a connection of threads to look after from now on."""
        if not self._tended:
            self._tended = True
            keeper.at(min(TEND_EVERY, self._recipe.where.look_every), self._tend)

    def _tend(self) -> None:
        """In the keeper's thread: look after idle connections, and after loops that ended without a word."""
        soon = False
        try:
            self._drop_ended()
            self._lines.tend()
            soon = self._follow()
        finally:
            keeper.at(min(TEND_EVERY, self._recipe.where.look_every) if soon else TEND_EVERY, self._tend)

    def _follow(self) -> bool:
        """In the keeper's thread: nobody goes on asking a server that takes itself for the one still. Returns whether to look
        again soon."""
        soon = self._recipe.where.look(monotonic() + self.timeout)
        self._ear.leave()
        self._leave()
        return soon

    def _leave(self) -> None:
        self._lines.leave()
        for loop, mux in list(self._muxes.items()):
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(mux.leave)

    def _drop_ended(self) -> None:
        for loop in [known for known in list(self._muxes) if known.is_closed()]:
            mux = self._muxes.pop(loop, None)
            if mux is not None:
                mux.abandon()

    def _forget(self) -> None:
        self._recipe.where.forget()
        self._leftovers.forget()
        self._lines.forget()
        self._ear.forget()
        self._muxes = {}
        self._tended = self._delivering = self._hearing = self._hearing_later = False


def _as_it_is(reply: Any, slots: Sequence[Slot]) -> Any:
    return reply


def _in_parts(call: Callable[[Sequence[Any]], list[bool]], asked: Sequence[Any]) -> list[bool]:
    """One answer to each. While a slot moves in a Cluster, the keys of one call may be at two nodes: it is asked by halves."""
    try:
        return call(asked)
    except BackendError as error:
        if len(asked) == 1 or not tries_again(error.__cause__):
            raise
    half = len(asked) // 2
    return [*_in_parts(call, asked[:half]), *_in_parts(call, asked[half:])]


def _later(error: BackendError, slots: Sequence[Slot], most: Sequence[int | None]) -> Queued:
    """While a slot moves in a Cluster, what one who waits needs may be at two nodes: it asks again. Raises: every other error,
    and where it may not ask again."""
    if None in most or not tries_again(error.__cause__):
        raise error
    return Queued(tuple([slot.block for slot in slots]), (0,) * len(slots), 0, wire.ASK_OFTEN)


_stores: weakref.WeakSet[RedisBackend] = weakref.WeakSet()


def _forget_all() -> None:
    for store in list(_stores):
        store._forget()


afresh.begin_with(_forget_all)

"""The store interface: what a backend has to be able to do, and what it may say of itself."""

from __future__ import annotations

import os
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any, ClassVar, Final, NamedTuple

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning

from ..bells import Bell
from ..exceptions import BackendError, PermanentBackendError
from ..outcomes import Full, Key, QueueReply, Slot, TakeReply
from ..tokens import new_token

#: Seconds after which a `restore` that was given up has no effect any more.
RESTORE_WITHIN: Final = 1.0
#: The KEY_PREFIX of a site that gives none.
DEFAULT_PREFIX: Final = "concurrency"
#: The semaphore of a store's own, for probing; no policy can be called so.
PROBE: Final = "!probe"
#: Seconds after which one who stands in a line asks again, though no bell rang: at the latest, and at the earliest.
ASK_AGAIN, ASK_AGAIN_AFTER = 1.0, 0.01
#: Seconds after which one who has not asked again has no place in its lines any more.
PLACE_FOR: Final = 5.0


class Restore(NamedTuple):
    """A holder to be counted again: for `seconds` from now, but only as long as it is not `until` (monotonic seconds), when
    its lease may have ended; infinite for one that the store has never counted."""

    slot: Slot
    seconds: float
    until: float


def has_host() -> bool:
    """Can the store `host` be used on this platform?"""
    return sys.platform == "linux" and struct.calcsize("P") == 8


def worker_suffix() -> str:
    """What sets this process's semaphores apart in a parallel test run: "-gw0" for a worker of pytest-xdist, "-1" for one of
    Django's test runner; empty everywhere else. Programs that a worker of pytest-xdist starts inherit its suffix."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    number = getattr(sys.modules.get("django.test.runner"), "_worker_id", 0)
    return (f"-{worker}" if worker else "") + (f"-{number}" if number else "")


def settings_module() -> str:
    """The name of the site's settings module; empty where the settings come from no module."""
    return os.environ.get("DJANGO_SETTINGS_MODULE") or str(getattr(settings, "SETTINGS_MODULE", None) or "")


def probe_slot() -> Slot:
    """A slot that says whether a store works."""
    return Slot(PROBE, Key(PROBE, bytes(16)), 1_000_000, 1.0, new_token())


def age_of(slot: Slot) -> float:
    """Seconds since a slot is held, for people; never less than 0, whatever the clock was set to meanwhile."""
    return max(0.0, time() - slot.since - slot.waited)


@dataclass(frozen=True, slots=True)
class Holder:
    """One holder, as people see it. `age` and `lease_left` are in seconds; `key` is the resolved text, cut to a bound.

    `host` and `pid` are those of its process, and `ttl` the length of its lease in seconds, where the store knows them.
    """

    policy: str
    key: str
    token: str
    age: float
    lease_left: float
    path: str = ""
    pid: int | None = None
    cost: int = 1
    host: str = ""
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Waiter:
    """One who waits, as people see it, in one of the lines it stands in. `place` is 1 for the first; `age` in seconds since it
    joined; the others as for a holder."""

    policy: str
    key: str
    token: str
    place: int
    age: float
    path: str = ""
    pid: int | None = None
    cost: int = 1
    host: str = ""


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """One entry of CONCURRENCY_LIMIT['BACKENDS']: `location` a URL or a list of them, `options` as the store defines them."""

    alias: str
    backend: str
    location: Any = None
    key_prefix: str = DEFAULT_PREFIX
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it stands in the settings, for messages."""
        return f"CONCURRENCY_LIMIT['BACKENDS'][{self.alias!r}]"


class BaseBackend(ABC):
    """A store of semaphores. Provisional until 1.0.

    A take is atomic over all its slots, idempotent by token, and answers with the counts. What fails in the store is
    raised as `BackendError`; nothing else about the store may reach a request.
    """

    #: It can limit. A store that leaves this False raises ImproperlyConfigured where a limited view is called.
    supports_semaphores: ClassVar[bool] = False
    #: It can let a request wait in line.
    supports_wait: ClassVar[bool] = False
    #: Its calls stay on this machine; local stores are asked before remote ones.
    is_local: ClassVar[bool] = False
    #: A cancelled `atake` followed by `agive` of the same tokens leaves nothing behind. Where this is False, the driver
    #: lets a cancelled take run to its end before it gives back, as the release must never overtake the acquire.
    cancel_safe: ClassVar[bool] = False

    #: It counts in this process only, so that no other process can claim what is held in it.
    one_process: ClassVar[bool] = False

    #: Its calls wait for nobody, so that an event loop may make them itself.
    never_waits: bool = False
    #: So may it call `give_on_loop`, instead of awaiting `agive`.
    gives_on_loop: bool = False
    #: Seconds that one call may take before it fails; 0 where it waits for nobody.
    timeout: float = 0.0
    #: Of a store on a Redis: which server, and which of its databases.
    server: tuple[str, int, int] | None = None
    #: Why it is left alone now: it failed, and no probe has succeeded since. Kept by `health`.
    failure: Exception | None = None

    def __init__(self, config: BackendConfig) -> None:
        """Keep the configuration; connect to nothing. Raises: ImproperlyConfigured for options it does not know."""
        self.config = config

    @abstractmethod
    def take(self, slots: Sequence[Slot]) -> TakeReply:
        """Take every blocking slot or none at all; then each of the others where one is free."""

    def bell(self) -> Bell:
        """What wakes a thread that stands in line here."""
        return Bell()

    def abell(self) -> Bell:
        """What wakes a coroutine of the running event loop."""
        return Bell()

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        """`take`, but in turn: where a blocking slot is full, or others wait for it, stand at the end of its line.

        To ask once more, with the same slots, is to ask how that stands: it keeps its places, and loses them after PLACE_FOR
        seconds without a question. It takes all as soon as all have room and it is the first wherever it stands. Where it is
        first and another one is full, it leaves that line and stands in the other's: it never keeps free what it cannot take.
        `most` is how many may stand in each one's line. With None it is not waited for: where such a one is full the answer is
        Full, and the asker stands in no line any more; so that None for all asks for the last time. `give` leaves all lines.

        The bell rings when it is worth asking, at once after what it waits for has become free; the store may have given it
        its slots by then. A line's order is that in which its waiters joined; those whose process is dead are passed over.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot let anybody wait")

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        """`queue` on an event loop. The default calls `queue` in a thread of asgiref's."""
        from asgiref.sync import sync_to_async

        return await sync_to_async(self.queue, thread_sensitive=False)(slots, most, bell)

    @abstractmethod
    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        """Give slots back; any number of times. Returns which of them were still held (True where it cannot tell)."""

    @abstractmethod
    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        """Let each slot's lease end `seconds` from now. Returns which are still held; a lapsed one is not brought back."""

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        """Count holders again that the store has lost, whatever the limit; nobody who was evicted, or stands there lapsed.

        Returns which are held now. A call that fails has no effect later than RESTORE_WITHIN seconds after it. The default
        is for a store that never loses anything: none.
        """
        return [False] * len(holders)

    def probe(self) -> None:
        """Can it do all that requests need? In a thread of its own, after it has failed. Raises: whatever is wrong."""
        slot = probe_slot()
        try:
            reply = self.take((slot,))
            self.renew([(slot, 1.0)])
            self.restore([Restore(slot, 1.0, float("inf"))])
        finally:
            self.give((slot,))
        if isinstance(reply, Full):
            raise BackendError("it is full of probes")

    def recovered(self) -> None:  # noqa: B027  # nothing to do, for most stores
        """A probe has succeeded after it had failed. In the thread that probes."""

    def detach(self, slots: Sequence[Slot]) -> None:  # noqa: B027  # nothing to do where no process is watched
        """These are handed over: they outlive this process, to the end of their leases. Must not wait for anything."""

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bool:
        """Take over what was handed over: each first slot's holder becomes the second one, whose lease begins now.

        All of them or none: False where one of the first is not held any more, lapsed, or claimed already. The limit is not
        asked. It may be a claim of another process.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot hand slots over")

    async def atake(self, slots: Sequence[Slot]) -> TakeReply:
        """`take` on an event loop. The default calls `take` in a thread of asgiref's."""
        from asgiref.sync import sync_to_async

        return await sync_to_async(self.take, thread_sensitive=False)(slots)

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        """`give` on an event loop. The default calls `give` in a thread of asgiref's."""
        from asgiref.sync import sync_to_async

        return await sync_to_async(self.give, thread_sensitive=False)(slots)

    def give_on_loop(self, slots: Sequence[Slot]) -> Sequence[bool]:
        """`agive` of a store where `gives_on_loop` says that nothing is waited for. The default calls `give`."""
        return self.give(slots)

    def evict(self, token: str) -> bool:
        """Take a holder's slots away, for operators. Returns whether there was such a holder."""
        raise NotImplementedError(f"{type(self).__name__} cannot evict")

    def snapshot(self) -> Sequence[Holder]:
        """Who holds what now."""
        raise NotImplementedError(f"{type(self).__name__} cannot list its holders")

    def waiters(self) -> Sequence[Waiter]:
        """Who waits for what now, each line in its order; one who stands in several lines is in each of them."""
        return []

    def blind_spot(self) -> str:
        """What a process that only looks does not see of this store, for people; empty where it sees all."""
        return "it counts in each process, and only what this very process holds is seen" if self.one_process else ""

    def counts(self, slots: Sequence[Slot]) -> Sequence[int]:
        """What is in flight on each one's semaphore now, as a take would count it. Changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} cannot count without taking")

    def note(self, peaks: Mapping[str, int]) -> None:  # noqa: B027  # nothing to do for a store that tells people nothing
        """Keep, for people, the most that takes saw in flight on one key of each policy since the last note; and who this
        process is. In the keeper's thread."""

    def peaks(self) -> Mapping[str, int]:
        """Policy -> the most in flight on one of its keys since `reset_peaks`, by the notes of all processes."""
        return {}

    def peak_name(self, policy: str) -> str:
        """Under which name `peaks` has this policy, where a long one is cut."""
        return policy

    def reset_peaks(self) -> None:  # noqa: B027  # nothing to do where there are none
        """Forget the peaks."""

    def count_place(self) -> Hashable:
        """Where it counts: two stores of one kind that say the same are one count. By default, those configured alike."""
        config = self.config
        return repr((config.location, config.key_prefix, sorted(config.options.items(), key=repr)))

    def check(self) -> Sequence[Any]:
        """Django check messages about this store's configuration. Must not be slow and must not raise."""
        return []

    def check_waiting(self) -> Sequence[Any]:
        """The same about what only those need who wait; asked where a policy has `wait`."""
        return []


def check_message(store: BaseBackend, error: Exception, hint: str) -> CheckMessage:
    """What a check says of a store that cannot be used: an error with its cure, or a warning with this hint."""
    place = store.config.place
    if isinstance(error, PermanentBackendError):
        cure = f"{error.cure[:1].upper()}{error.cure[1:]}."
        return Error(f"{place}: {error}", hint=cure, id="django_concurrency_mw.E005")
    return Warning(f"{place} cannot be asked: {error}", hint=hint, id="django_concurrency_mw.W006")

"""The host store: one count for all processes of this machine, in a table that they share."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from django.core.checks import CheckMessage
from django.core.exceptions import ImproperlyConfigured

from ... import afresh
from ...bells import Bell
from ...exceptions import PermanentBackendError, did_you_mean, shown
from ...outcomes import QueueReply, Slot, TakeReply
from ..base import (
    BackendConfig,
    BaseBackend,
    Holder,
    Restore,
    Waiter,
    check_message,
    has_host,
    worker_suffix,
)
from . import bells, lines, noted, people
from .access import Access, Inside
from .layout import (
    DEFAULT_CELLS,
    FEWEST_CELLS,
    HELD,
    MOST_CELLS,
    QUEUED,
    Layout,
    peak_name,
    readable,
    rounded,
    semaphore,
)
from .opening import default_path, vet_file_system
from .ours import Ours
from .table import VISITOR, Table
from .visiting import visit

A = TypeVar("A")
R = TypeVar("R")


class HostBackend(BaseBackend):
    """`OPTIONS`: `path`, a file; `slots`, how many may be in flight in all, rounded up to a power of two (16,384)."""

    supports_semaphores: ClassVar[bool] = True
    supports_wait: ClassVar[bool] = True
    is_local: ClassVar[bool] = True
    #: A take has no point at which it could be cancelled but those at which nothing is taken.
    cancel_safe: ClassVar[bool] = True

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        place = config.place
        if not has_host():
            raise ImproperlyConfigured(
                f"{place}['BACKEND']: the host store needs 64-bit Linux, and this is {sys.platform}; use 'memory' or 'redis'"
            )
        self._given_path, slots = _options(config.options, f"{place}['OPTIONS']")
        self._ours = Ours()
        self._layout = Layout(slots)
        self._access = Access(self._where, self._layout, self._ours.saved, self._ours.moved)
        _stores.add(self)

    def _forget(self) -> None:
        """Start empty, as in a forked child: the parent's holders are not ours."""
        self._ours.forget()
        self._access.forget()

    # -- the interface ----------------------------------------------------------------------------------------------

    def take(self, slots: Sequence[Slot]) -> TakeReply:
        return self._access.call(self._ours.take, slots)

    def bell(self) -> Bell:
        return bells.bell()

    def abell(self) -> Bell:
        return bells.abell()

    def queue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        return self._access.call(self._ours.queue, (slots, most, bell))

    def give(self, slots: Sequence[Slot]) -> Sequence[bool]:
        try:
            return self._access.call(self._ours.give, slots)
        except Inside:
            self._access.put_aside(self._ours.give, slots)
            return [True] * len(slots)

    def renew(self, slots: Sequence[tuple[Slot, float]]) -> Sequence[bool]:
        return self._access.call(self._ours.renew, slots)

    def detach(self, slots: Sequence[Slot]) -> None:
        self._access.at_once(self._ours.detach, slots)

    def claim(self, slots: Sequence[tuple[Slot, Slot]]) -> bool:
        return self._access.call(self._ours.claim, slots)

    def restore(self, holders: Sequence[Restore]) -> Sequence[bool]:
        return self._access.call(self._ours.restore, holders)

    def evict(self, token: str) -> bool:
        return bool(self._visit(lambda table, token, now: table.evict(token), token))

    def snapshot(self) -> Sequence[Holder]:
        def copied_by_one_of_us(table: Table, state: int, now: int) -> people.Copy:
            if table.number != VISITOR:
                table.sweep(now, force=True)
                lines.serve(table, now)
            return people.copy(table, state, now)

        copied = self._visit(copied_by_one_of_us, HELD)
        return [] if copied is None else people.holders(copied)

    def waiters(self) -> Sequence[Waiter]:
        copied = self._visit(people.copy, QUEUED)
        return [] if copied is None else people.waiters(copied)

    def blind_spot(self) -> str:
        if self._access.takes_part or os.path.lexists(self._where()):
            return ""
        return f"no process of this user and this settings module has used it yet: there is no {self._where()}"

    def counts(self, slots: Sequence[Slot]) -> Sequence[int]:
        names = [semaphore(*slot.semaphore) for slot in slots]
        counts = self._visit(people.counts, names) or {}
        return [counts.get(name, 0) for name in names]

    def note(self, peaks: Mapping[str, int]) -> None:
        self._access.call(noted.note, peaks)

    def peaks(self) -> Mapping[str, int]:
        return self._visit(noted.peaks, None) or {}

    def peak_name(self, policy: str) -> str:
        return readable(peak_name(policy)[2])

    def reset_peaks(self) -> None:
        self._visit(noted.reset, None)

    async def atake(self, slots: Sequence[Slot]) -> TakeReply:
        return await self._access.acall(self._ours.take, slots)

    async def aqueue(self, slots: Sequence[Slot], most: Sequence[int | None], bell: Bell) -> QueueReply:
        return await self._access.acall(self._ours.queue, (slots, most, bell))

    async def agive(self, slots: Sequence[Slot]) -> Sequence[bool]:
        try:
            return await self._access.acall(self._ours.give, slots)
        except Inside:
            self._access.put_aside(self._ours.give, slots)
            return [True] * len(slots)

    def count_place(self) -> Hashable:
        return str(self._where())

    def check(self) -> Sequence[CheckMessage]:
        """Tries a file that is there; one that is not is left for the first request to make."""
        try:
            path = self._where()
            if os.path.lexists(path):
                self.probe()
                return []
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise PermanentBackendError(
                    f"{path} cannot be made",
                    cure="let this user write in its directory, or name another file in `path`",
                )
            vet_file_system(path, path.parent.stat())
        except Exception as error:
            return [check_message(self, error, "Until it works ON_BACKEND_ERROR decides about each request.")]
        return []

    def close(self) -> None:
        """Let go of the file. What is still held here ends as if the process had died."""
        self._forget()

    def _visit(self, work: Callable[[Table, A, int], R], argument: A) -> R | None:
        """For people, whose process need not be one of the table's. None: nothing is there."""
        if self._access.takes_part:
            return self._access.call(work, argument)
        return visit(self._where(), self._layout, work, argument)

    def _where(self) -> Path:
        return self._given_path or default_path(self.config.key_prefix)


def _options(options: Mapping[str, Any], place: str) -> tuple[Path | None, int]:
    for name in options:
        if name not in ("path", "slots"):
            raise ImproperlyConfigured(
                f"{place}: unknown option {shown(name)}; the host store has 'path' and 'slots'"
                + did_you_mean(str(name), ("path", "slots"))
            )
    path, slots = options.get("path"), options.get("slots", DEFAULT_CELLS)
    if path is not None and (not isinstance(path, str | os.PathLike) or not os.path.isabs(path)):
        raise ImproperlyConfigured(f"{place}['path']: expected the absolute path of a file, got {shown(path)}")
    if not isinstance(slots, int) or isinstance(slots, bool) or not FEWEST_CELLS <= slots <= MOST_CELLS:
        raise ImproperlyConfigured(
            f"{place}['slots']: expected an integer from {FEWEST_CELLS} to {MOST_CELLS}, got {shown(slots)}"
        )
    return None if path is None else Path(f"{Path(path)}{worker_suffix()}"), rounded(slots)


_stores: weakref.WeakSet[HostBackend] = weakref.WeakSet()


def _forget_all() -> None:
    for store in list(_stores):
        store._forget()


afresh.begin_with(_forget_all)

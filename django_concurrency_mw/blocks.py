"""The block: a `with` or `async with` that owns a lease for its length, one time after another."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Generic, TypeVar

from .drivers import arun, run
from .effects import Steps
from .keeper import keeper
from .lease import Lease

T = TypeVar("T")


class Block(Generic[T]):
    """Subclasses say what is taken into the lease. Whatever goes wrong then, and however the block ends, it is given back."""

    #: How messages call it.
    called: str

    def __init__(self) -> None:
        self._lease: Lease | None = None
        self._dropped: weakref.finalize[[Any], Any] | None = None

    def steps(self, lease: Lease) -> Steps[T]:
        """Take. The answer is what `as` gets."""
        raise NotImplementedError

    def __enter__(self) -> T:
        lease = self._begin()
        try:
            return run(self.steps(lease))
        except BaseException:
            self._end().release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end().release()

    async def __aenter__(self) -> T:
        lease = self._begin()
        try:
            return await arun(self.steps(lease))
        except BaseException:
            self._end().release()  # not awaited: this may be a cancel, or a coroutine that is closed
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end().arelease()

    def _begin(self) -> Lease:
        if self._lease is not None:
            raise RuntimeError(f"{self.called}: this block is under way; make one {self.called}(...) for each")
        lease = self._lease = Lease()
        # Of a block that nobody ends, such as a generator's that is dropped.
        self._dropped = weakref.finalize(self, keeper.abandon, lease)
        self._dropped.atexit = False
        keeper.ready()
        return lease

    def _end(self) -> Lease:
        lease, self._lease = self._lease, None
        if lease is None or self._dropped is None:
            raise RuntimeError(f"{self.called}: this block has not begun, or has ended")
        self._dropped.detach()
        return lease

"""The true end of a response: binds a lease to it, so that the slots are held until it is finished and never longer.

A plain response has ended when the middleware gets it. An unrendered one ends when it has been rendered. A streaming one
ends when the server closes it; when its iterator raises; or, where nobody closes it (a client that left, a middleware that
put another response in its place), when the last reference to it and to its iterator is gone.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

from asgiref.sync import sync_to_async
from django.http import (
    HttpResponse,
    HttpResponseForbidden,
    HttpResponseNotFound,
    HttpResponseRedirect,
    JsonResponse,
    StreamingHttpResponse,
)
from django.http.response import HttpResponseBase

from .keeper import keeper
from .lease import Lease

#: Of these kinds a response has ended when it is made; of others that has to be looked at.
ENDED = frozenset({HttpResponse, JsonResponse, HttpResponseRedirect, HttpResponseNotFound, HttpResponseForbidden})


def finish(lease: Lease, response: HttpResponseBase) -> None:
    """Give back now, or at the response's end; from a thread."""
    if type(response) in ENDED or not _bound(lease, response):
        lease.release()


async def afinish(lease: Lease, response: HttpResponseBase) -> None:
    """Give back now, or at the response's end; on an event loop."""
    if type(response) in ENDED or not _bound(lease, response):
        rest = lease.released()
        if rest is not None:
            await rest


async def release_cancelled(lease: Lease) -> None:
    """The task was cancelled, but a sync view may still run in its thread: give back behind it, what it may yet take too.

    The hop queues in the request's own thread-sensitive context, so it runs when the view's thread is free. A second cancel
    ends the wait, not the hop.
    """
    lease.give_up()  # the view's thread may stand in line
    task = asyncio.get_running_loop().create_task(_release_in_thread(lease))
    _releasing.add(task)
    task.add_done_callback(_releasing.discard)
    # Where the loop ends, and this task with it, perhaps before its first step.
    task.add_done_callback(lambda done: keeper.abandon(lease))
    keeper.ready()
    await asyncio.shield(task)


async def _release_in_thread(lease: Lease) -> None:
    try:
        await sync_to_async(lease.release, thread_sensitive=True)()
    except RuntimeError:  # the request's thread has been shut down, so nothing runs in it any more
        lease.release()


#: An event loop refers to its tasks weakly.
_releasing: set[asyncio.Task[None]] = set()


class _Anchor:
    """Held by the response and by its iterator: when it is gone, both are."""

    __slots__ = ("__weakref__",)


def _bound(lease: Lease, response: HttpResponseBase) -> bool:
    """Tie the lease to the response's end; False where it has ended already."""
    if not lease:
        return False
    if isinstance(response, StreamingHttpResponse):
        _anchor(lease, response)
        # Survives a new streaming_content (GZip); the server's close runs in a thread.
        response._resource_closers.append(lease.release)  # type: ignore[attr-defined]  # not in the stubs
        return True
    if getattr(response, "is_rendered", True) is False:
        _anchor(lease, response)
        response.add_post_render_callback(lambda rendered: finish(lease, rendered))  # type: ignore[attr-defined]  # SimpleTemplateResponse
        return True
    return False


def _anchor(lease: Lease, response: Any) -> None:
    anchor = _Anchor()
    weakref.finalize(
        anchor, keeper.abandon, lease
    ).atexit = False  # no I/O in a garbage collection: the keeper gives back
    keeper.ready()
    response._concurrency_anchor = anchor
    if response.streaming:
        # Put in directly: through `streaming_content` a file would lose its place for wsgi.file_wrapper.
        guard = _AsyncGuard if response.is_async else _Guard
        response._iterator = guard(response._iterator, lease, anchor)


class _Guard:
    """A stream's iterator that gives the slots back when it raises. Objects, not generators: an unstarted generator never
    runs its `finally`. A normal end is left to the response's closers."""

    def __init__(self, iterator: Iterator[Any], lease: Lease, anchor: _Anchor) -> None:
        self._iterator, self._lease, self._anchor = iterator, lease, anchor

    def __iter__(self) -> _Guard:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except BaseException:
            self._lease.release()
            raise


class _AsyncGuard:
    """`_Guard` for asynchronous iterators."""

    def __init__(self, iterator: AsyncIterator[Any], lease: Lease, anchor: _Anchor) -> None:
        self._iterator, self._lease, self._anchor = iterator, lease, anchor

    def __aiter__(self) -> _AsyncGuard:
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._iterator)
        except StopAsyncIteration:
            raise
        except BaseException:
            self._lease.release()
            raise

"""The two drivers: they carry out the steps' effects, one with calls, one with awaits, and decide nothing."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from inspect import isawaitable
from time import monotonic
from typing import Any, TypeVar

from asgiref.sync import async_to_sync, iscoroutinefunction, sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.utils.functional import LazyObject, empty

from . import afresh
from .bells import Bell
from .effects import Ask, Claim, Effect, Enter, Give, LoadUser, Notify, Queue, Steps, Take, Wait
from .keeper import keeper
from .outcomes import QueueReply, Reason, Slot, StoreFailed, TakeReply

T = TypeVar("T")


class _Place:
    """One thread that waits. Its bell keeps it."""

    __slots__ = ("__weakref__",)


#: Of the threads of this process that wait now, and what serialises who comes in. Weakly: an exception may come from anywhere,
#: and a place that nobody gives back would be lost for good.
_waiting: weakref.WeakSet[_Place] = weakref.WeakSet()
_entering = threading.RLock()


def _forked() -> None:
    global _entering
    _entering = threading.RLock()  # a thread that is not in the child may have held it
    _waiting.clear()


afresh.begin_with(_forked)


def run(steps: Steps[T]) -> T:
    """Drive steps to their end in this thread. Raises what an effect of the project raises."""
    try:
        effect = next(steps)
        while True:
            try:
                reply = _SYNC[type(effect)](effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # a generator's return value is untyped here


async def arun(steps: Steps[T]) -> T:
    """Drive steps to their end on this event loop. A cancel arrives at the effect under way, as any exception does."""
    try:
        effect = next(steps)
        while True:
            try:
                reply = await _ASYNC[type(effect)](effect)
            except BaseException as error:
                effect = steps.throw(error)
            else:
                effect = steps.send(reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # a generator's return value is untyped here


def _known(store: Any) -> StoreFailed | None:
    """It is known to fail, so it is not asked."""
    failure = store.failure
    return None if failure is None else StoreFailed(failure, sent=False)


# -- threads --------------------------------------------------------------------------------------------------------


def take(store: Any, slots: Sequence[Slot]) -> TakeReply | StoreFailed:
    """Without steps, too."""
    failure = store.failure
    if failure is not None:  # it is known to fail, so it is not asked
        return StoreFailed(failure, sent=False)
    try:
        return store.take(slots)  # type: ignore[no-any-return]  # of any store
    except Exception as error:
        return StoreFailed(error)


def _take(effect: Take) -> TakeReply | StoreFailed:
    return take(effect.store, effect.slots)


def _queue(effect: Queue) -> QueueReply | StoreFailed:
    return _asked(effect.store, effect.store.queue, effect.slots, effect.most, effect.bell)


def _asked(
    store: Any, method: Callable[..., T], *arguments: Any, raises: tuple[type[Exception], ...] = ()
) -> T | StoreFailed:
    """`raises`: what is wrong with the project, and not with the store."""
    failed = _known(store)
    if failed is not None:
        return failed
    try:
        return method(*arguments)
    except raises:
        raise
    except Exception as error:
        return StoreFailed(error)


def _enter(effect: Enter) -> Bell | Reason:
    """One that runs an event loop would keep everybody there waiting, those included who could give a slot back."""
    return "full" if _runs_a_loop() else _counted(effect.threads, effect.store.bell)


def _counted(threads: int, bell: Callable[[], Bell]) -> Bell | Reason:
    """A thread that waits is one less for requests without a limit. The place first: a bell may cost a socket."""
    place = _Place()
    with _entering:
        if len(_waiting) >= threads:
            return "queue_full"
        _waiting.add(place)
    try:
        made = _made(bell)
        made.at_close(partial(_come_out, place))
    except BaseException:
        _come_out(place)
        raise
    return made


def _made(bell: Callable[[], Bell]) -> Bell:
    """Where a store has none to give, asking again after a while is as good."""
    try:
        return bell()
    except Exception:
        return Bell()


def _come_out(place: _Place) -> None:
    with _entering:
        _waiting.discard(place)


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _wait(effect: Wait) -> None:
    effect.bell.wait(effect.seconds)


def _give(effect: Give) -> tuple[bool, ...] | StoreFailed:
    try:
        return tuple(effect.store.give(effect.slots))
    except Exception as error:
        return StoreFailed(error)


def _claim(effect: Claim) -> bool | StoreFailed:
    wrong = (ImproperlyConfigured, NotImplementedError)
    return _asked(effect.store, effect.store.claim, effect.slots, raises=wrong)


def _load_user(effect: LoadUser) -> None:
    user = getattr(effect.request, "user", None)
    if user is not None:
        bool(user.is_authenticated)  # a lazy user is read here and now


def _ask(effect: Ask[Any]) -> Any:
    if iscoroutinefunction(effect.function):
        return async_to_sync(effect.function)(*effect.arguments)
    answer = effect.function(*effect.arguments)
    return async_to_sync(_awaited)(answer) if isawaitable(answer) else answer


def _notify(effect: Notify) -> None:
    effect.signal.send_robust(**effect.arguments)


# -- event loops ----------------------------------------------------------------------------------------------------


async def atake(store: Any, slots: Sequence[Slot]) -> TakeReply | StoreFailed:
    """Without steps, too."""
    failure = store.failure
    if failure is not None:
        return StoreFailed(failure, sent=False)
    try:
        if store.cancel_safe:
            return await store.atake(slots)  # type: ignore[no-any-return]  # of any store
        return await _whole(store, slots, store.atake(slots))
    except Exception as error:
        return StoreFailed(error)


async def _atake(effect: Take) -> TakeReply | StoreFailed:
    return await atake(effect.store, effect.slots)


async def _aqueue(effect: Queue) -> QueueReply | StoreFailed:
    return await _aasked(effect.store, effect.store.aqueue, effect.slots, effect.most, effect.bell)


async def _aasked(
    store: Any, method: Callable[..., Coroutine[Any, Any, T]], slots: Sequence[Slot], *more: Any
) -> T | StoreFailed:
    failed = _known(store)
    if failed is not None:
        return failed
    try:
        if store.cancel_safe:
            return await method(slots, *more)
        return await _whole(store, slots, method(slots, *more))
    except Exception as error:
        return StoreFailed(error)


async def _aenter(effect: Enter) -> Bell | Reason:
    """A coroutine that waits keeps nobody else from going on, but where there is nobody else."""
    return _counted(effect.threads, effect.store.abell) if effect.private_loop else _made(effect.store.abell)


async def _await(effect: Wait) -> None:
    await effect.bell.await_(effect.seconds)


async def _whole(store: Any, slots: Sequence[Slot], call: Coroutine[Any, Any, T]) -> T:
    """A call that is not stopped half way. Whoever is cancelled gives back at once, which may overtake it: it is given back
    once more behind its reply."""
    task = _keep(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda done: done.cancelled() or _keep(_swallowed(store.agive(slots))))
        raise


async def agive(store: Any, slots: Sequence[Slot]) -> tuple[bool, ...] | StoreFailed:
    """Without steps, too."""
    try:
        if store.cancel_safe:
            return tuple(await store.agive(slots))
        return tuple(await asyncio.shield(_keep(store.agive(slots))))
    except Exception as error:
        return StoreFailed(error)


def give_on_loop(store: Any, slots: Sequence[Slot]) -> tuple[bool, ...] | StoreFailed:
    """Without steps, of a store that need not be waited for."""
    try:
        return tuple(store.give_on_loop(slots))
    except Exception as error:
        return StoreFailed(error)


async def _agive(effect: Give) -> tuple[bool, ...] | StoreFailed:
    return await agive(effect.store, effect.slots)


async def _aclaim(effect: Claim) -> bool | StoreFailed:
    """In a thread, as it is rare. Cancelled, it runs to its end, and what it got is given back behind it."""
    first: list[str] = []

    def claim() -> bool | StoreFailed:
        reply = _claim(effect)
        first.append("answered")
        if first[0] != "answered":
            new = tuple(new for _, new in effect.slots)
            try:
                effect.store.give(new)
            except Exception:
                keeper.give_later(effect.store, new, monotonic() + max(slot.ttl for slot in new))
        return reply

    try:
        return await asyncio.shield(_keep(sync_to_async(claim, thread_sensitive=False)()))
    except asyncio.CancelledError:
        first.append("cancelled")
        raise


async def _aload_user(effect: LoadUser) -> None:
    request = effect.request
    user = vars(request).get("user")
    if not isinstance(user, LazyObject) or user._wrapped is not empty:
        return
    if _is_djangos_own(user):
        # Once, and into request.user: a sync view then reads it without a query of its own more than without us.
        request.user = await request.auser()
    else:
        await sync_to_async(_load_user, thread_sensitive=True)(effect)


async def _aask(effect: Ask[Any]) -> Any:
    if iscoroutinefunction(effect.function):
        return await effect.function(*effect.arguments)
    answer = await sync_to_async(effect.function, thread_sensitive=True)(*effect.arguments)
    return await answer if isawaitable(answer) else answer


async def _anotify(effect: Notify) -> None:
    await effect.signal.asend_robust(**effect.arguments)


def _is_djangos_own(user: object) -> bool:
    """Was it put there by AuthenticationMiddleware? Then `request.auser()` is the same user."""
    return getattr(vars(user).get("_setupfunc"), "__module__", "") == "django.contrib.auth.middleware"


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


_tasks: set[asyncio.Task[Any]] = set()


def _keep(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that lives to its end: an event loop itself refers to its tasks weakly."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


async def _swallowed(awaitable: Awaitable[Any]) -> None:
    try:
        await awaitable
    except Exception:
        return  # the lease's end gives the slot back


_SYNC: dict[type[Effect[Any]], Callable[[Any], Any]] = {
    Take: _take,
    Enter: _enter,
    Queue: _queue,
    Wait: _wait,
    Give: _give,
    Claim: _claim,
    LoadUser: _load_user,
    Ask: _ask,
    Notify: _notify,
}
_ASYNC: dict[type[Effect[Any]], Callable[[Any], Coroutine[Any, Any, Any]]] = {
    Take: _atake,
    Enter: _aenter,
    Queue: _aqueue,
    Wait: _await,
    Give: _agive,
    Claim: _aclaim,
    LoadUser: _aload_user,
    Ask: _aask,
    Notify: _anotify,
}

"""The decorators: a limit for one view, taken where the decorator stands, and the exemption from the table.

`concurrency_limit(...)` compiles its keywords once. What it makes of a view is cheap and registers nothing, because
`method_decorator` makes it anew on every request.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import wraps
from inspect import isawaitable
from itertools import count
from types import CoroutineType
from typing import Any, TypeVar, cast

from asgiref.sync import iscoroutinefunction
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from . import conf, reload
from .admission import aadmit, admit
from .exceptions import DecoratorUsageError, Problem, did_you_mean, shown
from .fields import UNSET, override
from .keeper import keeper
from .keyspec import parse_key
from .lease import Lease
from .lifetime import ENDED, afinish, finish, release_cancelled
from .limiter import MARK, conclude, join, leave
from .naming import MARK_EACH, NOT_A_NAME, further_in, instance_of, marks, numbered, path_of
from .outcomes import NOT_LIMITED
from .policies import Policy, PolicyTable

V = TypeVar("V", bound=Callable[..., Any])

_serial = count(1)

#: Every call of `concurrency_limit` that is alive, for the system checks.
limits: weakref.WeakSet[Limit] = weakref.WeakSet()


def concurrency_limit(
    key: str | Callable[[HttpRequest], Any] = UNSET,
    max_concurrent: int | str | Callable[[HttpRequest], Any] | None = UNSET,
    ttl: float | str = UNSET,
    backend: str | None = None,
    block: bool = UNSET,
    response_callback: str | Callable[[HttpRequest], Any] | None = None,
    *,
    policy: str | None = None,
    name: str | None = None,
    **fields: Any,
) -> Callable[[V], V]:
    """Limit how many requests are in this view at once, per key. The slot is taken here, after the decorators above.

    `key` and `max_concurrent` (slots; None: counted, never full; or a callable of the request) are required unless
    `policy=` names a policy of the table to start from. `ttl` in seconds (60) or text such as "5m"; `backend` an alias of
    BACKENDS ("default"); `block=False` never rejects. `response_callback(request)` answers a rejected request. Every other
    policy field may be given by keyword but `url_names` and `exclude`. `name` names the semaphore, by default the view's
    dotted path.

    Raises: DecoratorUsageError at once for a bad or missing keyword; ImproperlyConfigured on the first request (and in
    `manage.py check`) for an unknown policy or store, or a name that a policy of the table has.
    """
    place = _place()
    given = {
        "key": key,
        "max_concurrent": max_concurrent,
        "ttl": ttl,
        "block": block,
        **({} if backend is None else {"backend": backend}),
        **({} if response_callback is None else {"response_callback": response_callback}),
        **fields,
    }
    given = {field: value for field, value in given.items() if value is not UNSET}
    if callable(key) and given.keys() == {"key"} and policy is None and name is None:
        raise DecoratorUsageError(
            [Problem(place, "@concurrency_limit needs arguments: @concurrency_limit(key='user', max_concurrent=5)")]
        )
    if name is not None and policy is not None:
        raise DecoratorUsageError([Problem(place, "@concurrency_limit: give name= or policy=, not both")])
    if name is not None and (not isinstance(name, str) or not name or NOT_A_NAME.search(name)):
        raise DecoratorUsageError([Problem(place, f"@concurrency_limit: name= must be [A-Za-z0-9_.-]+, got {name!r}")])
    return cast("Callable[[V], V]", Limit(given, policy, name, place).decorate)


#: Stands for the table's policy until that is known.
_ANY = Policy("any", parse_key("global"), 1)


class Limit:
    """One call of `concurrency_limit`: its compiled keywords, and the policy that they make for each view."""

    def __init__(self, given: dict[str, Any], policy: str | None, name: str | None, place: str) -> None:
        self.given, self.policy_name, self.name, self.place = given, policy, name, place
        self._mark = f"{MARK_EACH}{next(_serial)}"
        # Wrong keywords are wrong under any name, and over any policy of the table.
        if policy is None:
            override(None, name or "view", given, place)
        else:
            override(_ANY, policy, given, place)
            reload.used(policy, place)
        self._by_name: dict[str, Policy] = {}
        self._names: dict[tuple[type, str, int], str] = {}
        self._from_table: tuple[object, Policy] | None = None
        limits.add(self)

    def decorate(self, view: V) -> V:
        """The view, limited. Types and attributes stay. Raises: DecoratorUsageError for a class, or for no view at all."""
        _refuse_no_view("concurrency_limit(...)", view, self.place)
        guard = _Guard(self, view, 1 + len(marks(view)))
        wrapper = _wrapped(view, guard.call, guard.acall)
        setattr(wrapper, self._mark, guard)
        return cast("V", wrapper)

    def policy(self, default_name: str, config: conf.Config) -> Policy:
        """The policy for a view whose name would be `default_name`. Raises: ImproperlyConfigured."""
        if self.policy_name is not None:
            return self._table_policy(config)
        name = self.name or default_name
        if config.table.get(name) is not None:
            raise ImproperlyConfigured(f"{self.place}: {_taken(name)}")
        found = self._by_name.get(name)
        if found is None:
            found = self._by_name[name] = override(None, name, self.given, self.place)
        return found

    def problems(self, table: PolicyTable) -> Iterator[Problem]:
        """What requests would find out if this were the table."""
        if self.policy_name is not None:
            base = table.get(self.policy_name)
            try:
                _ = base is not None and override(base, base.name, self.given, self.place)
            except DecoratorUsageError as error:
                yield from error.problems
            return
        # A default name is a dotted path; the system checks ask under others.
        names = [self.name] if self.name is not None else [name for name in list(self._by_name) if "." in name]
        yield from (Problem(self.place, _taken(name)) for name in names if table.get(name) is not None)

    def name_on(self, cls: type, method: str, number: int) -> str:
        """The default name on a method of this class; remembered, as the view is made anew on every request."""
        known = (cls, method, number)
        name = self._names.get(known)
        if name is None:
            own = "" if method == "dispatch" else f".{method}"
            number += further_in(cls, method, self._mark)
            name = self._names[known] = numbered(path_of(cls) + own, number)
        return name

    def _table_policy(self, config: conf.Config) -> Policy:
        known = self._from_table
        if known is not None and known[0] is config:
            return known[1]
        assert self.policy_name is not None
        base = config.table.get(self.policy_name)
        if base is None:
            raise ImproperlyConfigured(
                f"{self.place}: @concurrency_limit: no policy {self.policy_name!r} in CONCURRENCY_LIMIT['POLICIES']"
                + did_you_mean(self.policy_name, (policy.name for policy in config.table))
            )
        policy = override(base, base.name, self.given, self.place)
        self._from_table = (config, policy)
        return policy


def _problems(table: PolicyTable) -> list[Problem]:
    """What is wrong with a table, by the decorators that there are."""
    return [problem for limit in _alive() for problem in limit.problems(table)]


reload.ask(_problems)


def _alive() -> list[Limit]:
    while True:
        try:
            return list(limits)
        except RuntimeError:  # another thread has just made one
            continue


def _taken(name: str) -> str:
    return (
        f"@concurrency_limit: {name!r} is the name of a policy of the table; use policy={name!r} to start from it, or give "
        "another name="
    )


class _Guard:
    """One decorated view: takes the slot, calls the view, and owns the slot's end where no middleware does."""

    __slots__ = ("_awaited", "_instance", "_is_dispatch", "_known", "_limit", "_name", "_number", "_view")

    def __init__(self, limit: Limit, view: Callable[..., Any], number: int) -> None:
        self._limit, self._view, self._number = limit, view, number
        self._instance = instance_of(view)
        self._is_dispatch = getattr(view, "__name__", "") == "dispatch"
        self._name: str | None = None
        #: Of a function: the policy, and the configuration that it is of.
        self._known: tuple[conf.Config, Policy] | None = None
        self._awaited = False

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Of a view that is no coroutine function."""
        if args and isinstance(args[0], HttpRequest):  # as nearly always
            request, instance = args[0], None
        else:
            request, instance = _request_of(args, kwargs)
        if self._awaited or (self._is_dispatch and self._is_awaited(instance)):
            return self.acall(args, kwargs)
        turn = self._turn(request, instance)
        if turn is None:
            return self._view(*args, **kwargs)
        config, policy = turn
        lease, shares = join(request)
        try:
            response = admit(request, lease, (policy,), _url_kwargs(request, kwargs), config)
            if response is None:
                response = self._view(*args, **kwargs)
            if not isinstance(response, HttpResponseBase) and isawaitable(response):
                self._awaited = True
                return _later(request, lease, response) if shares else response
        except BaseException:
            if shares and leave(request, lease):
                lease.release()
            raise
        if shares and leave(request, lease):
            if lease.tells:
                conclude(request, response, lease)
            if type(response) in ENDED:
                lease.release()
            else:
                finish(lease, response)
        return response

    async def acall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """On an event loop."""
        if args and isinstance(args[0], HttpRequest):
            request, instance = args[0], None
        else:
            request, instance = _request_of(args, kwargs)
        turn = self._turn(request, instance)
        if turn is None:
            return await _awaited(self._view(*args, **kwargs))
        config, policy = turn
        lease, shares = join(request)
        try:
            response: Any = await aadmit(request, lease, (policy,), _url_kwargs(request, kwargs), config)
            if response is None:
                response = self._view(*args, **kwargs)
                if type(response) is CoroutineType or isawaitable(response):
                    response = await response
        except BaseException as error:
            if shares and leave(request, lease):
                await _cut_short(lease, error)
            raise
        if shares and leave(request, lease):
            await _concluded(request, response, lease)
        return response

    def _is_awaited(self, instance: object | None) -> bool:
        """Has this `dispatch` to answer with something to await, a rejection included?

        `View.dispatch` has in an asynchronous class. Of other plain functions only their first answer tells. Where they are
        called says nothing: async_to_sync calls outside its loop, and a plain view may be called on one.
        """
        return bool(getattr(type(self._instance if instance is None else instance), "view_is_async", False))

    def _turn(self, request: HttpRequest, instance: Any) -> tuple[conf.Config, Policy] | None:
        """The configuration and the policy in force for this call; None where it does not limit it."""
        config = conf.current()
        if not hasattr(request, "concurrency"):  # no middleware put it there
            request.concurrency = NOT_LIMITED  # type: ignore[attr-defined]  # ours to set
        if not config.enabled:
            return None
        turn = self._known
        if turn is None or turn[0] is not config:
            turn = config, self._limit.policy(self._default_name(instance), config)
            if instance is None and self._instance is None:
                self._known = turn
        methods = turn[1].methods
        return None if methods is not None and request.method not in methods else turn

    def _default_name(self, instance: object | None) -> str:
        instance = self._instance if instance is None else instance
        if instance is not None:
            return self._limit.name_on(type(instance), getattr(self._view, "__name__", "dispatch"), self._number)
        if self._name is None:
            self._name = numbered(path_of(self._view), self._number)
        return self._name

    def policy(self, config: conf.Config) -> Policy:
        """The policy of a request here, where this is a function. Raises: ImproperlyConfigured."""
        return self._limit.policy(self._default_name(None), config)

    def policy_on(self, cls: type, method: str, number: int, config: conf.Config) -> Policy:
        """The policy of a request on this method of a class, where this is the method's `number`th decorator, counted
        outwards. Raises: ImproperlyConfigured."""
        return self._limit.policy(self._limit.name_on(cls, method, number), config)


async def _cut_short(lease: Lease, error: BaseException) -> None:
    """This ended the request instead of an answer."""
    if isinstance(error, asyncio.CancelledError):
        await release_cancelled(lease)
    elif isinstance(error, Exception):
        await lease.arelease()
    else:  # GeneratorExit and the like: nothing may be awaited any more
        lease.release()


async def _concluded(request: HttpRequest, response: Any, lease: Lease) -> None:
    if lease.tells:
        conclude(request, response, lease)
    await afinish(lease, response)


def _later(request: HttpRequest, lease: Lease, answer: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    """What a plain function returned is still to be awaited: the lease ends with that, or if nobody ever awaits it."""
    nobody: list[weakref.finalize[Any, Any]] = []

    async def awaited() -> Any:
        nobody[0].detach()
        try:
            response = await answer
        except BaseException as error:
            if leave(request, lease):
                await _cut_short(lease, error)
            raise
        if leave(request, lease):
            await _concluded(request, response, lease)
        return response

    coroutine = awaited()
    # A coroutine that is never started runs none of its own code, its `except` clauses included.
    nobody.append(weakref.finalize(coroutine, keeper.abandon, lease))
    nobody[0].atexit = False
    keeper.ready()
    return coroutine


def _request_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[HttpRequest, object | None]:
    """The request, and the instance where the first argument is one (a method decorated as it is)."""
    for position, argument in enumerate(args[:2]):
        if isinstance(argument, HttpRequest):
            return argument, args[0] if position else None
        wrapped = getattr(argument, "_request", None)  # Django REST framework's Request
        if isinstance(wrapped, HttpRequest):
            return wrapped, args[0] if position else None
    named = kwargs.get("request")
    if isinstance(named, HttpRequest):
        return named, args[0] if args else None
    raise TypeError(
        "@concurrency_limit: the view was called without an HttpRequest as its first argument; on a method of a class use "
        "@method_decorator(concurrency_limit(...)) or decorate the method itself"
    )


def _wrapped(view: Callable[..., Any], call: Callable[..., Any], acall: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the view's own kind, marked for the middleware, that hands its arguments on as (args, kwargs)."""
    if iscoroutinefunction(view) or iscoroutinefunction(getattr(view, "__call__", None)):  # noqa: B004  # its kind is asked

        @wraps(view)
        async def awrapper(*args: Any, **kwargs: Any) -> Any:
            return await acall(args, kwargs)

        wrapper: Callable[..., Any] = awrapper
    else:

        @wraps(view)
        def swrapper(*args: Any, **kwargs: Any) -> Any:
            return call(args, kwargs)

        wrapper = swrapper
    setattr(wrapper, MARK, True)
    return wrapper


def _refuse_no_view(decorator: str, view: object, place: str) -> None:
    if isinstance(view, type):
        cure = f"on a class write @method_decorator({decorator}, name='dispatch')"
    elif not callable(view):
        cure = f"it decorates views, got {shown(view)}"
    else:
        return
    raise DecoratorUsageError([Problem(place, f"@{decorator}: {cure}")])


def _place() -> str:
    """Where the decorator was written: `file:line` of the nearest frame that is neither ours nor method_decorator's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "django.utils.decorators"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _url_kwargs(request: HttpRequest, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The URL's keywords: the same ones that the middleware sees."""
    return kwargs if request.resolver_match is None else request.resolver_match.kwargs


async def _awaited(answer: Any) -> Any:
    return await answer if isawaitable(answer) else answer


def concurrency_limit_exempt(view: V) -> V:
    """Leave the table's policies out for this view, but for those that say `overridable: false`.

    Raises: DecoratorUsageError for a class (there it takes `method_decorator`), or for no view at all.
    """
    _refuse_no_view("concurrency_limit_exempt", view, _place())
    return cast(
        "V",
        _wrapped(
            view, lambda args, kwargs: view(*args, **kwargs), lambda args, kwargs: _awaited(view(*args, **kwargs))
        ),
    )

"""Naming: the default name of a decorated view's semaphore, by the view's dotted path and the decorators on it.

Each call of `concurrency_limit` leaves an attribute of its own on the view: `wraps` merges them, where a single one would be
replaced.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

#: What each such attribute begins with.
MARK_EACH = "_concurrency_limit_by_"
#: Characters that no name has.
NOT_A_NAME = re.compile(r"[^A-Za-z0-9_.-]")


def path_of(view: Any) -> str:
    """Dotted path of a view function, of the class behind `as_view()`, or of a callable instance's class."""
    while isinstance(view, partial):
        view = view.func
    classes = (getattr(view, "view_class", None), getattr(view, "cls", None))
    view = next((cls for cls in classes if isinstance(cls, type)), view)
    if not hasattr(view, "__qualname__"):
        view = type(view)
    name = view.__qualname__
    if isinstance(view, type) and name.rpartition(".")[2] != view.__name__:
        name = view.__name__  # Django REST framework's api_view: all its classes have one __qualname__
    return f"{view.__module__}.{name}"


def numbered(path: str, number: int) -> str:
    """The name of a view's decorator with this number, counted outwards from 1."""
    name = NOT_A_NAME.sub("_", path)
    return name if number == 1 else f"{name}-{number}"


def instance_of(view: Any) -> object | None:
    """The instance that a method is bound to, through partials and wrappers (as method_decorator makes them)."""
    while view is not None:
        bound = getattr(view.func if isinstance(view, partial) else view, "__self__", None)
        if bound is not None:
            return bound  # type: ignore[no-any-return]  # whatever it is
        view = getattr(view, "__wrapped__", None)
    return None


def marks(view: Any) -> dict[str, Any]:
    """The marks of the calls of `concurrency_limit` on this view, and on what it wraps as far as one can see."""
    found: dict[str, Any] = {}
    while view is not None:
        found |= _own_marks(view)
        view = _wrapped_by(view)
    return found


def outermost_first(view: Any) -> dict[str, Any]:
    """Mark -> what the decorator left there, the outermost one first, as far as one can see."""
    levels: list[dict[str, Any]] = []
    while view is not None:
        levels.append(_own_marks(view))
        view = _wrapped_by(view)
    found: dict[str, Any] = {}
    for depth, level in enumerate(levels):
        deeper = set().union(*levels[depth + 1 :])
        # method_decorator puts the marks of a list on one function, the innermost first.
        found |= {mark: level[mark] for mark in reversed(level) if mark not in deeper and mark not in found}
    return found


def _own_marks(view: Any) -> dict[str, Any]:
    return {name: guard for name, guard in getattr(view, "__dict__", {}).items() if name.startswith(MARK_EACH)}


def _wrapped_by(view: Any) -> Any:
    return view.func if isinstance(view, partial) else getattr(view, "__wrapped__", None)


def further_in(cls: type, method: str, mark: str) -> int:
    """How many other decorators stand on the same method of base classes, where `super()` gets to after this one."""
    bases = iter(cls.__mro__)
    own = next((found for base in bases if mark in (found := marks(vars(base).get(method)))), {})
    return len(set().union(*(marks(vars(base).get(method)) for base in bases)) - own.keys())

"""What the tests of the system checks share: decorators of this test only, and what the checks find."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
from django.core.checks import CheckMessage, run_checks
from django.http import HttpRequest, HttpResponse

from django_concurrency_mw import concurrency_limit, decorated
from django_concurrency_mw.decorators import limits as all_limits

Decorate = Callable[..., Any]

#: Where messages say that a decorator of `decorate` stands.
HERE = __file__
#: A store that no check has anything to say of, with `--deploy` either. A check makes no file of it.
ON_HOST = {"default": {"BACKEND": "host", "KEY_PREFIX": "test-checks"}}


def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse()


@pytest.fixture(autouse=True)
def decorate(monkeypatch: pytest.MonkeyPatch) -> Decorate:
    """Decorate a view; the checks see the decorators of this test only."""
    mine: weakref.WeakSet[Any] = weakref.WeakSet()
    monkeypatch.setattr(decorated, "limits", mine)
    monkeypatch.setattr(decorated, "_import_urls", lambda: None)

    def apply(**fields: Any) -> Any:
        before = set(all_limits)
        decorated = concurrency_limit(**fields)(view)
        for made in set(all_limits) - before:
            mine.add(made)
        return decorated

    return apply


def found(deploy: bool = False) -> list[CheckMessage]:
    messages: list[CheckMessage] = run_checks(tags=["concurrency"], include_deployment_checks=deploy)
    assert all(message.hint for message in messages)
    return sorted(messages, key=str)


def ids(deploy: bool = False) -> list[str]:
    return [str(message.id).removeprefix("django_concurrency_mw.") for message in found(deploy)]

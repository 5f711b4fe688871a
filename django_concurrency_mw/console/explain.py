"""Explain: what would become of one request, policy by policy. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, ObjectDoesNotExist, ValidationError
from django.core.management.base import CommandError, CommandParser
from django.http import HttpRequest
from django.test import RequestFactory
from django.urls import Resolver404, resolve
from django.utils import translation
from django.utils.functional import SimpleLazyObject

from .. import pace
from ..chain import AUTHENTICATION, SESSION, has
from ..explaining import Explanation, Finding, explain
from ..outcomes import Rejection
from ..steps import RETRY_AFTER
from .config import configuration
from .output import Output, near

HELP = (
    "which policies a request would meet and why, with keys, limits and counts as they are now, and what would be answered; "
    "the site's own middleware is not run; exit code 1 if it would be rejected now, 0 if it would be let in or wait in line"
)


def add_arguments(parser: CommandParser) -> None:
    """The request, as far as policies can ask for it."""
    parser.add_argument("path", help="such as /reports/3/export/?page=2")
    parser.add_argument("--method", default="GET", type=str.upper, help="GET")
    parser.add_argument("--user", metavar="PK", help="who is logged in, by primary key")
    parser.add_argument("--session", metavar="KEY", help="the session's key, as its cookie has it")
    parser.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="any number of times")
    parser.add_argument("--ip", default="127.0.0.1", help="the peer's address, as the server sees it: 127.0.0.1")


def run(options: Mapping[str, Any], out: Output) -> int:
    """Exit code 0: it would be let in, at once or in its turn."""
    config = configuration()
    path = options["path"]
    with translation.override(translation.get_language_from_path(path) or translation.get_language()):
        request = _request(options)
        try:
            found = explain(request, config)
        except (ImproperlyConfigured, NotImplementedError) as error:
            raise CommandError(str(error)) from error
    notes = list(found.notes)
    if options["user"] is not None and not has(AUTHENTICATION):
        notes.append(
            "AuthenticationMiddleware is not in MIDDLEWARE: a request has a user only where another middleware sets one"
        )
    if out.json:
        out.document(_as_data(found, request, notes))
    else:
        _tell(found, request, notes, out)
    return 0 if found.rejection is None else 1


def _request(options: Mapping[str, Any]) -> HttpRequest:
    headers: dict[str, str] = {"Host": _host()}
    for line in options["header"]:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise CommandError(f"--header {line!r}: expected 'NAME: VALUE'")
        headers[name.strip()] = value.strip()
    path = options["path"]
    if not path.startswith("/"):
        raise CommandError(f"{path!r}: expected a path that begins with /")
    request = RequestFactory().generic(options["method"], path, headers=headers, REMOTE_ADDR=options["ip"])
    try:
        request.resolver_match = resolve(request.path_info)
    except Resolver404:
        raise CommandError(
            f"{request.path_info}: no URL pattern matches, so the answer is a 404 and no policy is asked"
        ) from None
    _log_in(request, options)
    return request


def _host() -> str:
    """A host that ALLOWED_HOSTS lets pass."""
    return next((host.lstrip(".") for host in settings.ALLOWED_HOSTS if "*" not in host), "localhost")


def _log_in(request: HttpRequest, options: Mapping[str, Any]) -> None:
    """The session and the user that the site's own middleware would have put there."""
    from django.apps import apps

    key, user = options["session"], options["user"]
    if key is not None or has(SESSION):
        request.session = _unchanging(import_module(settings.SESSION_ENGINE).SessionStore)(key)
    if not apps.is_installed("django.contrib.auth"):
        if user is not None:
            raise CommandError("--user: django.contrib.auth is not in INSTALLED_APPS")
        return
    from django.contrib.auth import get_user, get_user_model
    from django.contrib.auth.models import AnonymousUser

    if user is None:
        lazy: Any = SimpleLazyObject(lambda: get_user(request))
        request.user = lazy if key is not None else AnonymousUser()
        return
    users = get_user_model()
    try:
        request.user = users._default_manager.get(pk=user)
    except (ObjectDoesNotExist, ValueError, ValidationError):
        raise CommandError(f"--user {user}: there is no such user") from None


def _unchanging(store: type[Any]) -> type[Any]:
    """A session that is only read: to find out who is logged in, Django may give it a new key, or end it."""

    def nothing(self: Any, *arguments: Any, **keywords: Any) -> None:
        """Nobody else is to notice."""

    return type(store.__name__, (store,), dict.fromkeys(("save", "create", "delete", "cycle_key", "flush"), nothing))


def _answer(found: Explanation) -> str:
    if found.rejection is None:
        lines = [f"{one.policy.name}, place {one.place}" for one in found.findings if one.place is not None]
        if not lines:
            return "it would be let in"
        return f"it would wait in line ({'; '.join(lines)}) for at most {found.waits:g} s, and be let in when it is its turn"
    refusal = found.rejection
    if refusal.retry_after is None:
        wait = "no Retry-After, as waiting does not help"
    elif refusal.reason == "queue_full":
        wait = "Retry-After by the pace of the line"
    else:
        wait = "Retry-After of 1 to 5 seconds"
    first = next(finding.policy for finding in found.findings if finding.policy.name == refusal.policy)
    by = f", answered by {first.response_callback}" if first.response_callback is not None else ""
    return f"{refusal.status} {refusal.reason} ({', '.join(refusal.violated)}), {wait}{by}"


def _tell(found: Explanation, request: HttpRequest, notes: Sequence[str], out: Output) -> None:
    out.line(f"{request.method} {request.path} is {found.view_name}")
    applied = [one for one in found.findings if not one.why_not]
    if applied:
        lines = any(one.waiting or one.policy.wait for one in applied)
        out.table(
            [
                *("policy", "taken by", "key", ">in flight", ">limit", *((">waiting",) if lines else ()), ">cost"),
                *("outcome", "=written in"),
            ],
            [
                [
                    one.policy.name,
                    one.taken_by,
                    one.key or "",
                    _number(one.in_flight),
                    _limit(one),
                    *((str(one.waiting),) if lines else ()),
                    str(one.cost),
                    _outcome(one, found),
                    near(one.policy.place),
                ]
                for one in applied
            ],
        )
    else:
        out.line("No policy applies.")
    others = [one for one in found.findings if one.why_not]
    if others:
        out.table(
            ["does not apply", "because of", "=written in"],
            [[one.policy.name, one.why_not, near(one.policy.place)] for one in others],
        )
    for note in notes:
        out.note(note)
    style = "red" if found.rejection is not None else "yellow" if found.waits else "green"
    out.line(f"Now: {_answer(found)}.", style)


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _limit(one: Finding) -> str:
    return "none" if one.limit is None and one.key is not None else _number(one.limit)


def _outcome(one: Finding, found: Explanation) -> str:
    refusal = found.rejection
    if refusal is not None and one.policy.name in refusal.violated:
        return f"rejects: {refusal.reason}"
    if one.place is not None:
        return f"waits, place {one.place}"
    return _OUTCOMES.get(one.state or "", "not asked") if refusal is None else "not taken"


_OUTCOMES = {
    "held": "a slot",
    "over": "over capacity, let in (block: false)",
    "local": "counted by the process, as the store fails",
    "unprotected": "let in uncounted, as the store fails",
    "skipped": "not asked",
}


def _retry_after(refusal: Rejection) -> list[int] | None:
    """From, to: seconds."""
    if refusal.retry_after is None:
        return None
    return [1, pace.LONGEST] if refusal.reason == "queue_full" else list(RETRY_AFTER)


def _as_data(found: Explanation, request: HttpRequest, notes: Sequence[str]) -> dict[str, Any]:
    refusal = found.rejection
    return {
        "method": request.method,
        "path": request.path,
        "view_name": found.view_name,
        "admitted": refusal is None,
        "waits": found.waits,
        "rejection": None
        if refusal is None
        else {
            "status": refusal.status,
            "reason": refusal.reason,
            "policy": refusal.policy,
            "violated": list(refusal.violated),
            "retry_after": _retry_after(refusal),
        },
        "policies": [
            {
                "policy": one.policy.name,
                "place": one.policy.place,
                "taken_by": one.taken_by,
                "applies": not one.why_not,
                "why_not": one.why_not or None,
                "key": one.key,
                "in_flight": one.in_flight,
                "limit": one.limit,
                "waiting": one.waiting,
                "place_in_line": one.place,
                "cost": one.cost,
                "state": one.state,
            }
            for one in found.findings
        ],
        "notes": list(notes),
    }

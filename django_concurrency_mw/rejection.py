"""The answer that turns a request away: status, header fields, and a body in the client's preferred type.

Sources: RFC 6585 (429), RFC 9110 (Retry-After), RFC 9457 (problem+json), RFC 9651 (structured fields), and the IETF drafts
draft-ietf-httpapi-ratelimit-headers (RateLimit, RateLimit-Policy, the problem types, the quota unit concurrent-requests).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.template import Context, Engine, TemplateDoesNotExist
from django.template.loader import get_template
from django.template.response import TemplateResponse
from django.utils.cache import patch_vary_headers
from django.utils.translation import get_language, get_language_bidi
from django.utils.translation import gettext as _

from . import afresh
from .effects import Ask, Steps
from .keys import callable_of, masked
from .outcomes import LimitField, Rejection, Verdict

if TYPE_CHECKING:
    from django.http import HttpRequest

    from .policies import Policy

logger = logging.getLogger("django_concurrency_mw")

Headers = Literal["rejected", "always", "never"]

PROBLEM = "application/problem+json"
JSON = "application/json"
HTML = "text/html"
TEXT = "text/plain"
#: In order of preference: `*/*` gets the first.
MEDIA_TYPES = (PROBLEM, JSON, HTML, TEXT)

#: Characters of an Accept header that are looked at: no client has that much to say, and to be refused has to be cheap.
LONGEST_ACCEPT = 4096

_TYPE = "https://iana.org/assignments/http-problem-types#"
PROBLEM_TYPES = {429: f"{_TYPE}quota-exceeded", 503: f"{_TYPE}temporary-reduced-capacity"}

#: Accept headers whose reading is remembered, and characters of each.
MOST_KNOWN, LONGEST_KNOWN = 256, 256

#: Seconds of one policy's rejections that go into one line of the log.
LOG_EVERY = 10.0


def respond(
    request: HttpRequest, verdict: Verdict, fields: Sequence[LimitField], headers: Headers
) -> Steps[HttpResponseBase]:
    """The response to a rejected request; the policy's `response_callback` is asked first."""
    policy, rejection = verdict.rejected_by, verdict.concurrency.rejection
    assert policy is not None
    assert rejection is not None
    response: HttpResponseBase | None = None
    if policy.response_callback is not None:
        response = yield from _callback(request, policy)
    if response is None:
        response = _built_in(request, rejection)
    if rejection.retry_after is not None:
        response.headers.setdefault("Retry-After", str(rejection.retry_after))
    response.headers.setdefault("Cache-Control", "no-store")
    if headers != "never":
        add_fields(response, fields)
    # Django would log it to django.request: one line per rejection, and for a 503 a mail to ADMINS each.
    response._has_been_logged = True  # type: ignore[attr-defined]  # Django's own mark
    return response


def add_fields(response: HttpResponseBase, fields: Sequence[LimitField]) -> None:
    """Add RateLimit-Policy and RateLimit (RFC 9651 lists), but not to a redirect, nor over fields that are there."""
    if not fields or 300 <= response.status_code < 400:
        return
    response.headers.setdefault(
        "RateLimit-Policy", ", ".join(f'"{name}";q={limit};qu="concurrent-requests"' for name, limit, _left in fields)
    )
    response.headers.setdefault("RateLimit", ", ".join(f'"{name}";r={left}' for name, _limit, left in fields))


def add_fields_where_private(request: HttpRequest, response: HttpResponseBase, fields: Sequence[LimitField]) -> None:
    """Add the fields to an admitted request's answer, unless a cache may replay it to somebody else."""
    caching = response.headers.get("Cache-Control", "").lower()
    if "private" not in caching and "no-store" not in caching:
        stored = getattr(request, "_cache_update_cache", False)  # Django's cache middleware will keep it
        explicit = any(word in caching for word in ("max-age", "s-maxage", "public"))
        # Last-Modified alone lets a shared cache guess (RFC 9111, 4.2.2).
        if stored or explicit or "Expires" in response.headers or "Last-Modified" in response.headers:
            return
    add_fields(response, fields)


def _callback(request: HttpRequest, policy: Policy) -> Steps[HttpResponseBase | None]:
    """What the project's callback answers; None where it fails."""
    assert policy.response_callback is not None
    try:
        response = yield from Ask[Any](callable_of(policy.response_callback), (request,))
        if isinstance(response, HttpResponseBase):
            return response
        raise TypeError(f"it returned {type(response).__name__}, not an HttpResponse")
    except Exception:
        count = _sampled.count(policy.name, "response_callback")
        if count:
            logger.exception(
                "policy %s: response_callback failed (%d times), the built-in rejection is sent instead",
                policy.name,
                count,
            )
    return None


def _built_in(request: HttpRequest, rejection: Rejection) -> HttpResponseBase:
    media_type = _preferred(request)
    title, detail = texts(rejection)
    response: HttpResponseBase
    if media_type == HTML:
        response = _page(request, rejection, title, detail)
    elif media_type == TEXT:
        response = HttpResponse(f"{title}\n{detail}\n", content_type="text/plain; charset=utf-8")
    else:
        body = _json(rejection.status, title, detail, rejection.reason, rejection.violated)
        response = HttpResponse(body, content_type=media_type)
    response.status_code = rejection.status
    if "Vary" in response.headers:
        patch_vary_headers(response, ["Accept"])
    else:
        response.headers["Vary"] = "Accept"
    return response


@lru_cache(maxsize=256)
def _json(status: int, title: str, detail: str, reason: str, violated: tuple[str, ...]) -> bytes:
    """There are not many. JSON is UTF-8 whatever DEFAULT_CHARSET says."""
    body = {
        "type": PROBLEM_TYPES[status],
        "title": title,
        "status": status,
        "detail": detail,
        "reason": reason,
        "violated-policies": list(violated),
    }
    return json.dumps(body, ensure_ascii=False).encode()


def _preferred(request: HttpRequest) -> str:
    """Which of ours the client would rather have; the first where it says nothing of use."""
    accept = request.META.get("HTTP_ACCEPT", "*/*")
    known = _preferences.get(accept)
    if known is not None:
        return known
    if len(accept) > LONGEST_ACCEPT:
        return PROBLEM
    try:
        preferred = request.get_preferred_type(MEDIA_TYPES) or PROBLEM
    except (LookupError, ValueError):  # a parameter in a charset that does not exist, or that cannot be decoded
        preferred = PROBLEM
    if len(accept) <= LONGEST_KNOWN:
        if len(_preferences) >= MOST_KNOWN:
            _preferences.clear()
        _preferences[accept] = preferred
    return preferred


#: By what clients say; browsers and libraries have few words for it.
_preferences: dict[str, str] = {}


def texts(rejection: Rejection) -> tuple[str, str]:
    """Title and detail in the active language."""
    if rejection.reason == "backend_unavailable":
        return _("Service temporarily unavailable"), _(
            "This request cannot be admitted just now. Please try again soon."
        )
    if rejection.reason == "key_missing":
        return _("Too many requests"), _(
            "This request lacks what is needed to tell whose it is, so it is not admitted."
        )
    if rejection.reason == "cost_above_limit":
        return _("Too many requests"), _(
            "This request asks for more than may be in use at once, so it is not admitted."
        )
    if rejection.retry_after is None:
        return _("Too many requests"), _("No request of this kind is admitted at present.")
    return (
        _("Too many requests at the same time"),
        _("As many of your requests as are allowed at once are in progress. Please wait for one of them to finish."),
    )


def _page(request: HttpRequest, rejection: Rejection, title: str, detail: str) -> HttpResponseBase:
    """The project's own page, else ours."""
    context = {"title": title, "detail": detail, "rejection": rejection, "retry_after": rejection.retry_after}
    name = f"{rejection.status}.html"
    try:
        template = get_template(name)
    except TemplateDoesNotExist:
        page = _engine().get_template("django_concurrency_mw/rejected.html")
        context |= {"language": get_language() or "en", "right_to_left": get_language_bidi()}
        return HttpResponse(page.render(Context(context)), content_type="text/html; charset=utf-8")
    return TemplateResponse(request, template, context)


_engines: list[Engine] = []


def _engine() -> Engine:
    """Our own page needs nothing of the project's template settings."""
    if not _engines:
        _engines.append(Engine(dirs=[str(Path(__file__).parent / "templates")]))
    return _engines[0]


class _Sampled:
    """One line per policy and reason at most every LOG_EVERY seconds, with the number that it stands for."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """In a forked child: a thread that is not in it may have held the lock."""
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def count(self, policy: str, reason: str) -> int:
        """The number of rejections to report now, 0 where none is due."""
        now = monotonic()
        with self._lock:
            last, waiting = self._seen.get((policy, reason), (-LOG_EVERY, 0))
            if now - last < LOG_EVERY:
                self._seen[(policy, reason)] = (last, waiting + 1)
                return 0
            self._seen[(policy, reason)] = (now, 0)
            return waiting + 1


_sampled = _Sampled()
afresh.begin_with(_sampled.forget)


def log(policy: Policy, key: str, reason: str) -> None:
    """Tell the log of a rejection (sampled), or of one that would have been under a shadow policy."""
    count = _sampled.count(policy.name, reason)
    if count:
        logger.warning(
            "policy %s%s: %d rejected (%s), the last one for key %s",
            policy.name,
            "" if policy.block else " (shadow, so none in fact)",
            count,
            reason,
            masked(key),
        )

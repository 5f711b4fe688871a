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

from django.core.signals import setting_changed
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.template import Context, Engine, TemplateDoesNotExist
from django.template.loader import get_template
from django.template.response import TemplateResponse
from django.utils.autoreload import file_changed
from django.utils.cache import patch_vary_headers
from django.utils.translation import get_language, get_language_bidi
from django.utils.translation import gettext as _

from . import afresh
from .effects import Ask, Steps
from .keys import callable_of, masked
from .outcomes import LimitField, Reason, Rejection, Verdict

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

#: Answers that are kept ready: each policy has a few, by the seconds to come back in.
MOST_READY = 512

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
        return answer(request, rejection, fields, headers)
    return _completed(response, rejection.retry_after, fields, headers)


def answer(
    request: HttpRequest, rejection: Rejection, fields: Sequence[LimitField], headers: Headers
) -> HttpResponseBase:
    """Our own response to a rejected request."""
    media_type = _preferred(request)
    if media_type == HTML:
        page = _page(request, rejection, *texts(rejection))
        page.status_code = rejection.status
        return _completed(_varied(page), rejection.retry_after, fields, headers)
    told = (rejection.status, rejection.reason, rejection.retry_after, rejection.violated)
    body, content_type, known = _ready(media_type, get_language(), *told, tuple(fields), headers)
    response = HttpResponse(body, content_type=content_type, status=rejection.status)
    _put(response, known)
    response._has_been_logged = True  # type: ignore[attr-defined]  # see _completed
    return response


def _completed(
    response: HttpResponseBase, retry_after: int | None, fields: Sequence[LimitField], headers: Headers
) -> HttpResponseBase:
    """The same, with what every answer to a rejected request says, where it does not say it already."""
    if retry_after is not None:
        response.headers.setdefault("Retry-After", str(retry_after))
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


#: Header fields as Django keeps them, by their names in lower case.
_Store = dict[str, tuple[str, str]]


@lru_cache(maxsize=MOST_READY)
def _ready(
    media_type: str,
    language: str | None,
    status: int,
    reason: Reason,
    retry_after: int | None,
    violated: tuple[str, ...],
    fields: tuple[LimitField, ...],
    headers: Headers,
) -> tuple[bytes, str, _Store]:
    """Body, content type and all header fields of a text or a JSON, in `language`, which is the active one. There are few of
    them, and to make one takes longer than to decide that a request is rejected."""
    title, detail = _texts(reason, retry_after)
    response: HttpResponse
    if media_type == TEXT:
        response = HttpResponse(f"{title}\n{detail}\n", content_type="text/plain; charset=utf-8")
    else:
        body = {
            "type": PROBLEM_TYPES[status],
            "title": title,
            "status": status,
            "detail": detail,
            "reason": reason,
            "violated-policies": list(violated),
        }
        # JSON is UTF-8 whatever DEFAULT_CHARSET says.
        response = HttpResponse(json.dumps(body, ensure_ascii=False).encode(), content_type=media_type)
    response.status_code = status  # of a redirect the fields would be others
    _completed(_varied(response), retry_after, fields, headers)
    store = {name.lower(): (name, value) for name, value in response.headers.items()}
    return response.content, response.headers["Content-Type"], store


def _forget_texts(**_named: object) -> None:
    """Settings are other ones, or files of translations."""
    _ready.cache_clear()


setting_changed.connect(_forget_texts)
file_changed.connect(_forget_texts)


def _put(response: HttpResponse, known: _Store) -> None:
    """These fields have been in a response before, so they are as Django wants them. To set them one by one takes longer than
    all the rest of the answer."""
    store = getattr(response.headers, "_store", None)  # not Django's public word, so it may be gone some day
    if type(store) is dict:
        store.update(known)
        return
    for name, value in known.values():
        response.headers[name] = value


def _varied(response: HttpResponseBase) -> HttpResponseBase:
    """Others get it in another media type."""
    if "Vary" in response.headers:
        patch_vary_headers(response, ["Accept"])
    else:
        response.headers["Vary"] = "Accept"
    return response


def _preferred(request: HttpRequest) -> str:
    """Which of ours the client would rather have; the first where it says nothing of use."""
    seen = request.__dict__
    headers = seen.get("headers")  # where they have been read, what is changed in META since changes nothing
    accept: str = request.META.get("HTTP_ACCEPT", "*/*") if headers is None else headers.get("Accept", "*/*")
    asked = "accepted_types" in seen  # the project may have put it there, as its own word for this request
    known = None if asked else _preferences.get(accept)
    if known is not None:
        return known
    if len(accept) > LONGEST_ACCEPT:
        return PROBLEM
    try:
        preferred = request.get_preferred_type(MEDIA_TYPES) or PROBLEM
    except (LookupError, ValueError):  # a parameter in a charset that does not exist, or that cannot be decoded
        preferred = PROBLEM
    if len(accept) <= LONGEST_KNOWN and not asked:
        if len(_preferences) >= MOST_KNOWN:
            _preferences.clear()
        _preferences[accept] = preferred
    return preferred


#: By what clients say; browsers and libraries have few words for it.
_preferences: dict[str, str] = {}


def texts(rejection: Rejection) -> tuple[str, str]:
    """Title and detail in the active language."""
    return _texts(rejection.reason, rejection.retry_after)


def _texts(reason: Reason, retry_after: int | None) -> tuple[str, str]:
    if reason == "backend_unavailable":
        return _("Service temporarily unavailable"), _(
            "This request cannot be admitted just now. Please try again soon."
        )
    if reason == "key_missing":
        return _("Too many requests"), _(
            "This request lacks what is needed to tell whose it is, so it is not admitted."
        )
    if reason == "cost_above_limit":
        return _("Too many requests"), _(
            "This request asks for more than may be in use at once, so it is not admitted."
        )
    if retry_after is None:
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
        #: An RLock: a garbage collection inside may end a stream, whose own code may be rejected.
        self._lock = threading.RLock()
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

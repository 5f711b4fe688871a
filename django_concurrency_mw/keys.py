"""Request to key: renders what a policy's `key` says, and finds out which policies apply at all.

A generator of effects, so that threads and event loops come to the same key: a user is loaded, a callable asked and a
related row read by whichever driver runs it. Nothing here touches the user or the session unless a policy needs it.

Equal texts share a semaphore, so a text must not be something that a stranger can also bring about: in a template with
several placeholders the characters of its own literal text are percent-encoded inside the values.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID
from weakref import WeakKeyDictionary

from asgiref.sync import iscoroutinefunction
from django.core.exceptions import (
    DisallowedHost,
    ImproperlyConfigured,
    ObjectDoesNotExist,
    SuspiciousOperation,
)
from django.http.request import split_domain_port
from django.utils.module_loading import import_string

from .client import Address, TrustedProxies, bucket, client_address
from .effects import Ask, Effect, LoadUser, Steps
from .fields import FieldError, check_cost, check_limit
from .keyspec import KeySpec, Part
from .outcomes import Asked, Key, KeyMissing

if TYPE_CHECKING:
    from django.http import HttpRequest

    from .client import Network
    from .policies import Policy

logger = logging.getLogger("django_concurrency_mw")

#: Characters of a key's text that are kept; the digest is always that of the whole.
TEXT_LIMIT = 512
#: Where two placeholders touch: what parts their values in the text.
UNIT_SEPARATOR = "\x1f"

Asking = list[Asked | KeyMissing]
N = TypeVar("N")


class _Missing(Exception):
    """A part of the key has no value in this request."""


class _NotApplicable(Exception):
    """The project's callable said None: the policy is not about this request."""


class Resolver:
    """Resolves the policies of one request: remembers whether the user has been loaded and what the address is."""

    __slots__ = ("_address", "_header", "_kwargs", "_loaded", "_looked", "_nobody", "_request", "_trusted")

    def __init__(self, request: HttpRequest, kwargs: Mapping[str, Any], trusted: TrustedProxies, header: str) -> None:
        self._request, self._kwargs, self._trusted, self._header = request, kwargs, trusted, header
        self._loaded = self._looked = self._nobody = False
        self._address: Address | None = None

    def resolve(self, policies: Sequence[Policy]) -> Steps[Asking]:
        """The policies that apply, each with its key or with the news that it has none, in table order.

        Raises whatever a callable of the project raises; TypeError for a key callable that returns neither text nor None.
        """
        asking: Asking = []
        for policy in policies:
            if policy.except_ips and self._comes_from(policy.except_ips):
                self.leave_out(policy, "except_ips")
                continue
            if policy.when is not None and not (yield from self._applies(policy.when)):
                self.leave_out(policy, "when")
                continue
            if policy.except_users and (yield from self._is_one_of(policy.except_users)):
                self.leave_out(policy, "except_users")
                continue
            try:
                key = yield from self._key(policy)
            except _NotApplicable:
                self.leave_out(policy, "key")
                continue
            if isinstance(key, Key):
                limit, cost = policy.max_concurrent, policy.cost
                if policy.per_key and key.digest in limits_of(policy):
                    limit = limits_of(policy)[key.digest]
                elif not (limit is None or isinstance(limit, int)):
                    limit = yield from self._number(policy, "max_concurrent", limit, check_limit)
                if not isinstance(cost, int):
                    cost = yield from self._number(policy, "cost", cost, check_cost)
                asking.append(Asked(policy, key, limit, cost))
            else:
                asking.append(key)
        return asking

    def leave_out(self, policy: Policy, field: str) -> None:
        """The policy does not apply, by its own field of this name. For those who have to explain it."""

    def _comes_from(self, networks: Sequence[Network]) -> bool:
        address = self._client_address()
        return address is not None and any(address in network for network in networks)

    def _is_one_of(self, users: Sequence[int | str]) -> Generator[Effect[Any], Any, bool]:
        pk = yield from self._pk()
        return pk is not None and str(pk) in map(str, users)

    def _pk(self) -> Generator[Effect[Any], Any, Any]:
        """Of who is logged in; None for anybody else."""
        yield from self._load_user()
        user = self._user()
        return getattr(user, "pk", None) if user is not None and user.is_authenticated else None

    def _number(
        self, policy: Policy, field: str, function: str | Callable[..., Any], check: Callable[[object], N]
    ) -> Generator[Effect[Any], Any, N]:
        """What a callable says of this request's limit or cost. Raises: TypeError where that cannot be one."""
        answer = yield from Ask[Any](callable_of(function), (self._request,))
        try:
            return check(answer)
        except FieldError as error:
            raise TypeError(f"policy {policy.name}: the {field} callable {function!r}: {error}") from error

    def _applies(self, when: str | Callable[..., Any]) -> Generator[Effect[Any], Any, bool]:
        test = _WHEN.get(when) if isinstance(when, str) else None
        if test is None:
            return bool((yield from Ask[Any](callable_of(when), (self._request,))))
        yield from self._load_user()
        return test(self._user())

    def _key(self, policy: Policy) -> Generator[Effect[Any], Any, Key | KeyMissing]:
        spec = policy.key
        if spec.kind == "ip":
            return self._by_address(policy, "ip:", "ip")
        if spec.kind == "user":
            pk = yield from self._pk()
            return self._by_address(policy, "ip:", "user") if pk is None else make_key(f"user:{pk}")
        try:
            if spec.kind == "global":
                return make_key("global")
            if spec.kind == "callable":
                assert spec.function is not None
                return make_key(_own_text((yield from self._ask_key(callable_of(spec.function)))))
            values = yield from self._values(spec)
        except _Missing:
            if policy.missing == "ip":
                return self._by_address(policy, "missing:ip:", spec.text)
            if spec.needs_ip and self._client_address() is None:
                _warn_no_address(policy.name)
            return KeyMissing(policy, spec.text, policy.missing == "reject")
        if spec.kind == "template":
            return template_key(spec, values)
        return make_key(f"{spec.text}:{values[0]}")

    def _by_address(self, policy: Policy, prefix: str, text: str) -> Key | KeyMissing:
        address = self._client_address()
        if address is None:
            _warn_no_address(policy.name)
            return KeyMissing(policy, text, policy.missing == "reject")
        return make_key(f"{prefix}{bucket(address)}")

    def _client_address(self) -> Address | None:
        if not self._looked:
            self._address = client_address(self._request, self._trusted, self._header)
            self._looked = True
        return self._address

    def _load_user(self) -> Generator[Effect[Any], Any, None]:
        if self._loaded:
            return
        self._loaded = True
        try:
            yield from LoadUser(self._request)
        except Exception:
            # Some databases refuse a NUL byte, and a quoted cookie can bring one: that is no session, so it has no user.
            if not _has_nul(getattr(self._request, "session", None)):
                raise
            self._nobody = True

    def _user(self) -> Any:
        """The user, once loaded; None where there is none."""
        return None if self._nobody else getattr(self._request, "user", None)

    def _ask_key(self, function: Callable[..., Any]) -> Generator[Effect[Any], Any, str]:
        answer = yield from Ask[Any](function, (self._request,))
        if answer is None:
            raise _NotApplicable
        if not isinstance(answer, str):
            raise TypeError(
                f"the key callable {function!r} returned {type(answer).__name__}; it must return str, or None where "
                "the policy does not apply"
            )
        return answer

    def _values(self, spec: KeySpec) -> Generator[Effect[Any], Any, list[str]]:
        """The text of each placeholder. Raises: _Missing."""
        parts = [part for part in spec.parts if isinstance(part, Part)]
        if spec.kind == "session":
            parts = [Part("session", ())]
        if spec.needs_user:
            yield from self._load_user()
        if all(self._is_at_hand(part) for part in parts):
            return [self._value(part) for part in parts]
        # Reads rows, or runs a property of the project's: not on an event loop.
        found = yield from Ask["list[str] | None"](self._values_or_none, (parts,))
        if found is None:
            raise _Missing
        return found

    def _values_or_none(self, parts: Sequence[Part]) -> list[str] | None:
        # An exception would cross the driver as if it were the project's own.
        try:
            return [self._value(part) for part in parts]
        except _Missing:
            return None

    def _is_at_hand(self, part: Part) -> bool:
        """Can this part be read without I/O and without running code of the project?"""
        if part.root == "user":
            user = self._user()
            if user is None or not user.is_authenticated or not part.path:
                return True
            return len(part.path) == 1 and _is_loaded(user, part.path[0])
        if part.root == "session":
            session = getattr(self._request, "session", None)
            return session is None or not session.session_key or bool(vars(session).get("_session_cache"))
        return True

    def _value(self, part: Part) -> str:
        value = getattr(self, f"_{part.root}_value")(part)
        if value is None:
            raise _Missing
        return str(value)

    def _ip_value(self, part: Part) -> str | None:
        address = self._client_address()
        return None if address is None else bucket(address)

    def _user_value(self, part: Part) -> Any:
        user = self._user()
        if user is None or not user.is_authenticated:
            return None
        value: Any = user
        try:
            for name in part.path or ("pk",):
                value = getattr(value, name)
        except (AttributeError, ObjectDoesNotExist):
            return None
        if hasattr(value, "_meta") and hasattr(value, "pk"):
            return value.pk
        if callable(value):
            _warn_callable(".".join(part.path))
            return None
        return value

    def _session_value(self, part: Part) -> str | None:
        session = getattr(self._request, "session", None)
        if session is None or not known_session(session):
            return None
        value = session.get(part.path[0]) if part.path else session.session_key
        return None if value is None else digest_text(str(value))

    def _kwargs_value(self, part: Part) -> Any:
        return self._kwargs.get(part.path[0])

    def _get_value(self, part: Part) -> str | None:
        try:
            return self._request.GET.get(part.path[0])
        except (SuspiciousOperation, LookupError, ValueError):
            # Too many fields; or an encoding that somebody chose for this request cannot decode it.
            return None

    def _header_value(self, part: Part) -> str | None:
        value = self._request.META.get(part.meta)
        return digest_text(str(value)) if value else None

    def _method_value(self, part: Part) -> str | None:
        return self._request.method

    def _host_value(self, part: Part) -> str | None:
        """The domain: the port and a dot at its end are the client's own text, which ALLOWED_HOSTS lets pass."""
        try:
            return split_domain_port(self._request.get_host())[0] or None
        except (DisallowedHost, KeyError):
            return None


def template_key(spec: KeySpec, values: Sequence[str]) -> Key:
    """A template's key from the text of each placeholder."""
    return make_key(_own_text(_join(spec, values)))


def make_key(text: str) -> Key:
    """A key from its resolved text, of any length."""
    data = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(data, digest_size=16).digest()
    if len(text) > TEXT_LIMIT:
        text = f"{text[: TEXT_LIMIT - 33]}~{digest.hex()}"
    return Key(text, digest)


def limits_of(policy: Policy) -> Mapping[bytes, int | None]:
    """The limits of a policy's `per_key`, by the digest of the key that each is written for."""
    found = _per_key.get(policy)
    if found is None:
        found = {}
        for text, limit in (policy.per_key or {}).items():
            for spelling in (_with_digest(policy.key, text), text):  # as it is goes before: it may be another's digest
                found[make_key(spelling).digest] = limit
        _per_key[policy] = found
    return found


def written(policy: Policy, text: str) -> tuple[Key, ...]:
    """The keys that this text stands for: one, but two where a header's or session's raw value may be a digest already."""
    raw = _with_digest(policy.key, text)
    return tuple(make_key(one) for one in ((raw, text) if raw != text and _DIGEST.search(text) else (raw,)))


#: What `digest_text` makes.
_DIGEST = re.compile(r"[0-9a-f]{32}")
#: Compiled at first sight.
_per_key: WeakKeyDictionary[Policy, Mapping[bytes, int | None]] = WeakKeyDictionary()


def _with_digest(spec: KeySpec, text: str) -> str:
    """The text of a key that was written with the raw value of its one header or session; others as they are."""
    if spec.kind in ("session", "header"):
        before, after = f"{spec.text}:", ""
    elif spec.kind == "template" and sum(isinstance(part, Part) for part in spec.parts) == 1:
        place = next(place for place, part in enumerate(spec.parts) if isinstance(part, Part))
        part = spec.parts[place]
        if not isinstance(part, Part) or part.root not in ("session", "header"):
            return text
        before, after = "".join(map(str, spec.parts[:place])), "".join(map(str, spec.parts[place + 1 :]))
    else:
        return text
    if not (text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)):
        return text
    return f"{before}{digest_text(text[len(before) : len(text) - len(after)])}{after}"


def digest_text(value: str) -> str:
    """What stands for a session's or a header's value: 32 hex digits (BLAKE2b-128)."""
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def masked(text: str) -> str:
    """A key for logs: its first 2 characters (printable ones) and 8 hex digits of a digest."""
    start = "".join(character if character.isprintable() else "?" for character in text[:2])
    return f"{start}~{digest_text(text)[:8]}"


def known_session(session: Any) -> bool:
    """Does the store know this session? A session key by itself is the client's own text. Loads the session."""
    key = session.session_key
    if not key or _has_nul(session):
        return False
    content = session.keys()  # loads it, and forgets a key that the store does not have
    if session.session_key != key:
        return False
    # Not every store forgets (signed_cookies keep a key that they could not read), but what was read is then empty.
    return bool(content) or bool(session.exists(key))


def _has_nul(session: Any) -> bool:
    return "\x00" in (getattr(session, "session_key", None) or "")


@lru_cache(maxsize=256)
def _import(path: str) -> Callable[..., Any]:
    try:
        found = import_string(path)
    except Exception as error:  # its module is the project's code, and may fail in any way
        raise ImproperlyConfigured(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ImproperlyConfigured(f"{path!r} is not callable")
    return found  # type: ignore[no-any-return]  # import_string is untyped in what it finds


def callable_of(named: str | Callable[..., Any]) -> Callable[..., Any]:
    """The callable behind a dotted path. Raises: ImproperlyConfigured where it cannot be imported."""
    found = _import(named) if isinstance(named, str) else named
    # Of an instance only the method tells that it is async.
    method = getattr(found, "__call__", None)  # noqa: B004  # not a test for being callable
    return method if method is not None and not iscoroutinefunction(found) and iscoroutinefunction(method) else found


def _join(spec: KeySpec, values: Sequence[str]) -> str:
    """A template's text, such that other values cannot make the same one."""
    if len(values) == 1:
        return "".join(part if isinstance(part, str) else values[0] for part in spec.parts)
    literal = {character for part in spec.parts if isinstance(part, str) for character in part}
    pieces: list[str] = []
    rest = iter(values)
    touching = False
    for part in spec.parts:
        if isinstance(part, str):
            # Doubled, as one by itself would read as the start of an escape.
            pieces.append(part.replace("%", "%%"))
            touching = False
            continue
        value = next(rest)
        if part.root in _FREE_ROOTS:
            value = _escape(value, literal)
        pieces.append(UNIT_SEPARATOR + value if touching else value)
        touching = True
    return "".join(pieces)


def _escape(value: str, literal: set[str]) -> str:
    """The value with the literal's characters percent-encoded, byte by byte, so that one text has one reading."""
    special = literal | {"%", UNIT_SEPARATOR}
    if special.isdisjoint(value):
        return value
    return "".join(_percent(character) if character in special else character for character in value)


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


_LIKE_FALLBACK = re.compile(r"%((?:25)*6Dissing:)")


def _own_text(text: str) -> str:
    """Text of the project's own, kept apart from the fallback's; different texts stay different."""
    if text.startswith("missing:"):
        return f"%6D{text[1:]}"
    return f"%25{text[1:]}" if _LIKE_FALLBACK.match(text) else text


def _is_loaded(user: Any, name: str) -> bool:
    """Is this attribute plain data of the instance, so that reading it runs no code and no query?"""
    found = getattr(getattr(user, "_wrapped", user), "__dict__", {})
    return name == "pk" or (name in found and type(found[name]) in _PLAIN)


#: What is text at once. Other values may be lazy ones, which read their row when they are first looked at.
_PLAIN = frozenset({str, int, bool, float, Decimal, UUID, type(None)})

#: Roots whose text somebody chooses; those of the others cannot hold another part's text.
_FREE_ROOTS = frozenset({"user", "kwargs", "get", "host", "method"})

_WHEN: Mapping[str, Callable[[Any], bool]] = {
    "anonymous": lambda user: user is None or not user.is_authenticated,
    "authenticated": lambda user: user is not None and user.is_authenticated,
    "staff": lambda user: getattr(user, "is_active", False) and getattr(user, "is_staff", False),
    "superuser": lambda user: getattr(user, "is_active", False) and getattr(user, "is_superuser", False),
}


@lru_cache(maxsize=256)
def _warn_no_address(policy: str) -> None:
    logger.error(
        "policy %s: the request has no client address, so nobody is limited by it. Behind a unix socket put 'unix' (and "
        "the proxies) into CONCURRENCY_LIMIT['TRUSTED_PROXIES'] and let the proxy send CONCURRENCY_LIMIT"
        "['CLIENT_IP_HEADER']; or choose `missing: reject`, or a key that needs no address. (Said once per policy.)",
        policy,
    )


@lru_cache(maxsize=256)
def _warn_callable(path: str) -> None:
    logger.error("the key part {user.%s} is a method; templates call nothing: it counts as missing. (Said once.)", path)

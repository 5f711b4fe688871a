"""Plans: what is known of some policies before a request comes, so that no request has to find it out.

Most keys can be read off a request at once, without a query, a callable or an effect; and what a value there means for its
policy (its key, its limit) is the same each time, so it is remembered for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from django.utils.functional import LazyObject, empty

from .client import TrustedProxies, bucket, client_address
from .keys import digest_text, limits_of, make_key
from .outcomes import Asked, Key
from .steps import above_limit

if TYPE_CHECKING:
    from django.http import HttpRequest

    from .policies import Policy

#: What a request asks of a policy, alone; None where that cannot be read off it as it is.
Reader = Callable[["HttpRequest"], "tuple[Asked] | None"]
Known = dict[Any, "tuple[Asked]"]

#: Values that are remembered for each policy, and characters of each: what clients write takes no more memory than that.
MOST_KNOWN = 1024
LONGEST_KNOWN = 256

_attributes = object.__getattribute__


class Plan:
    """Some policies that are asked together, always in this order."""

    __slots__ = ("_readers", "asked", "backend", "tells", "waits")

    def __init__(
        self, policies: Sequence[Policy], trusted: TrustedProxies, header: str, *, tells: bool = False
    ) -> None:
        """`header` is the META key of the forwarding header; `tells`: see `Lease`."""
        self.tells = tells
        backends = {policy.backend for policy in policies}
        readers = [_reader(policy, trusted, header) for policy in policies]
        self._readers = tuple(filter(None, readers))
        #: The one that they all use, or the first of several.
        self.backend = policies[0].backend
        self.waits = any(policy.wait for policy in policies)
        #: What a request asks for. None: it takes more than a look at it to know that.
        self.asked: Callable[[HttpRequest], tuple[Asked, ...] | None] = self._all
        if None in readers or len(backends) > 1:
            self.asked = _cannot_tell
        elif len(readers) == 1:
            self.asked = self._readers[0]

    def _all(self, request: HttpRequest) -> tuple[Asked, ...] | None:
        asked: list[Asked] = []
        for read in self._readers:
            entry = read(request)
            if entry is None:
                return None
            asked += entry
        return tuple(asked)


def _cannot_tell(request: HttpRequest) -> None:
    return None


def _reader(policy: Policy, trusted: TrustedProxies, header: str) -> Reader | None:
    if policy.when is not None or policy.except_ips or policy.except_users or not isinstance(policy.cost, int):
        return None
    if not (policy.max_concurrent is None or isinstance(policy.max_concurrent, int)):
        return None
    if policy.key.kind == "global":
        always = _entry(policy, make_key("global"))
        return lambda request: always
    if policy.key.kind == "header":
        return _by_header(policy)
    by_address = _by_address(policy, trusted, header)
    return {"ip": by_address, "user": _by_user(policy, by_address)}.get(policy.key.kind)


def _entry(policy: Policy, key: Key) -> tuple[Asked] | None:
    """None where it asks for more than there is: what becomes of that is decided elsewhere."""
    limit: Any = policy.max_concurrent
    if policy.per_key:
        limit = limits_of(policy).get(key.digest, limit)
    assert isinstance(policy.cost, int)
    entry = Asked(policy, key, limit, policy.cost)
    return None if above_limit(entry) else (entry,)


def _by_header(policy: Policy) -> Reader:
    (part,) = policy.key.parts
    meta: str = part.meta  # type: ignore[union-attr]  # no literal, in a key of this kind
    known: Known = {}

    def read(request: HttpRequest) -> tuple[Asked] | None:
        value = request.META.get(meta)
        if type(value) is not str or not value:
            return None
        found = known.get(value)
        if found is None:
            found = _entry(policy, make_key(f"{policy.key.text}:{digest_text(value)}"))
            _remember(known, value, len(value), found)
        return found

    return read


def _by_address(policy: Policy, trusted: TrustedProxies, header: str) -> Reader:
    known: Known = {}
    alone = not trusted.networks and not trusted.unix  # nobody's word is taken, so the peer is the client

    def read(request: HttpRequest) -> tuple[Asked] | None:
        meta = request.META
        peer = meta.get("REMOTE_ADDR")
        value = peer if alone else (peer, meta.get(header))
        found = known.get(value)
        if found is None:
            address = client_address(request, trusted, header)
            if address is not None:
                found = _entry(policy, make_key(f"ip:{bucket(address)}"))
                _remember(known, value, len(peer or "") + len("" if alone else meta.get(header) or ""), found)
        return found

    return read


def _by_user(policy: Policy, by_address: Reader) -> Reader:
    known: Known = {}

    def read(request: HttpRequest) -> tuple[Asked] | None:
        user: Any = getattr(request, "user", None)
        if isinstance(user, LazyObject):  # through its own attributes it would be loaded here
            user = _attributes(user, "__dict__").get("_wrapped")
        if user is None or user is empty:
            return None
        if not user.is_authenticated:
            return by_address(request)
        pk = getattr(user, "pk", None)
        if type(pk) is not int and type(pk) is not str:  # others may be equal and read differently
            return None
        found = known.get(pk)
        if found is None:
            text = str(pk)
            found = _entry(policy, make_key(f"user:{text}"))
            _remember(known, pk, len(text), found)
        return found

    return read


def _remember(known: Known, value: object, length: int, entry: tuple[Asked] | None) -> None:
    if entry is not None and length <= LONGEST_KNOWN:
        if len(known) >= MOST_KNOWN:
            known.clear()
        known[value] = entry

"""Matching: from the path and the other words of a line to the slots that its request would have asked for.

Paths are resolved by Django's resolver, keys by our own; no view is called and no row is read. What a log does not have is
never made up: a policy that needs it is left out, with what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from django.http import HttpRequest, QueryDict

from ..client import TrustedProxies, parse_address
from ..effects import Ask, Steps
from ..keys import Resolver
from ..keyspec import Part
from ..limiter import MARK
from ..outcomes import Asked, KeyMissing
from ..policies import STANDARD_METHODS, Policy, PolicyTable
from .formats import canonical
from .paths import resolving
from .quick_keys import asked_for, quick_key
from .slots import Slots

#: Paths, and keys of one policy, that are remembered.
REMEMBERED: Final = 150_000
#: Characters of them: clients write longer ones as they like, and those are looked up each time.
LONGEST: Final = 200
_NOBODY_TRUSTED = TrustedProxies()

#: Instead of a slot: the policy does not apply. What is below stands for a policy that turns away who has no key.
NONE: Final = -1
#: In what is remembered: look again, with the address.
_BY_ADDRESS: Final = -(2**40)


def refused(policy: int) -> int:
    """Instead of a slot: this policy turns the request away, as its key is missing. It is its own inverse."""
    return -2 - policy


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A policy that cannot be replayed, and what it needs that no log has, or this log has not."""

    policy: str
    missing: tuple[str, ...]


#: What a policy's key is made of: nothing, the address, the path, or several things.
_CONSTANT, _BY_IP, _BY_PATH, _GENERAL = range(4)


class _Keyed:
    """A policy with what its key is made of, and the keys that were met."""

    __slots__ = (
        "falls_back",
        "index",
        "kind",
        "known",
        "of_address",
        "of_method",
        "of_path",
        "of_query",
        "policy",
        "quick",
        "used",
    )

    def __init__(self, index: int, policy: Policy, needs: frozenset[str], further: Sequence[str]) -> None:
        self.index, self.policy, self.quick = index, policy, quick_key(policy)
        roots = {part.root for part in policy.key.parts if isinstance(part, Part)} | {policy.key.kind}
        self.of_path, self.of_query, self.of_method = "kwargs" in roots, "get" in roots, "method" in roots
        self.used = [number for number, name in enumerate(further) if name in needs]
        #: Always, or only where the key has no value of its own.
        self.of_address = "ip" in roots or bool(policy.except_ips)
        self.falls_back = "ip" in needs and not self.of_address
        further_ones = self.of_query or self.of_method or bool(self.used)
        if further_ones or (self.of_path and self.of_address):
            self.kind = _GENERAL
        else:
            self.kind = _BY_PATH if self.of_path else _BY_IP if self.of_address else _CONSTANT
        self.known: dict[Any, int] = {}


#: What is looked at for each policy of a view: the keys that were met are found without asking for them.
Plan = tuple[tuple[_Keyed, dict[Any, int], int], ...]


@dataclass(frozen=True, slots=True)
class _Route:
    """Where paths lead, and the plans by method; shared by all paths of a view."""

    plans: dict[str, Plan]
    view_name: str | None
    marked: bool = False


class Matcher:
    """Asked once for each line. `available` are the fields that the log has."""

    def __init__(self, table: PolicyTable, available: frozenset[str], slots: Slots) -> None:
        self._table, self.slots = table, slots
        self.left_out: list[LeftOut] = []
        wanted = [(policy, *needs_of(policy)) for policy in table]
        kept: list[tuple[Policy, frozenset[str]]] = []
        for policy, fields, impossible in wanted:
            missing = [*impossible, *(_said(name) for name in sorted(fields - available))]
            if missing:
                self.left_out.append(LeftOut(policy.name, tuple(missing)))
            else:
                kept.append((policy, fields))
        #: Those that are replayed, in table order; their places here are their numbers.
        self.policies = [policy for policy, _ in kept]
        #: The fields that a parser has to give besides the usual ones.
        self.further = sorted(frozenset().union(*(fields for _, fields in kept)) - {"ip", "path", "method"})
        keyed = [_Keyed(index, policy, fields, self.further) for index, (policy, fields) in enumerate(kept)]
        self._keyed = {entry.policy: entry for entry in keyed}
        self._methods = STANDARD_METHODS.union(*(policy.methods or () for policy in table))
        self._routes: dict[str, _Route] = {}
        self._views: dict[tuple[str, bool], _Route] = {}
        self._nowhere = _Route({}, None)
        #: The path that was resolved last, with the view's keyword arguments: to keep those of all would take most memory.
        self._latest: tuple[str, Mapping[str, Any]] = ("", {})
        self._resolve = resolving()
        self._singles: list[tuple[int]] = []

    def ask(self, method: str, target: str, ip: str | None, further: Sequence[Any]) -> tuple[int, ...] | None:
        """The slots of a request, one for each policy that applies; None where the path leads nowhere."""
        path, _, query = target.partition("?")
        route = self._routes.get(path)
        if route is None:
            route = self._route(path)
        plan = route.plans.get(method)
        if plan is None:
            if route.view_name is None:
                return None
            plan = self._plan(route, method)
        if not plan:
            return ()
        found = []
        simple = (None, ip, path)
        for keyed, known, kind in plan:
            made_of: Any
            if kind != _GENERAL:
                made_of = simple[kind]
            else:
                made_of = (
                    ip if keyed.of_address else "",
                    path if keyed.of_path else "",
                    query if keyed.of_query else "",
                    method if keyed.of_method else "",
                    *[further[place] for place in keyed.used],
                )
            try:
                number = known[made_of]
            except KeyError:
                number = self._look_up(keyed, made_of, method, path, query, ip, further)
            if number < 0:
                if number == _BY_ADDRESS:
                    number = self._look_up(keyed, made_of, method, path, query, ip, further)
                if number == NONE:
                    continue
            found.append(number)
        if len(found) == 1 and found[0] >= 0:  # these are kept by the hundred thousand, so each is made once
            singles = self._singles
            while found[0] >= len(singles):
                singles.append((len(singles),))
            return singles[found[0]]
        return tuple(found)

    def _look_up(
        self, keyed: _Keyed, made_of: Any, method: str, path: str, query: str, ip: str | None, further: Sequence[Any]
    ) -> int:
        with_address = (made_of, ip)
        number = keyed.known.get(with_address) if keyed.falls_back else None
        if number is None:
            if len(keyed.known) >= REMEMBERED:
                keyed.known.clear()
            number, by_address = self._find(keyed, method, path, query, ip, further)
            if _length(with_address) > LONGEST:
                return number
            if by_address:
                keyed.known[made_of] = _BY_ADDRESS
                made_of = with_address
            keyed.known[made_of] = number
        return number

    def _find(
        self, keyed: _Keyed, method: str, path: str, query: str, ip: str | None, further: Sequence[Any]
    ) -> tuple[int, bool]:
        """The slot, and whether it is the address that decided where something else might have."""
        kwargs = self._kwargs(path) if keyed.of_path else {}
        if keyed.quick is not None and (key := keyed.quick(ip, kwargs)) is not None:
            return self.slots.number(keyed.index, asked_for(keyed.policy, key)), False
        address = None if ip is None else parse_address(ip[:64])
        if address is None and keyed.policy.key.kind == "ip":
            return refused(keyed.index) if keyed.policy.missing == "reject" else NONE, False
        request = _Line(method, query, None if address is None else ip, zip(self.further, further, strict=True))
        resolver = Resolver(request, kwargs, _NOBODY_TRUSTED, "HTTP_X_FORWARDED_FOR")
        asking = _answer(resolver.resolve((keyed.policy,)))
        if not asking:
            return NONE, False
        (found,) = asking
        if isinstance(found, KeyMissing):
            return refused(keyed.index) if found.rejects else NONE, keyed.falls_back
        by_address = keyed.falls_back and found.key.text.startswith(("ip:", "missing:ip:"))
        return self.slots.number(keyed.index, found), by_address

    def _kwargs(self, path: str) -> Mapping[str, Any]:
        if self._latest[0] != path:
            match = self._resolve(path)
            self._latest = (path, match.kwargs if match is not None else {})
        return self._latest[1]

    def _route(self, path: str) -> _Route:
        if len(self._routes) >= REMEMBERED:
            self._routes.clear()
        match = self._resolve(path)
        if match is None:
            route = self._nowhere
        else:
            marked = bool(getattr(match.func, MARK, False))
            known = self._views.get((match.view_name, marked))
            route = known or self._views.setdefault((match.view_name, marked), _Route({}, match.view_name, marked))
            self._latest = (path, match.kwargs)
        if len(path) <= LONGEST:
            self._routes[path] = route
        return route

    def _plan(self, route: _Route, method: str) -> Plan:
        assert route.view_name is not None
        method = method.upper()
        plan = tuple(
            (self._keyed[policy], self._keyed[policy].known, self._keyed[policy].kind)
            for policy in self._table.match(route.view_name, method)
            if policy in self._keyed and not (route.marked and policy.overridable)
        )
        if method in self._methods:  # a client's own words take no memory
            route.plans[method] = plan
        return plan


def _length(made_of: Any) -> int:
    """Characters, of texts that may lie in tuples."""
    if isinstance(made_of, tuple):
        return sum(map(_length, made_of))
    return len(made_of) if isinstance(made_of, str) else 0


def needs_of(policy: Policy) -> tuple[frozenset[str], list[str]]:
    """The fields of a log that a policy needs, and what it needs that no log has."""
    fields: set[str] = set()
    impossible: list[str] = []
    if not policy.url_names:
        impossible.append("url_names: it is for decorators and hold() alone")
    kind = policy.key.kind
    if policy.key.needs_ip or policy.except_ips or (policy.missing == "ip" and _may_miss(policy)):
        fields.add("ip")
    if kind in ("user", "session"):
        fields.add(kind)
    if kind == "callable":
        impossible.append(f"its key is asked of {policy.key.text}")
    for part in policy.key.parts:
        if isinstance(part, Part) and part.root not in ("ip", "kwargs", "get", "method"):
            fields.add(_field_of(part))
    if policy.when in ("authenticated", "anonymous") or policy.except_users:
        fields.add("user")
    elif policy.when is not None:
        impossible.append(f"when: {policy.when if isinstance(policy.when, str) else 'a callable'}")
    for name in ("max_concurrent", "cost"):
        value = getattr(policy, name)
        if not (value is None or isinstance(value, int)):
            impossible.append(f"its {name} is asked of {value if isinstance(value, str) else 'a callable'}")
    return frozenset(fields), impossible


def _may_miss(policy: Policy) -> bool:
    return policy.key.kind not in ("ip", "user", "global", "callable")


def _field_of(part: Part) -> str:
    if part.root == "header":
        return canonical(f"header.{part.path[0]}")
    if part.root == "user" and (not part.path or part.path in (("pk",), ("id",))):
        return "user"
    return ".".join((part.root, *part.path))


def _said(field: str) -> str:
    if field == "ip":
        return "the client's address (--field ip=NAME)"
    return f"{field} (--field {field}=NAME)"


class _Line(HttpRequest):
    """As much of a request as a key is made of; what HttpRequest's own constructor makes is left out, as it takes long."""

    def __init__(self, method: str, query: str, ip: str | None, further: Iterable[tuple[str, str | None]]) -> None:
        self.method = method
        self.META = {} if ip is None else {"REMOTE_ADDR": ip}
        self.GET = QueryDict(query) if query else _NO_QUERY
        user: Any = SimpleNamespace(is_authenticated=False)
        session: Any = _Session()
        for name, value in further:
            if value is None:
                continue
            root, _, rest = name.partition(".")
            if root == "header":
                meta = rest.upper().replace("-", "_")
                self.META[meta if meta in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{meta}"] = value
            elif root == "host":
                self.META["HTTP_HOST"] = value
            elif root == "session":
                session.session_key = session.session_key or value
                session.update({rest: value} if rest else {})
            elif rest:
                user.is_authenticated = True
                _set(user, rest.split("."), value)
            else:
                user.is_authenticated = True
                user.pk = user.id = value
        self.user = user
        self.session = session


def _set(user: SimpleNamespace, names: Sequence[str], value: str) -> None:
    """`user.team.id`, where the log has that."""
    *outer, last = names
    for name in outer:
        user = vars(user).setdefault(name, SimpleNamespace())
    setattr(user, last, value)


_NO_QUERY = QueryDict("")


class _Session(dict[str, str]):
    """One that the site's store would have known: the log has only those that were used."""

    session_key: str | None = None

    def exists(self, key: str) -> bool:
        return True


def _answer(steps: Steps[list[Asked | KeyMissing]]) -> list[Asked | KeyMissing]:
    """The policies that are left in need no callable of the project's, so this asks only our own."""
    try:
        effect = next(steps)
        while True:
            effect = steps.send(effect.function(*effect.arguments) if isinstance(effect, Ask) else None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # a generator's return value is untyped here

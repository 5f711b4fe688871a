"""The policy, and the table of policies: which ones a view name and method have, compiled at first sight."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase, translate
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal

from .keyspec import KeySpec

STANDARD_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})

#: The entry of every method that is neither standard nor named by a policy: a client's words take no memory.
_OTHER = ""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Policy:
    """One limit: what it counts by (`key`), how many may be in flight (`max_concurrent`), where it applies.

    `ttl` and `max_age` are seconds. `methods` is upper case, with the HEAD that GET implies already in it;
    None means all. `place` is where the policy was written, such as `policies.yaml:3:3`. Two policies are
    equal only if they are one object.
    """

    name: str
    key: KeySpec
    #: None: counted, never full. A callable, or its dotted path, is asked about each request.
    max_concurrent: int | str | Callable[..., Any] | None
    url_names: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    methods: frozenset[str] | None = None
    when: str | Callable[..., Any] | None = None
    except_ips: tuple[IPv4Network | IPv6Network, ...] = ()
    except_users: tuple[int | str, ...] = ()
    missing: Literal["ip", "skip", "reject"] = "ip"
    #: Resolved key -> its own limit, as they were written.
    per_key: Mapping[str, int | None] | None = None
    cost: int | str | Callable[..., Any] = 1
    ttl: float = 60.0
    renew: bool = True
    max_age: float | None = 3600.0
    #: Seconds.
    wait: float = 0.0
    max_waiting: int = 100
    block: bool = True
    backend: str = "default"
    on_backend_error: Literal["local", "allow", "deny"] | None = None
    status: Literal[429, 503] = 429
    response_callback: str | Callable[..., Any] | None = None
    overridable: bool = True
    place: str = ""


def left_out(policy: Policy, view_name: str, method: str) -> str | None:
    """The field for which the table does not give this policy to that view; None where it does."""
    if not any(fnmatchcase(view_name, pattern) for pattern in policy.url_names):
        return "url_names"
    if any(fnmatchcase(view_name, pattern) for pattern in policy.exclude):
        return "exclude"
    return "methods" if policy.methods is not None and method not in policy.methods else None


class PolicyTable:
    """All policies, in the order they were written.

    `match` searches the table once per view name and looks it up from then on. It needs no lock: two threads
    that meet a new name at once write equal entries.
    """

    __slots__ = ("_by_name", "_globs", "_methods", "known", "policies")

    def __init__(self, policies: Sequence[Policy] = ()) -> None:
        self.policies: tuple[Policy, ...] = tuple(policies)
        self._by_name = {policy.name: policy for policy in self.policies}
        self._methods = STANDARD_METHODS.union(*(policy.methods or () for policy in self.policies))
        self._globs = [
            (policy, _any_of(policy.url_names), _any_of(policy.exclude)) for policy in self.policies if policy.url_names
        ]
        #: Of views that were seen: name -> method -> policies; empty where none matches, whatever the method.
        self.known: dict[str, Mapping[str, tuple[Policy, ...]]] = {}

    def __iter__(self) -> Iterator[Policy]:
        return iter(self.policies)

    def __len__(self) -> int:
        return len(self.policies)

    def get(self, name: str) -> Policy | None:
        """The policy of that name, or None."""
        return self._by_name.get(name)

    def match(self, view_name: str, method: str) -> tuple[Policy, ...]:
        """The policies of this view and method, in table order."""
        methods = self.known.get(view_name)
        if methods is None:
            methods = self.known[view_name] = self._compile(view_name)
        if not methods:
            return ()
        found = methods.get(method)
        return methods[_OTHER] if found is None else found

    def _compile(self, view_name: str) -> Mapping[str, tuple[Policy, ...]]:
        found = [policy for policy, wanted, unwanted in self._globs if wanted(view_name) and not unwanted(view_name)]
        if not found:
            return {}
        return {
            method: tuple(policy for policy in found if policy.methods is None or method in policy.methods)
            for method in (*self._methods, _OTHER)
        }


def _any_of(patterns: Sequence[str]) -> Callable[[str], bool]:
    """`fnmatchcase` against any of the patterns; the two common forms need no regular expression."""
    exact = frozenset(pattern for pattern in patterns if not is_glob(pattern))
    rest = [pattern for pattern in patterns if is_glob(pattern)]
    starts = tuple(pattern[:-1] for pattern in rest if pattern.endswith("*") and not is_glob(pattern[:-1]))
    others = [pattern for pattern in rest if is_glob(pattern[:-1]) or not pattern.endswith("*")]
    search = re.compile("|".join(map(translate, others))).match if others else None

    def matches(view_name: str) -> bool:
        return (
            view_name in exact or view_name.startswith(starts) or (search is not None and search(view_name) is not None)
        )

    return matches


def is_glob(pattern: str) -> bool:
    """Does the pattern stand for more than one name?"""
    return not {"*", "?", "["}.isdisjoint(pattern)

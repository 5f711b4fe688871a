"""The settings: CONCURRENCY_LIMIT, checked as a whole and read in one place.

`current()` is asked once per request and compares one object's identity, so that `override_settings` works at once, both
ways. What is wrong with the settings and the table is raised together. With the first request of a process begins the watch
over its policy file (RELOAD_INTERVAL), which replaces the configuration by one with the new table.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, TypeVar

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from . import afresh
from .backends import DEFAULT_BACKEND, DEFAULT_PREFIX, BackendConfig, BaseBackend, get_backend, worker_suffix
from .client import TrustedProxies
from .exceptions import ConfigurationError, Problem, shown
from .keys import callable_of
from .keyspec import is_dotted_path
from .loader import load_policies
from .plans import Plan
from .policies import Policy, PolicyTable
from .reload import Loaded, Watch, load

SETTING = "CONCURRENCY_LIMIT"
OnError = Literal["local", "allow", "deny"]
Headers = Literal["rejected", "always", "never"]
T = TypeVar("T")
#: Seconds that RELOAD_INTERVAL may be.
SHORTEST, LONGEST = 0.05, 86_400
#: No site has as many.
MOST_PLANS = 4096


@dataclass(frozen=True, slots=True)
class Config:
    """CONCURRENCY_LIMIT, compiled. `client_header` is the META key of CLIENT_IP_HEADER."""

    enabled: bool
    backends: Mapping[str, BackendConfig]
    table: PolicyTable
    on_backend_error: OnError
    trusted: TrustedProxies
    client_header: str
    headers: Headers
    #: How many threads of this process may wait for a slot at once.
    max_sync_waiters: int = 4
    #: The stores in use, by the name that policies call them; filled at first use.
    stores: dict[str, BaseBackend] = field(default_factory=dict)
    #: Seconds between two looks at the policy file; None: never.
    reload_interval: float | None = None
    #: What the table was read from, where that is a file.
    loaded: Loaded | None = None
    #: What the prefixes end with, in a worker of a parallel test run.
    suffix: str = ""
    #: Policies that are asked together -> what is known of them beforehand; filled at first use.
    plans: dict[tuple[Policy, ...], Plan] = field(default_factory=dict)

    def plan(self, policies: tuple[Policy, ...]) -> Plan:
        """What is known of these policies."""
        found = self.plans.get(policies)
        if found is None:
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            found = self.plans[policies] = Plan(
                policies, self.trusted, self.client_header, tells=self.headers == "always"
            )
        return found


_NONE: Mapping[str, Any] = {}
#: Where Django keeps what was read of the settings; whatever changes them empties it. To ask `settings` itself takes longer
#: than all that a view without a policy costs.
_read: dict[str, Any] = object.__getattribute__(settings, "__dict__")
#: The setting and what it says, in a process that uses it; the watch over its file, if there is one.
_current: tuple[object, Config] | None = None
_watch: Watch | None = None
#: The same, compiled by a process that may be about to fork, or inherited by a fork from one that used it.
_prepared: tuple[object, Config] | None = None
#: Held by whoever changes these. An RLock: a garbage collection inside may end a response, which asks for `current()`.
_changing = threading.RLock()


def current() -> Config:
    """The configuration in force. Raises: ConfigurationError with everything that is wrong with it."""
    known = _current
    if known is not None and known[0] is _read.get(SETTING):
        return known[1]
    raw = _raw()
    if known is not None and known[0] is raw:
        return known[1]
    return _begin(raw)


def prepare() -> None:
    """Compile the configuration, and start no thread: a server that loads the site before it forks has none.

    Raises: ConfigurationError with everything that is wrong with it.
    """
    global _prepared
    raw = _raw()
    with _changing:
        if _known(raw) is None:
            _prepared = (raw, compile_settings(raw))


def _raw() -> object:
    return getattr(settings, SETTING, _NONE)


def _known(raw: object) -> Config | None:
    # Django's parallel test runner tells its workers their numbers after the fork.
    known = [config for setting, config in filter(None, (_current, _prepared)) if setting is raw]
    return next((config for config in known if config.suffix == worker_suffix()), None)


def _begin(raw: object) -> Config:
    """This setting is in force in this process from now on, and its file is watched; no other is any more."""
    global _current, _prepared, _watch
    afresh.begin_if_patched()
    with _changing:
        if _current is not None and _current[0] is raw:  # another thread was first
            return _current[1]
        config = _known(raw) or compile_settings(raw)
        if _watch is not None:
            _watch.stop()
        _current, _prepared, _watch = (raw, config), None, None
        if config.loaded is not None and config.reload_interval is not None:
            _watch = Watch(config.loaded, config.reload_interval, _Owner(raw), _changing)
            _watch.look()  # at once: the file may have changed since the process that this one was forked from read it
        return _current[1]


def _forked() -> None:
    """A child has no watch, and what it inherits was read a while ago: its first request begins anew."""
    global _current, _prepared, _watch, _changing
    _prepared = _current or _prepared
    _current = _watch = None
    _changing = threading.RLock()  # a thread that is not in the child may have held it


afresh.begin_with(_forked)


class _Owner:
    """What the watch over a setting's policy file has to do with the configuration."""

    def __init__(self, raw: object) -> None:
        self._raw = raw

    def table(self) -> PolicyTable | None:
        """The table in force; None where the setting is gone, which has to be begun anew when it comes back."""
        global _current, _watch
        if _current is None or _current[0] is not self._raw:
            return None
        if _raw() is not self._raw:
            _current = _watch = None
            return None
        return _current[1].table

    def problems(self, table: PolicyTable) -> list[Problem]:
        """What requests would find out: stores and dotted paths that are not there."""
        assert _current is not None
        config = _current[1]
        return [problem for policy in table for problem in _unusable(policy, config)]

    def switch(self, table: PolicyTable, loaded: Loaded) -> None:
        """The new table is in force; the stores, and what they count, stay."""
        global _current
        assert _current is not None
        _current = (self._raw, replace(_current[1], table=table, loaded=loaded, plans={}))


def dotted_paths(policy: Policy) -> dict[str, str]:
    """The dotted paths that a policy names, which requests resolve at first use; by field."""
    named = {
        "key": policy.key.function,
        "when": policy.when if is_dotted_path(policy.when) else None,
        "max_concurrent": policy.max_concurrent,
        "cost": policy.cost,
        "response_callback": policy.response_callback,
    }
    return {name: path for name, path in named.items() if isinstance(path, str)}


def failure(policy: Policy, name: str, error: BaseException) -> str:
    """What a message says of a policy's field (none: of its store) that cannot be used."""
    what = "" if isinstance(error, ImproperlyConfigured) else f"{type(error).__name__}: "
    return f"policy {policy.name}: {name and f'{name}: '}{what}{error}"


def _unusable(policy: Policy, config: Config) -> Iterable[Problem]:
    uses: list[tuple[str, Callable[[], object]]] = [("", partial(get_backend, policy.backend, config.backends))]
    uses += [(name, partial(callable_of, path)) for name, path in dotted_paths(policy).items()]
    for name, use in uses:
        try:
            use()
        except (Exception, SystemExit) as error:  # a store or a module of the project's may fail in any way
            yield Problem(policy.place, failure(policy, name, error))


def compile_settings(raw: object) -> Config:
    """Check the settings and load the table. Raises: ConfigurationError with everything that is wrong."""
    if not isinstance(raw, Mapping):
        raise ConfigurationError([Problem(SETTING, f"expected a dictionary, got {type(raw).__name__}")])
    reader = _Reader(raw)
    reader.refuse_unknown(raw, SETTING, _KNOWN)
    table, loaded = reader.table()
    config = Config(
        enabled=reader.read("ENABLED", True, _boolean),
        backends=reader.read("BACKENDS", None, _backends),
        table=table,
        on_backend_error=reader.read("ON_BACKEND_ERROR", "local", _one_of("local", "allow", "deny")),
        trusted=reader.read("TRUSTED_PROXIES", (), _trusted),
        client_header=reader.read("CLIENT_IP_HEADER", "X-Forwarded-For", _header),
        headers=reader.read("HEADERS", "rejected", _one_of("rejected", "always", "never")),
        max_sync_waiters=reader.read("MAX_SYNC_WAITERS", 4, _threads),
        reload_interval=reader.read("RELOAD_INTERVAL", None, _interval),
        loaded=loaded,
        suffix=worker_suffix(),
    )
    if reader.problems:
        raise ConfigurationError(reader.problems)
    return config


class _Wrong(Exception):
    """Values are wrong: (path from the setting, message) of each."""

    def __init__(self, message: str = "", path: str = "", several: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.found = several or [(path, message)]


class _Reader:
    """Reads settings one by one and collects what is wrong."""

    def __init__(self, raw: Mapping[Any, Any]) -> None:
        self.raw = raw
        self.problems: list[Problem] = []

    def read(self, name: str, default: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(self.raw.get(name, default))
        except _Wrong as wrong:
            self.problems += [Problem(f"{SETTING}[{name!r}]{path}", message) for path, message in wrong.found]
            return None

    def table(self) -> tuple[PolicyTable, Loaded | None]:
        """The table, and the file that it was read from, if that is what it was."""
        source = self.raw.get("POLICIES")
        if source is None:
            return PolicyTable(()), None
        if not isinstance(source, (str, os.PathLike, Mapping)):
            self.problems.append(
                Problem(f"{SETTING}['POLICIES']", f"expected a path or a dictionary, got {type(source).__name__}")
            )
            return PolicyTable(()), None
        try:
            return (load_policies(source), None) if isinstance(source, Mapping) else load(source)
        except ConfigurationError as error:
            self.problems += error.problems
            return PolicyTable(()), None

    def refuse_unknown(self, raw: Mapping[Any, Any], place: str, known: tuple[str, ...]) -> None:
        for name in raw:
            if name not in known:
                self.problems.append(Problem(f"{place}[{name!r}]", _unknown(name, known)))


def _unknown(name: object, known: tuple[str, ...]) -> str:
    """The message for a name that is none of the known ones, with the nearest."""
    near = get_close_matches(str(name), known, n=1) or get_close_matches(str(name).upper(), known, n=1)
    return f"unknown name {_said(name)}" + (
        f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    )


def _said(value: object) -> str:
    """A value for a message, as Python writes it, within bounds."""
    return repr(value) if value is None or isinstance(value, bool) else shown(value)


_KNOWN = (
    "ENABLED",
    "BACKENDS",
    "POLICIES",
    "ON_BACKEND_ERROR",
    "TRUSTED_PROXIES",
    "CLIENT_IP_HEADER",
    "HEADERS",
    "MAX_SYNC_WAITERS",
    "RELOAD_INTERVAL",
)
_BACKEND_KEYS = ("BACKEND", "LOCATION", "KEY_PREFIX", "OPTIONS")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"expected True or False, got {_said(value)}")
    return value


def _threads(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _Wrong(f"expected an integer >= 0, got {_said(value)}")
    return value


def _interval(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not SHORTEST <= value <= LONGEST:
        raise _Wrong(f"expected None or seconds from {SHORTEST} to {LONGEST}, got {_said(value)}")
    return float(value)


def _one_of(*words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            near = get_close_matches(str(value), words, n=1)
            raise _Wrong(
                f"expected one of {', '.join(map(repr, words))}, got {_said(value)}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return value

    return check


def _trusted(value: Any) -> TrustedProxies:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise _Wrong(f"expected a list of networks such as ['10.0.0.0/8'], got {_said(value)}")
    _each((f"[{position}]", partial(_network, entry)) for position, entry in enumerate(value))
    return TrustedProxies.parse(list(value))


def _network(entry: Any) -> None:
    expected = f"expected a network such as '10.0.0.0/8', an address or 'unix', got {_said(entry)}"
    if not isinstance(entry, str):
        raise _Wrong(expected)
    try:
        TrustedProxies.parse([entry])
    except ValueError as error:
        # An error that repeats the entry is as long as that.
        raise _Wrong(expected if len(str(error)) > 200 else f"{expected} ({error})") from error


def _each(checks: Iterable[tuple[str, Callable[[], T]]]) -> list[T]:
    """Run all checks, each under its path. Raises: _Wrong with everything that they found."""
    good: list[T] = []
    found: list[tuple[str, str]] = []
    for path, check in checks:
        try:
            good.append(check())
        except _Wrong as wrong:
            found += [(path + inner, message) for inner, message in wrong.found]
    if found:
        raise _Wrong(several=found)
    return good


def _header(value: Any) -> str:
    if not isinstance(value, str) or not value.replace("-", "").replace("_", "").isalnum() or not value.isascii():
        raise _Wrong(f"expected the name of a header such as 'X-Forwarded-For', got {_said(value)}")
    if value.upper().replace("-", "_") == "REMOTE_ADDR":
        raise _Wrong(f"{value} is no header but the peer's address, which counts anyway; remove it")
    if value.upper().startswith("HTTP_"):
        raise _Wrong(f"expected the header's own name, such as {value[5:].replace('_', '-').title()!r}, got {value!r}")
    return "HTTP_" + value.upper().replace("-", "_")


def _backends(value: Any) -> Mapping[str, BackendConfig]:
    if value is None:
        return {"default": BackendConfig("default", DEFAULT_BACKEND, key_prefix=DEFAULT_PREFIX + worker_suffix())}
    if not isinstance(value, Mapping) or not value:
        raise _Wrong(
            "expected a dictionary of aliases such as {'default': {'BACKEND': 'redis'}}, got "
            + ("an empty one" if isinstance(value, Mapping) else type(value).__name__)
        )
    made = _each((f"[{alias!r}]", partial(_backend, alias, entry)) for alias, entry in value.items())
    return {config.alias: config for config in made}


def _backend(alias: Any, entry: Any) -> BackendConfig:
    # The values are not repeated in messages: a LOCATION may hold a password.
    if not isinstance(alias, str) or not alias:
        raise _Wrong(f"expected an alias as text, got {_said(alias)}")
    if not isinstance(entry, Mapping):
        raise _Wrong(f"expected a dictionary with 'BACKEND', got {type(entry).__name__}")
    found = [(f"[{name!r}]", _unknown(name, _BACKEND_KEYS)) for name in entry if name not in _BACKEND_KEYS]
    backend, prefix, options = entry.get("BACKEND"), entry.get("KEY_PREFIX", DEFAULT_PREFIX), entry.get("OPTIONS")
    if not isinstance(backend, str) or not backend:
        found.append(
            (
                "['BACKEND']",
                f"expected 'host', 'memory', 'redis' or a dotted path, got {_said(backend)}",
            )
        )
    if not isinstance(prefix, str) or not prefix:
        found.append(("['KEY_PREFIX']", f"expected text, got {_said(prefix)}"))
    if options is not None and not isinstance(options, Mapping):
        found.append(("['OPTIONS']", f"expected a dictionary, got {type(options).__name__}"))
    if found:
        raise _Wrong(several=found)
    return BackendConfig(alias, str(backend), entry.get("LOCATION"), f"{prefix}{worker_suffix()}", options or {})

"""The settings: CONCURRENCY_LIMIT, checked as a whole and read in one place.

`current()` is asked once per request and compares one object's identity, so that `override_settings` works at once, both
ways. What is wrong with the settings and the table is raised together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, TypeVar

from django.conf import settings

from .backends import DEFAULT_BACKEND, DEFAULT_PREFIX, BackendConfig, BaseBackend, worker_suffix
from .client import TrustedProxies
from .exceptions import ConfigurationError, Problem, shown
from .loader import load_policies
from .policies import PolicyTable

SETTING = "CONCURRENCY_LIMIT"
OnError = Literal["local", "allow", "deny"]
Headers = Literal["rejected", "always", "never"]
T = TypeVar("T")


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
    #: The stores in use, by the name that policies call them; filled at first use.
    stores: dict[str, BaseBackend] = field(default_factory=dict)


_NONE: Mapping[str, Any] = {}
_current: tuple[object, Config] | None = None


def _forked() -> None:
    global _current
    if "django.test.runner" in sys.modules:  # a worker of its parallel runner, whose number is told after the fork
        _current = None


os.register_at_fork(after_in_child=_forked)


def current() -> Config:
    """The configuration in force. Raises: ConfigurationError with everything that is wrong with it."""
    global _current
    raw = getattr(settings, SETTING, _NONE)
    known = _current
    if known is not None and known[0] is raw:
        return known[1]
    config = compile_settings(raw)
    _current = (raw, config)
    return config


def compile_settings(raw: object) -> Config:
    """Check the settings and load the table. Raises: ConfigurationError with everything that is wrong."""
    if not isinstance(raw, Mapping):
        raise ConfigurationError([Problem(SETTING, f"expected a dictionary, got {type(raw).__name__}")])
    reader = _Reader(raw)
    reader.refuse_unknown(raw, SETTING, _KNOWN)
    config = Config(
        enabled=reader.read("ENABLED", True, _boolean),
        backends=reader.read("BACKENDS", None, _backends),
        table=reader.table(),
        on_backend_error=reader.read("ON_BACKEND_ERROR", "local", _one_of("local", "allow", "deny")),
        trusted=reader.read("TRUSTED_PROXIES", (), _trusted),
        client_header=reader.read("CLIENT_IP_HEADER", "X-Forwarded-For", _header),
        headers=reader.read("HEADERS", "rejected", _one_of("rejected", "always", "never")),
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

    def table(self) -> PolicyTable:
        source = self.raw.get("POLICIES")
        if source is None:
            return PolicyTable(())
        if not isinstance(source, (str, os.PathLike, Mapping)):
            self.problems.append(
                Problem(f"{SETTING}['POLICIES']", f"expected a path or a dictionary, got {type(source).__name__}")
            )
            return PolicyTable(())
        try:
            return load_policies(source)
        except ConfigurationError as error:
            self.problems += error.problems
            return PolicyTable(())

    def refuse_unknown(self, raw: Mapping[Any, Any], place: str, known: tuple[str, ...]) -> None:
        for name in raw:
            if name == "MAX_SYNC_WAITERS" or (name == "RELOAD_INTERVAL" and raw[name] is not None):
                self.problems.append(
                    Problem(f"{place}[{name!r}]", f"{name} is not carried out by this version yet; remove it")
                )
            elif name not in known:
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

"""The loader: a policy file or mapping to a table of policies, with everything that is wrong at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from .document import Document, load_yaml
from .exceptions import ConfigurationError, Problem, did_you_mean, shown
from .fields import (
    Checked,
    FieldError,
    Finding,
    Path,
    check_defaults,
    check_name,
    check_policy,
    dotted,
    path_text,
    policy_from,
)
from .policies import Policy, PolicyTable

#: What a policy of a mapping is placed under.
SETTING = "CONCURRENCY_LIMIT['POLICIES']"
#: Bytes; more than any file that stays below the limit of nodes needs.
SIZE_LIMIT = 1_000_000

_TOP_LEVEL = ("version", "defaults", "policies")


def load_policies(source: str | os.PathLike[str] | Mapping[Any, Any], *, label: str | None = None) -> PolicyTable:
    """The table that a YAML file or a mapping describes.

    `label` stands for the file, or for the setting, in the places of problems.

    Raises: ConfigurationError with every problem.
    """
    if isinstance(source, Mapping):
        return _Reader(_Setting(label or SETTING)).table(source)
    label = label or label_of(source)
    return parse(read(source, label), label)


def parse(content: bytes, label: str) -> PolicyTable:
    """The table that a file of this content describes. Raises: ConfigurationError with every problem."""
    document = load_yaml(content, label)
    return _Reader(_File(label, document), list(document.problems)).table(document.data)


def label_of(source: str | os.PathLike[str]) -> str:
    """The path as problems show it: relative to the working directory where it lies below."""
    shown_path = os.fsdecode(source)
    try:
        relative = os.path.relpath(shown_path)
    except (OSError, ValueError):
        return shown_path
    return shown_path if relative.startswith(os.pardir) else relative


def read(path: str | os.PathLike[str], label: str) -> bytes:
    """The file's content. Raises: ConfigurationError where it cannot be read, or is too long."""
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigurationError([Problem(label, f"cannot be read: {error.strerror or error}")]) from error
    except ValueError as error:  # a NUL in the path
        raise ConfigurationError([Problem(shown(label), f"cannot be read: {error}")]) from error
    if len(content) > SIZE_LIMIT:
        raise ConfigurationError([Problem(label, f"cannot be read: larger than {SIZE_LIMIT:,} bytes")])
    return content


class _Places(Protocol):
    """How the two kinds of source say where something stands."""

    def place(self, path: Path, at_key: bool) -> str: ...

    def problem(self, path: Path, message: str, at_key: bool) -> Problem | None: ...


class _File:
    def __init__(self, label: str, document: Document) -> None:
        self._label, self._document = label, document

    def place(self, path: Path, at_key: bool) -> str:
        line, column = self._mark(path, at_key)
        return f"{self._label}:{line}:{column}"

    def problem(self, path: Path, message: str, at_key: bool) -> Problem | None:
        if self._mark(path, at_key) in self._document.faulty:
            return None
        return Problem(self.place(path, at_key), f"{path_text(path)}{message}")

    def _mark(self, path: Path, at_key: bool) -> tuple[int, int]:
        places = self._document.places
        while path not in places:
            path = path[:-1]
        return places[path].key if at_key else places[path].value


class _Setting:
    def __init__(self, label: str) -> None:
        self._label = label

    def place(self, path: Path, at_key: bool) -> str:
        steps = dotted(path)
        return f"{self._label}{'' if not steps or steps.startswith('[') else '.'}{steps}"

    def problem(self, path: Path, message: str, at_key: bool) -> Problem | None:
        return Problem(self.place(path, at_key), message)


class _Reader:
    """Reads one source, and collects what is wrong with it."""

    def __init__(self, places: _Places, problems: list[Problem] | None = None) -> None:
        self._places, self._problems = places, problems or []
        self._seen: set[tuple[str, str]] = set()

    def table(self, data: Mapping[Any, Any]) -> PolicyTable:
        for name in data:
            if name not in _TOP_LEVEL and not (isinstance(name, str) and name.startswith("x-")):
                self._complain((name,), _unknown_at_top(name), at_key=True)
        version = data.get("version", 1)
        if isinstance(version, bool) or not isinstance(version, int) or version != 1:
            self._complain(("version",), f"expected 1, the only version there is, got {shown(version)}")
        defaults = check_defaults(self._mapping(data.get("defaults", {}), ("defaults",), "{ttl: 60}"))
        self._report(("defaults",), defaults.findings)
        if "policies" not in data:
            self._complain((), "policies is required; write `policies: {}` if there is none yet", True)
        example = "{exports: {key: user, max_concurrent: 5}}"
        raw = self._mapping(data.get("policies", {}), ("policies",), example)
        policies = [self._policy(name, fields, defaults) for name, fields in raw.items()]
        if self._problems:
            raise ConfigurationError(self._problems)
        return PolicyTable([policy for policy in policies if policy is not None])

    def _policy(self, name: Any, fields: Any, defaults: Checked) -> Policy | None:
        path: Path = ("policies", name)
        good = len(self._problems)
        try:
            check_name(name)
        except FieldError as error:
            self._complain(path, str(error), at_key=True)
        if not isinstance(fields, Mapping):
            expected = "expected the fields of a policy, such as {key: user, max_concurrent: 5}"
            self._complain(path, f"{expected}, got {shown(fields)}")
            return None
        values, findings = check_policy(fields, defaults)
        self._report(path, findings)
        if findings or len(self._problems) > good or defaults.findings:
            return None
        return policy_from(name, values, self._places.place(path, True))

    def _mapping(self, value: Any, path: Path, example: str) -> Mapping[Any, Any]:
        if isinstance(value, Mapping):
            return value
        self._complain(path, f"expected a mapping such as {example}, got {shown(value)}")
        return {}

    def _report(self, path: Path, findings: tuple[Finding, ...] | list[Finding]) -> None:
        for finding in findings:
            self._complain((*path, *finding.path), finding.message, at_key=finding.at_key)

    def _complain(self, path: Path, message: str, at_key: bool = False) -> None:
        problem = self._places.problem(path, message, at_key)
        # Several policies may share, by an alias, the one value that is wrong.
        if problem is not None and (problem.place, message) not in self._seen:
            self._seen.add((problem.place, message))
            self._problems.append(problem)


def _unknown_at_top(name: object) -> str:
    near = did_you_mean(str(name), _TOP_LEVEL) or "; known are version, defaults and policies."
    return f"unknown name{near} Names of your own start with x-"

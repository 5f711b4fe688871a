"""The table of policy fields: one row says how a field is checked, its default, and how it is documented.

The policy file, the mapping in the settings and the keywords of the decorator are all checked by these rows.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from .exceptions import DecoratorUsageError, Problem, did_you_mean, shown
from .keyspec import PREFIXES, WORDS, is_dotted_path, parse_key
from .policies import Policy

Path = tuple[str | int, ...]

#: Seconds; a longer duration is a slip of the pen.
LONGEST = 10 * 365 * 86400
#: Seconds; the stores count in milliseconds.
SHORTEST = 0.001
#: `max_age` where it is not given, seconds; a longer `ttl` counts instead.
DEFAULT_MAX_AGE = 3600.0
LARGEST_LIMIT = 1_000_000_000
LARGEST_COST = 1000

POLICY_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_DURATION = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
_METHOD = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_WHEN = ("anonymous", "authenticated", "staff", "superuser")


class _Unset:
    """The default of keywords that were not given: those leave alone what `policy=` names."""

    def __repr__(self) -> str:
        return "<not given>"


UNSET: Any = _Unset()


class FieldError(Exception):
    """What is wrong with a value: `found` is one (path inside the value, message) for each thing."""

    def __init__(self, message: str = "", path: Path = (), *, found: Sequence[tuple[Path, str]] = ()) -> None:
        self.found: tuple[tuple[Path, str], ...] = tuple(found) or ((path, message),)
        super().__init__(self.found)

    def __str__(self) -> str:
        return "; ".join(message for _, message in self.found)


@dataclass(frozen=True, slots=True)
class Field:
    """One row. `check` gives the normalised value, or raises FieldError.

    `default` is what the file would have to say for the same effect; `doc` is one line of Markdown; `schema`
    is JSON Schema; `decorator` says whether it may be a keyword of the decorator.
    """

    name: str
    check: Callable[[object], Any]
    doc: str
    schema: Mapping[str, Any]
    default: Any = None
    required: bool = False
    decorator: bool = True


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a policy: where in it, at the key or at the value, and what."""

    path: Path
    message: str
    at_key: bool = False


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of checking some fields: normalised values of the good ones, findings about the others.

    `given` are the names that were there, good or not, and those that a misspelt one was meant to be.
    """

    values: Mapping[str, Any]
    findings: tuple[Finding, ...] = ()
    given: frozenset[str] = frozenset()


def check_fields(raw: Mapping[Any, object], rows: Mapping[str, Field]) -> Checked:
    """Check each field by its row. Whether a field is missing, or contradicts another, `check_whole` says."""
    values: dict[str, Any] = {}
    findings: list[Finding] = []
    meant: set[str] = set()
    for name, value in raw.items():
        row = rows.get(name) if isinstance(name, str) else None
        if row is None:
            near = did_you_mean(str(name), rows)
            findings.append(Finding((name,), f"unknown field{near}", at_key=True))
            meant.update(row.name for row in rows.values() if near == f"; did you mean {row.name!r}?")
            continue
        try:
            values[name] = row.check(value)
        except FieldError as error:
            findings += [Finding((name, *path), message) for path, message in error.found]
            continue
    return Checked(values, tuple(findings), frozenset(name for name in raw if isinstance(name, str)) | meant)


def check_whole(own: Checked, base: Checked) -> tuple[dict[str, Any], list[Finding]]:
    """A policy's own fields over those of its base: the file's defaults, or what a decorator starts from.

    Gives the values in force, and everything that is wrong with the policy, but not what is wrong with its
    base alone.
    """
    # A wrong field does not fall back to the base's: rules over several would speak of the wrong value.
    values = {name: value for name, value in base.values.items() if name not in own.given}
    values.update(own.values)
    missing = [
        Finding((), f"{name} is required, {_EXAMPLES[name]}", at_key=True)
        for name, row in FIELDS.items()
        if row.required and name not in own.given | base.given
    ]
    return values, [*own.findings, *missing, *_contradictions(values, own.given), *_foreign_keys(values, own.given)]


def check_defaults(raw: Mapping[Any, object]) -> Checked:
    """The fields that the policies of a file start from."""
    checked = check_fields(raw, FIELDS)
    return replace(checked, findings=(*checked.findings, *_contradictions(checked.values, checked.given)))


def _contradictions(values: Mapping[str, Any], given: Collection[str]) -> Iterator[Finding]:
    """What cannot stand beside `block: false`, where one of the two was given here; at the one to remove."""
    if values.get("block") is not False:
        return
    for name, contradiction in NOT_IN_SHADOW.items():
        at = next((field for field in (name, "block") if field in given), None)
        if at is not None and contradiction.refused(values.get(name)):
            yield Finding(
                (at,),
                f"block: false never rejects, which contradicts {name}: {_plain(values[name])}; "
                f"remove {name}, or write "
                "block: true",
            )


def _foreign_keys(values: Mapping[str, Any], given: Collection[str]) -> Iterator[Finding]:
    """Keys of `per_key` that no request has; at the one, or at the key that was changed over it."""
    key, own = values.get("key"), values.get("per_key")
    if key is None or not own or not {"key", "per_key"} & set(given):
        return
    for text in own:
        example = key.unlike(text)
        if example is not None:
            path: Path = ("per_key", text) if "per_key" in given else ("key",)
            what = f"{shown(text)} is no key of key: {_plain(key.text)}; those look like {example!r}"
            yield Finding(path, what, at_key=path[0] == "per_key")


def check_policy(raw: Mapping[Any, object], defaults: Checked) -> tuple[dict[str, Any], list[Finding]]:
    """A policy of the table over the checked defaults: values for `policy_from`, and what is wrong."""
    return check_whole(check_fields(raw, FIELDS), defaults)


def check_name(name: object) -> str:
    """The name of a policy. Raises: FieldError."""
    if not isinstance(name, str) or not POLICY_NAME.fullmatch(name):
        cure = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(name))[:60].strip("-") or "exports"
        raise FieldError(
            f"the name of a policy is letters, digits, '_', '.' and '-', such as {cure!r}; got {shown(name)}"
        )
    return name


def policy_from(name: str, values: Mapping[str, Any], place: str = "") -> Policy:
    """The policy of checked values. Without a `max_age` it is 3600 seconds, or the ttl if that is longer."""
    ttl = values.get("ttl", FIELDS["ttl"].default)
    return Policy(name=name, place=place, **{"max_age": max(DEFAULT_MAX_AGE, ttl), **values})


def override(base: Policy | None, name: str, keywords: Mapping[str, object], place: str) -> Policy:
    """The policy that a decorator's keywords make, by themselves or over a policy of the table.

    The view names of `base` stay behind. `backend=None` means the default one, or that of `base`.

    Raises: DecoratorUsageError with everything that is wrong, each at `place`.
    """
    raw = {field: value for field, value in keywords.items() if field != "backend" or value is not None}
    own = check_fields(raw, DECORATOR_FIELDS)
    values, findings = check_whole(own, _checked(base) if base is not None else Checked({}))
    try:
        check_name(name)
    except FieldError as error:
        findings.append(Finding(("name",), str(error)))
    if findings:
        raise DecoratorUsageError(
            [Problem(place, f"@concurrency_limit: {path_text(each.path)}{each.message}") for each in findings]
        )
    return policy_from(name, values, place)


def path_text(path: Path) -> str:
    """What a message begins with: the path and a colon, or nothing for an empty path."""
    return f"{dotted(path)}: " if path else ""


def dotted(path: Path) -> str:
    """`('policies', 'exports', 'url_names', 1)` as `policies.exports.url_names[1]`, always one short line."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            plain = isinstance(step, str) and len(step) <= 80 and re.fullmatch(r"[\w.*:<-]+", step)
            text += ("." if text else "") + (step if plain else shown(step))
    return text


def _plain(value: object) -> str:
    """A value as the policy file would say it."""
    return value if isinstance(value, str) else shown(value)


# The checks, each a function of the value alone.


def _key(value: object) -> Any:
    try:
        return parse_key(value)
    except ValueError as error:
        raise FieldError(str(error)) from error


def _max_concurrent(value: object) -> Any:
    if callable(value) or is_dotted_path(value):
        return value
    if isinstance(value, str):
        raise FieldError(
            f"expected an integer >= 0, null, or a dotted path such as 'shop.limits.of_plan', got {shown(value)}"
        )
    return check_limit(value)


def check_limit(value: object) -> int | None:
    """A limit by itself: how many, or None for what is never full. Raises: FieldError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FieldError(f"expected an integer >= 0, or null, got {shown(value)}")
    if value > LARGEST_LIMIT:
        raise FieldError(f"expected at most {LARGEST_LIMIT}, got {shown(value)}")
    return value


def check_cost(value: object) -> int:
    """A cost by itself. Raises: FieldError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COST:
        raise FieldError(f"expected an integer from 1 to {LARGEST_COST}, got {shown(value)}")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise FieldError(f"expected true or false, got {shown(value)}")
    return value


def check_duration(value: object) -> float:
    """A duration in seconds, 0 included."""
    if isinstance(value, str):
        found = _DURATION.fullmatch(value)
        if not found:
            raise FieldError(
                f"expected seconds such as 90, or text such as '90s', '5m', '1h', '250ms', got {shown(value)}"
            )
        value = float(found[1]) * _SECONDS[found[2]]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FieldError(f"expected seconds such as 90, or text such as '90s' or '5m', got {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError(f"expected a finite number of seconds, got {shown(value)}")
    if value < 0:
        raise FieldError(f"expected no negative number of seconds, got {shown(value)}")
    if value > LONGEST:
        raise FieldError(f"expected at most ten years ({LONGEST} seconds), got {shown(value)}")
    return float(value)


def _lease(value: object) -> float:
    seconds = check_duration(value)
    if seconds < SHORTEST:
        raise FieldError(f"expected seconds > 0 (at least {SHORTEST}), got {shown(value)}")
    return seconds


def _max_age(value: object) -> float | None:
    return None if value is None else _lease(value)


def _list_of(what: str, example: str, check: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def check_list(value: object) -> tuple[Any, ...]:
        if isinstance(value, str):
            raise FieldError(f"expected a list; write [{_quoted(value)}]")
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise FieldError(f"expected a list of {what} such as {example}, got {shown(value)}")
        if not value:
            raise FieldError(f"expected at least one of {what}, such as {example}, or no such field; got an empty list")
        good: list[Any] = []
        found: list[tuple[Path, str]] = []
        for position, item in enumerate(value):
            try:
                good.append(check(item))
            except FieldError as error:
                found += [((position, *path), message) for path, message in error.found]
        if found:
            raise FieldError(found=found)
        return tuple(good)

    return check_list


def _pattern(value: object) -> str:
    if not isinstance(value, str):
        raise FieldError(f"expected a view name as text, such as 'reports:export*', got {shown(value)}")
    if not value.strip():
        raise FieldError(f"expected a view name such as 'reports:export*', got {shown(value)}")
    if value != value.strip():
        raise FieldError(f"a view name has no spaces around it; write {_quoted(value.strip())}")
    return value


def _method_name(value: object) -> str:
    if not isinstance(value, str) or not _METHOD.fullmatch(value):
        raise FieldError(f"expected an HTTP method such as 'POST', got {shown(value)}")
    return value.upper()


_method_list = _list_of("HTTP methods", '["GET", "POST"]', _method_name)


def _methods(value: object) -> frozenset[str]:
    methods = frozenset(_method_list(value))
    return methods | {"HEAD"} if "GET" in methods else methods


def _when(value: object) -> Any:
    if callable(value) or (isinstance(value, str) and value in _WHEN) or is_dotted_path(value):
        return value
    near = did_you_mean(value, _WHEN) if isinstance(value, str) else ""
    raise FieldError(
        f"expected {_alternatives(_WHEN)}, or a dotted path such as 'shop.limits.is_partner', got {shown(value)}{near}"
    )


def _callable(example: str) -> Callable[[object], Any]:
    def check(value: object) -> Any:
        if value is None or callable(value) or is_dotted_path(value):
            return value
        raise FieldError(f"expected a dotted path such as {example!r}, got {shown(value)}")

    return check


def _one_of(*words: str, nullable: bool = False) -> Callable[[object], Any]:
    def check(value: object) -> Any:
        if (isinstance(value, str) and value in words) or (nullable and value is None):
            return value
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        raise FieldError(f"expected {_alternatives(words)}, got {shown(value)}{near}")

    return check


def _backend(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FieldError(f"expected the name of a backend such as 'default', got {shown(value)}")
    return value


def _status(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (429, 503):
        raise FieldError(f"expected 429 or 503, got {shown(value)}")
    return value


def _network(value: object) -> Any:
    try:
        if not isinstance(value, str):
            raise ValueError("not text")
        network = ipaddress.ip_network(value)
        if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
            mapped = network.network_address.ipv4_mapped
            if mapped is not None:  # addresses are compared as IPv4
                return ipaddress.ip_network((mapped, network.prefixlen - 96))
        return network
    except ValueError as error:
        cure = ""
        if isinstance(value, str):
            with suppress(ValueError):
                cure = f"; write {_quoted(str(ipaddress.ip_network(value, strict=False)))}"
        raise FieldError(f"expected a network such as '10.0.0.0/8', got {shown(value)}{cure}") from error


def _user_pk(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise FieldError(f"expected the primary key of a user, a number or text, got {shown(value)}")
    return value


def _per_key(value: object) -> Mapping[str, int | None]:
    if not isinstance(value, Mapping) or not value:
        raise FieldError(f'expected a mapping of resolved keys to limits such as {{"user:42": 50}}, got {shown(value)}')
    found: list[tuple[Path, str]] = []
    for key, limit in value.items():
        if not isinstance(key, str) or not key:
            found.append(((key,), f"expected a resolved key as text, such as 'user:42', got {shown(key)}"))
        try:
            check_limit(limit)
        except FieldError as error:
            found.append(((key,), str(error)))
    if found:
        raise FieldError(found=found)
    return dict(value)


def _cost(value: object) -> Any:
    if callable(value) or is_dotted_path(value):
        return value
    if isinstance(value, str):
        raise FieldError(
            f"expected an integer from 1 to {LARGEST_COST}, or a dotted path such as 'shop.limits.pages', got {shown(value)}"
        )
    return check_cost(value)


def _max_waiting(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_LIMIT:
        raise FieldError(f"expected an integer >= 0, got {shown(value)}")
    return value


def _not_on_a_view(value: object) -> Any:
    raise FieldError("a decorator stands on its view already; remove it, or write a policy of the table")


def _quoted(text: str) -> str:
    return '"' + " ".join(text.split())[:80] + '"'


def _alternatives(words: Iterable[str]) -> str:
    *others, last = map(repr, words)
    return f"{', '.join(others)} or {last}"


def _texts(pattern: str) -> Mapping[str, Any]:
    return {"type": "array", "items": {"type": "string", "pattern": pattern}, "minItems": 1}


_DOTTED = {"type": "string", "pattern": r"^[^\W\d]\w*(\.[^\W\d]\w*)+$"}
_DURATION_TEXT = {"type": "string", "pattern": f"^{_DURATION.pattern}$"}
_LENGTH = {
    "anyOf": [
        {"type": "number", "minimum": SHORTEST, "maximum": LONGEST},
        {"type": "string", "pattern": f"^(?=.*[1-9]){_DURATION.pattern}$"},
    ]
}
#: No spaces around it.
_VIEW_NAMES = _texts(r"^\S(.*\S)?$")
_BOOLEAN = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0, "maximum": LARGEST_LIMIT}
_NULL = {"type": "null"}

_patterns = _list_of("view names", '["reports:export*"]', _pattern)

_ROWS = (
    Field(
        "url_names",
        _patterns,
        "The views this policy is for: a list of `fnmatch` patterns over the view name; `*` crosses "
        "`:`. Without it: only for `policy=`.",
        _VIEW_NAMES,
        default=(),
        decorator=False,
    ),
    Field(
        "exclude",
        _patterns,
        "Patterns of views that `url_names` matches but that are left alone.",
        _VIEW_NAMES,
        default=(),
        decorator=False,
    ),
    Field(
        "methods",
        _methods,
        "The HTTP methods this policy is for; `GET` implies `HEAD`. Default: all.",
        _texts(f"^{_METHOD.pattern}$"),
    ),
    Field(
        "when",
        _when,
        "Whom it is for: `anonymous`, `authenticated`, `staff`, `superuser`, or a dotted path to `(request) -> bool`.",
        {"anyOf": [{"enum": list(_WHEN)}, _DOTTED]},
    ),
    Field(
        "except_ips",
        _list_of("networks", '["10.0.0.0/8"]', _network),
        "Networks that are neither counted nor limited.",
        _texts(r"^[0-9A-Fa-f:.]+(/[0-9.]+)?$"),
        default=(),
    ),
    Field(
        "except_users",
        _list_of("primary keys", "[1, 7]", _user_pk),
        "Users, by primary key, that are neither counted nor limited.",
        {"type": "array", "items": {"type": ["integer", "string"], "minLength": 1}, "minItems": 1},
        default=(),
    ),
    Field(
        "key",
        _key,
        "What is counted by: `ip`, `user`, `session`, `global`, `header:NAME`, `get:NAME`, a "
        "template, or a dotted path.",
        {
            "anyOf": [
                {"enum": list(WORDS)},
                {"type": "string", "pattern": f"^({'|'.join(PREFIXES)}):.*\\S"},
                {"type": "string", "pattern": r"\{[^{}]+\}"},
                _DOTTED,
            ]
        },
        required=True,
    ),
    Field(
        "missing",
        _one_of("ip", "skip", "reject"),
        "What a key with a missing part means: count by `ip`, `skip` the policy, or `reject`.",
        {"enum": ["ip", "skip", "reject"]},
        default="ip",
    ),
    Field(
        "max_concurrent",
        _max_concurrent,
        "How many requests of one key may be in flight at once; 0 admits nobody; null: counted, never full; or a dotted path "
        "to `(request) -> int | None`.",
        {"anyOf": [_COUNT, _NULL, _DOTTED]},
        required=True,
    ),
    Field(
        "per_key",
        _per_key,
        "Resolved keys with a limit of their own; null: counted, never full.",
        {"type": "object", "additionalProperties": {"anyOf": [_COUNT, _NULL]}, "minProperties": 1},
    ),
    Field(
        "cost",
        _cost,
        "How many slots one request takes: 1 to 1000, or a dotted path to `(request) -> int`.",
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": LARGEST_COST}, _DOTTED]},
        default=1,
    ),
    Field(
        "ttl",
        _lease,
        'Seconds, or text such as `"90s"` or `"5m"`: how long a slot outlives the process that held it (on `host` it does '
        "not, unless it was handed over).",
        _LENGTH,
        default=60.0,
    ),
    Field(
        "renew",
        _boolean,
        "Is the lease renewed while the request lives? `false`: the slot ends at `ttl`.",
        _BOOLEAN,
        default=True,
    ),
    Field(
        "max_age",
        _max_age,
        "Seconds after which even a renewed lease ends; null: never. Default: 3600, or `ttl` if that is longer.",
        {"anyOf": [*_LENGTH["anyOf"], _NULL]},
        default=DEFAULT_MAX_AGE,
    ),
    Field(
        "wait",
        check_duration,
        'Seconds, or text such as `"500ms"`, that a request waits in line for a slot before it is rejected; 0: not at all.',
        {"anyOf": [{"type": "number", "minimum": 0, "maximum": LONGEST}, _DURATION_TEXT]},
        default=0.0,
    ),
    Field(
        "max_waiting",
        _max_waiting,
        "How many may stand in line for one key; one more is rejected at once. Without `wait` nobody does.",
        _COUNT,
        default=100,
    ),
    Field(
        "block",
        _boolean,
        "`false` is the shadow mode: over capacity a request runs all the same, without a slot.",
        _BOOLEAN,
        default=True,
    ),
    Field(
        "backend",
        _backend,
        "Which of `BACKENDS` keeps the slots.",
        {"type": "string", "pattern": r"\S"},
        default="default",
    ),
    Field(
        "on_backend_error",
        _one_of("local", "allow", "deny", nullable=True),
        "What happens while the store fails: `local`, `allow` or `deny`. Default: the setting `ON_BACKEND_ERROR`.",
        {"enum": ["local", "allow", "deny", None]},
    ),
    Field("status", _status, "The status of a rejection: 429 or 503.", {"enum": [429, 503]}, default=429),
    Field(
        "response_callback",
        _callable("shop.limits.busy"),
        "A dotted path to `(request) -> HttpResponse`, sync or async, that answers a rejection.",
        {"anyOf": [_DOTTED, _NULL]},
    ),
    Field(
        "overridable",
        _boolean,
        "`false`: neither a decorator nor an exemption touches this policy.",
        _BOOLEAN,
        default=True,
    ),
)

#: The fields of a policy, in the order of the documentation.
FIELDS: Mapping[str, Field] = {row.name: row for row in _ROWS}

#: The same for the keywords of the decorator, where two fields are known only to be refused.
DECORATOR_FIELDS: Mapping[str, Field] = {
    row.name: row if row.decorator else replace(row, check=_not_on_a_view) for row in _ROWS
}

_EXAMPLES = {"key": "such as key: user", "max_concurrent": "such as max_concurrent: 5"}


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Which values of a field, as they are normalised, another one forbids; and those of a file, as JSON Schema."""

    refused: Callable[[Any], bool]
    schema: Mapping[str, Any]


#: What cannot stand beside `block: false`, by field.
NOT_IN_SHADOW: Mapping[str, Contradiction] = {
    "wait": Contradiction(bool, {"not": {"anyOf": [{"const": 0}, {"type": "string", "not": {"pattern": "[1-9]"}}]}}),
    "missing": Contradiction(lambda value: value == "reject", {"const": "reject"}),
    "on_backend_error": Contradiction(lambda value: value == "deny", {"const": "deny"}),
}


def _checked(policy: Policy) -> Checked:
    """The fields of a policy as a decorator starts from them."""
    values = {name: getattr(policy, name) for name, row in FIELDS.items() if row.decorator}
    if policy.max_age == max(DEFAULT_MAX_AGE, policy.ttl):
        del values["max_age"]  # follows the ttl, which may be another one now
    return Checked(values, given=frozenset(values))

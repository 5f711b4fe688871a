"""What a policy's `key` says, compiled: a word, a header, a query parameter, a template or a callable.

Nothing here knows a request; `keys` renders what is compiled here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .exceptions import did_you_mean, shown

Kind = Literal["ip", "user", "session", "global", "header", "get", "template", "callable"]

#: The words that are a key by themselves, as written, and what they mean.
WORDS: dict[str, Kind] = {
    "ip": "ip",
    "user": "user",
    "user_or_ip": "user",
    "session": "session",
    "global": "global",
}
#: The forms `header:NAME` and `get:NAME`, as written, and what they mean.
PREFIXES: dict[str, Literal["header", "get"]] = {"header": "header", "get": "get", "param": "get"}
#: What a placeholder of a template may start with.
ROOTS = ("ip", "user", "session", "kwargs", "get", "header", "method", "host")

_WITHOUT_ATTRIBUTES = frozenset({"ip", "method", "host"})
_WITH_ONE_NAME = {"kwargs": "pk", "get": "page", "header": "X-Tenant"}
_DOTTED_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
# RFC 9110, 5.6.2: what the name of a header consists of.
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_SESSION_NAME = re.compile(r"[\w-]+")
_PIECES = re.compile(r"(?P<escaped>\{\{|\}\})|\{(?P<field>[^{}]*)\}|(?P<lone>[{}])|(?P<literal>[^{}]+)")


@dataclass(frozen=True, slots=True)
class Part:
    """One placeholder: a root and the names after it; `meta` is a header's key in `request.META`."""

    root: str
    path: tuple[str, ...]
    meta: str = ""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """A compiled key.

    `text` is as written, with synonyms replaced. `parts` are the literals and placeholders of a template, or
    the one part of `header:` and `get:`. `function` is the callable of kind `callable`, or its dotted path.
    """

    kind: Kind
    text: str
    parts: tuple[str | Part, ...] = ()
    function: str | Callable[..., Any] | None = None
    needs_user: bool = field(init=False)
    needs_session: bool = field(init=False)
    needs_ip: bool = field(init=False)

    def __post_init__(self) -> None:
        roots = {self.kind, *(part.root for part in self.parts if isinstance(part, Part))}
        object.__setattr__(self, "needs_user", "user" in roots)
        object.__setattr__(self, "needs_session", "session" in roots)
        # An anonymous user is counted by address.
        object.__setattr__(self, "needs_ip", "ip" in roots or self.kind == "user")

    def unlike(self, text: str) -> str | None:
        """Where this text cannot be one of its resolved keys: what those look like. (A template's may be anything.)"""
        if self.kind == "global":
            return None if text == "global" else "global"
        starts = {
            "ip": ("ip:",),
            "user": ("user:", "ip:"),
            "session": ("session:", "missing:ip:"),
            "header": (f"{self.text}:", "missing:ip:"),
            "get": (f"{self.text}:", "missing:ip:"),
        }.get(self.kind)
        if starts is None or text.startswith(starts):
            return None
        return {"ip": "ip:203.0.113.9", "user": "user:42"}.get(self.kind, f"{starts[0]}...")


def parse_key(value: object) -> KeySpec:
    """Compile what a policy says as its `key`.

    Raises: ValueError with what is wrong and what to write instead.
    """
    if not isinstance(value, str):
        if callable(value):
            return KeySpec("callable", _name_of(value), function=value)
        raise ValueError(_not_text(value))
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise ValueError(f"the key {shown(value)} holds a control character; remove it")
    if value in WORDS:
        kind = WORDS[value]
        return KeySpec(kind, kind)
    if "{" in value or "}" in value:
        return KeySpec("template", value, tuple(_template(value)))
    prefix, colon, name = value.partition(":")
    if colon and prefix in PREFIXES:
        return _named(PREFIXES[prefix], name, prefix)
    if _DOTTED_PATH.fullmatch(value):
        return KeySpec("callable", value, function=value)
    raise ValueError(_unknown(value))


def is_dotted_path(value: object) -> bool:
    """Is this text such as `shop.limits.busy`?"""
    return isinstance(value, str) and _DOTTED_PATH.fullmatch(value) is not None


def _named(kind: Literal["header", "get"], name: str, prefix: str) -> KeySpec:
    if not name.strip():
        raise ValueError(f"'{prefix}:' needs a name, such as '{prefix}:{_WITH_ONE_NAME[kind]}'")
    part = Part(kind, (name,), _meta(name)) if kind == "header" else Part(kind, (name,))
    return KeySpec(kind, f"{kind}:{name}", (part,))


def _meta(name: str) -> str:
    """The key of a header in `request.META`. Raises: ValueError where no header can have this name."""
    if not _TOKEN.fullmatch(name):
        raise ValueError(
            f"{shown(name)} cannot be the name of a header; names are letters, digits and '-', such as 'X-Api-Key'"
        )
    if name.upper().startswith("HTTP_"):
        own = name[5:].replace("_", "-").title()
        raise ValueError(f"write the header's own name, {own!r}, instead of {name!r}")
    meta = name.upper().replace("-", "_")
    return meta if meta in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{meta}"


def _template(text: str) -> list[str | Part]:
    """The literals and placeholders of a template. Raises: ValueError."""
    parts: list[str | Part] = []
    literal = ""
    for piece in _PIECES.finditer(text):
        if piece["escaped"]:
            literal += piece["escaped"][0]
        elif piece["lone"]:
            raise ValueError(
                f"a '{piece['lone']}' without its partner in the template {shown(text)}; "
                f"a literal one is written '{piece['lone'] * 2}'"
            )
        elif piece["literal"]:
            literal += piece["literal"]
        else:
            if literal:
                parts.append(literal)
                literal = ""
            parts.append(_part(piece["field"]))
    if literal:
        parts.append(literal)
    if not any(isinstance(part, Part) for part in parts):
        raise ValueError(
            f"the template {shown(text)} has no placeholder such as {{user.pk}}; a constant bucket is 'global'"
        )
    return parts


def _part(field_name: str) -> Part:
    """One placeholder, without its braces. Raises: ValueError."""
    here = f"{{{field_name}}}"
    if not field_name.strip():
        raise ValueError(f"an empty placeholder {here}; write what it stands for, such as {{user.pk}}")
    root, dot, rest = field_name.partition(".")
    for mark, meaning in (("!", "conversion"), (":", "format")):
        if mark in field_name:
            cure = f"; a parameter of that name takes the form 'get:{rest}'" if root == "get" else ""
            raise ValueError(f"{shown(here)}: a template has no {meaning}; remove the {mark!r} and what follows{cure}")
    if root not in ROOTS:
        stem = re.split(r"[\[(]", root)[0]
        if stem in ROOTS:
            raise ValueError(f"{shown(here)}: no calls and no [...]; write names with dots, such as {{user.pk}}")
        raise ValueError(
            f"{shown(here)}: unknown {shown(root)}{did_you_mean(root, ROOTS)}; a placeholder starts "
            "with one of "
            f"{', '.join(ROOTS)}"
        )
    if dot and not rest:
        raise ValueError(f"{shown(here)}: a name is missing after the dot")
    if root in _WITHOUT_ATTRIBUTES:
        if dot:
            raise ValueError(f"{shown(here)}: {root} has no attributes; write {{{root}}}")
        return Part(root, ())
    if root in _WITH_ONE_NAME and not dot:
        raise ValueError(f"{here} needs a name, such as {{{root}.{_WITH_ONE_NAME[root]}}}")
    if root == "get":
        return Part(root, (rest,))
    if root == "header":
        if "." in rest:
            raise ValueError(f"{shown(here)}: {root} takes exactly one name, such as {{header.X-Tenant}}")
        return Part(root, (rest,), _meta(rest))
    path = tuple(rest.split(".")) if dot else ()
    for name in path:
        _check_name(here, root, name)
    if root != "user" and len(path) > 1:
        raise ValueError(f"{shown(here)}: {root} takes exactly one name, such as {{{root}.{path[0]}}}")
    return Part(root, path)


def _check_name(here: str, root: str, name: str) -> None:
    if name.startswith("_"):
        raise ValueError(f"{shown(here)}: names that start with '_' are private; name a public attribute")
    if any(bracket in name for bracket in "[]()"):
        raise ValueError(f"{shown(here)}: no calls and no [...]; write names with dots, such as {{user.team_id}}")
    if not (_SESSION_NAME.fullmatch(name) if root == "session" else name.isidentifier()):
        raise ValueError(f"{shown(here)}: {shown(name)} is no name; write names with dots, such as {{user.team_id}}")


def _unknown(value: str) -> str:
    if not value.strip():
        return "the key is empty; write a word such as 'user', or a template such as 'team:{user.team_id}'"
    prefix, colon, rest = value.partition(":")
    near = did_you_mean(value, WORDS)
    if not near and colon:
        found = did_you_mean(prefix, PREFIXES)
        near = found.replace("'?", f":{rest[:40]}'?") if found and rest else found
    return (
        f"unknown key {shown(value)}{f'{near} Known' if near else '; known'} are 'ip', 'user', 'session', "
        "'global', 'header:X-Api-Key', 'get:page', a template and a dotted path to a callable; a constant "
        "bucket is 'global', a template needs at least one {...}"
    )


def _not_text(value: object) -> str:
    if isinstance(value, dict):
        return f'quote a template, such as "{{user.pk}}": unquoted braces are a mapping, here {shown(value)}'
    return f"expected text such as 'user', or a callable, got {shown(value)}"


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None) or type(function).__module__
    return f"{module}.{name}"

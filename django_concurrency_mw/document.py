"""The document: YAML text as plain data, and the place of everything in it.

Plain scalars are read by the core schema of YAML 1.2, so that `no` and `on` are text; what YAML 1.1 and 1.2
read differently (`010`, `0x1F`, `1_000`, `1:30`) is refused. So are tags, equal keys and
keys that are no text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from .exceptions import ConfigurationError, Problem, shown
from .fields import Path, path_text

#: Nodes of a document, those of an alias counted each time it is used: a few lines can stand for billions.
NODE_LIMIT = 10_000
DEPTH_LIMIT = 50

Mark = tuple[int, int]

_CORE = "tag:yaml.org,2002:"
_STR, _MAP, _SEQ = f"{_CORE}str", f"{_CORE}map", f"{_CORE}seq"
#: The tag that stands here for a scalar without quotes and without a tag of its own.
_PLAIN = "?"

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(?:inf|Inf|INF)")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)")

_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_BASED = re.compile(r"[-+]?0[xob][0-9a-fA-F_]+")
_UNDERSCORED = re.compile(r"[-+]?[0-9][0-9_]*_[0-9_]*(?:\.[0-9_]*)?")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")

_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
#: Characters that begin something else than text where a value is expected.
_INDICATORS = "*&!%@`|>"
_VALUE_WITH_INDICATOR = re.compile(r"(?:^\s+|[:\-,]\s+|\[\s*)([*!%@`][^\s,\]}]*)")
_FLOW_TAG = re.compile(r"[\[{,:\s](![^\s,\"']*)")
_VALUE_WITH_BRACE = re.compile(r":\s+(\{[^{}]*\}\S.*?)\s*$")


@dataclass(frozen=True, slots=True)
class Place:
    """Line and column, both from 1, of a key and of its value; an entry of a list repeats its value's."""

    key: Mark
    value: Mark


@dataclass(frozen=True, slots=True)
class Document:
    """What a text says.

    `places` has every path into `data`, `()` included. `problems` are those that still let the rest be read;
    what stands at `faulty` places has been complained about already.
    """

    data: dict[str, Any]
    places: Mapping[Path, Place]
    problems: tuple[Problem, ...] = ()
    faulty: frozenset[Mark] = frozenset()


def load_yaml(text: str | bytes, label: str) -> Document:
    """Read one YAML document whose top level is a mapping; `label` names it in places.

    Raises: ConfigurationError, with one problem, where the text cannot be read at all.
    """
    source = _decoded(text, label)
    loader: _Loader | None = None
    try:
        loader = _Loader(source)
        node = loader.get_single_node()
    except _TooMuch as error:
        raise _fatal(label, error.mark, error.message) from error
    except yaml.MarkedYAMLError as error:
        raise _fatal(label, *_explained(error, source)) from error
    except yaml.reader.ReaderError as error:
        message = f"the character {_escaped(chr(int(error.character)))} is not allowed in YAML; remove it"
        raise _fatal(label, _position(source, error.position), message) from error
    except (yaml.YAMLError, ValueError, OverflowError, LookupError) as error:
        # PyYAML lets some through: an escape beyond Unicode, a version of 5,000 digits.
        mark = (loader.line + 1, loader.column + 1) if loader is not None else (1, 1)
        raise _fatal(label, mark, f"cannot be read as YAML here ({shown(str(error))})") from error
    if node is None or (node.tag == _PLAIN and node.value == ""):
        raise _fatal(label, (1, 1), "the file is empty; it needs at least `policies: {}`")
    if not isinstance(node, yaml.MappingNode):
        raise _fatal(label, _start(node), "expected a mapping at the top, with `policies:` in it")
    builder = _Builder(label)
    data = builder.build(node, (), _start(node))
    return Document(data, builder.places, tuple(builder.problems), frozenset(builder.faulty))


class _TooMuch(Exception):
    """The document is larger than any policy file, or contains itself."""

    def __init__(self, mark: Any, message: str) -> None:
        self.mark, self.message = (mark.line + 1, mark.column + 1), message
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    """Composes nodes whose tags are the core's, those written, or `_PLAIN`; bounds their number and depth."""

    # Emptied: nothing is read by the rules of YAML 1.1.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own name and kind of attribute

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._deepest = self._count = 0
        self._open: set[str] = set()
        #: Of each anchor: how many nodes, and how many levels.
        self._sizes: dict[str | None, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's parser is untyped
        mark, anchor = event.start_mark, event.anchor
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                raise _TooMuch(mark, f"*{anchor} stands inside &{anchor}; it would never end")
            size, height = self._sizes.get(anchor, (0, 0))
            self._add(size, height, mark)
            return super().compose_node(parent, index)
        before, outer = self._count, self._deepest
        self._deepest = self._depth
        self._add(1, 1, mark)
        self._depth += 1
        if anchor is not None:
            self._open.add(anchor)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if anchor is not None:
            self._open.discard(anchor)
            self._sizes[anchor] = self._count - before, self._deepest - self._depth
        self._deepest = max(self._deepest, outer)
        return node

    def _add(self, nodes: int, height: int, mark: Any) -> None:
        self._count += nodes
        self._deepest = max(self._deepest, self._depth + height)
        if self._deepest > DEPTH_LIMIT:
            raise _TooMuch(mark, f"nested more than {DEPTH_LIMIT} deep; a policy file has 4 levels")
        if self._count > NODE_LIMIT:
            raise _TooMuch(mark, f"more than {NODE_LIMIT:,} values, aliases counted each time; use fewer")

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's parser is untyped
        node = super().compose_scalar_node(anchor)
        if event.tag is None:
            node.tag = _PLAIN if event.implicit[0] else _STR
        else:
            node.tag = event.tag
        return node


@dataclass(slots=True)
class _Builder:
    """Makes plain data of nodes, and remembers places and problems."""

    label: str
    places: dict[Path, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    faulty: set[Mark] = field(default_factory=set)

    def build(self, node: Any, path: Path, key: Mark) -> Any:
        # An empty value has no text to point at.
        at = key if node.tag == _PLAIN and node.value == "" else _start(node)
        self.places[path] = Place(key, at)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path, at)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, _SEQ, path, at)
            return [self.build(item, (*path, position), _start(item)) for position, item in enumerate(node.value)]
        self._check_tag(node, _MAP, path, at)
        entries = self._entries(node, path)
        return {name: self.build(value, (*path, name), _start(key)) for name, (key, value) in entries.items()}

    def _complain(self, mark: Mark, path: Path, message: str) -> None:
        # A node that several aliases stand for is complained about once.
        if mark not in self.faulty:
            self.faulty.add(mark)
            self.problems.append(Problem(_place(self.label, mark), f"{path_text(path)}{message}"))

    def _check_tag(self, node: Any, expected: str, path: Path, at: Mark) -> None:
        if node.tag != expected:
            self._complain(at, path, _about_tag(node.tag))

    def _scalar(self, node: Any, path: Path, at: Mark) -> Any:
        text: str = node.value
        if node.tag == _STR:
            return text
        value = _resolved(text)
        if node.tag == _PLAIN:
            cure = _ambiguous(text)
            if cure:
                self._complain(at, path, cure)
                return text
            return value
        wanted = _SCALARS.get(node.tag)
        if wanted is None:
            self._complain(at, path, _about_tag(node.tag))
            return text
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            self._complain(
                at,
                path,
                f"{shown(text)} is not what its tag !!{node.tag.removeprefix(_CORE)} says; remove the tag",
            )
            return text
        return float(value) if wanted == (int, float) else value

    def _entries(self, node: Any, path: Path) -> dict[str, tuple[Any, Any]]:
        """The entries of a mapping, merges included: its own win, and of several merged the first."""
        own: dict[str, tuple[Any, Any]] = {}
        merges: list[tuple[Any, Any]] = []
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag == _PLAIN and key.value == "<<":
                if merges:
                    self._complain(
                        _start(key),
                        path,
                        f"a second <<; the first is at {_place(self.label, _start(merges[0][0]))}: "
                        "write one, with a list, such as <<: [*a, *b]",
                    )
                merges.append((key, value))
                continue
            name = self._name(key, path)
            if name is None:
                continue
            if name in own:
                first = _place(self.label, _start(own[name][0]))
                self._complain(
                    _start(key), (*path, name), f"written a second time; the first is at {first}: remove one"
                )
                continue
            own[name] = (key, value)
        if not merges:
            return own
        merged: dict[str, tuple[Any, Any]] = {}
        for _, value in merges:
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in sources:
                if not isinstance(source, yaml.MappingNode):
                    self._complain(
                        _start(source), path, "<< takes a mapping or a list of mappings, such as <<: *common"
                    )
                    continue
                self._check_tag(source, _MAP, path, _start(source))
                for name, entry in self._entries(source, path).items():
                    merged.setdefault(name, entry)
        return {**{name: entry for name, entry in merged.items() if name not in own}, **own}

    def _name(self, key: Any, path: Path) -> str | None:
        """The text of a key, or None where it is none."""
        at = _start(key)
        if not isinstance(key, yaml.ScalarNode):
            self._complain(at, path, 'a key must be text; a template such as {user.pk} is quoted: "{user.pk}"')
            return None
        text: str = key.value
        if key.tag == _STR:
            return text
        if key.tag != _PLAIN:
            self._complain(at, path, _about_tag(key.tag))
            return None
        if text == "":
            self._complain(at, path, "an empty key; write a name before the colon")
            return None
        if not isinstance(_resolved(text), str) or _ambiguous(text):
            self._complain(at, path, f'the key {shown_key(text)} is not text; quote it: "{text[:60]}"')
            return None
        return text


def shown_key(text: str) -> str:
    """A plain scalar as written, in one short line."""
    return shown(text)[1:-1]


#: What the tags of the core may be written before, and what then has to follow.
_SCALARS: Mapping[str, Any] = {
    f"{_CORE}int": int,
    f"{_CORE}float": (int, float),
    f"{_CORE}bool": bool,
    f"{_CORE}null": type(None),
}


def _resolved(text: str) -> Any:
    """A scalar without quotes by the core schema of YAML 1.2 (10.3.2), decimal integers only."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if _INF.fullmatch(text):
        return float("-inf" if text[0] == "-" else "inf")
    if _NAN.fullmatch(text):
        return float("nan")
    if len(text) <= 100 and _FLOAT.fullmatch(text):
        return float(text)
    return text


def _ambiguous(text: str) -> str:
    """What to say about a scalar that YAML 1.1 and 1.2 read differently, else an empty text."""
    if len(text) > 100 or not text.strip("+-")[:1].isdigit():
        return ""
    sign, digits = ("-" if text[0] == "-" else ""), text.lstrip("+-").replace("_", "")
    if _LEADING_ZERO.fullmatch(text):
        decimal = f"{sign}{int(digits)}"
        if set(digits) <= set("01234567"):
            octal = f"{sign}{int(digits, 8)}"
            choice = decimal if octal == decimal else f"{decimal} or {octal}"
            return f'{text} is ambiguous (octal in YAML 1.1): write {choice}, or "{text}" for text'
        return f'{text} is ambiguous (it starts with a 0): write {decimal}, or "{text}" for text'
    if _BASED.fullmatch(text):
        try:
            return f'{text} is ambiguous (text in some YAML): write {sign}{int(digits, 0)}, or "{text}" for text'
        except ValueError:
            return ""  # such as 0b12: text everywhere
    if _UNDERSCORED.fullmatch(text):
        return f'{text} is ambiguous (YAML 1.1 drops the "_"): write {sign}{digits}, or "{text}" for text'
    if _SEXAGESIMAL.fullmatch(text) and "." not in text:
        total = 0
        for part in digits.split(":"):
            total = total * 60 + int(part)
        return f'{text} is ambiguous (YAML 1.1 counts in sixties): write {sign}{total}, or "{text}" for text'
    return ""


def _about_tag(tag: str) -> str:
    if tag.startswith(_CORE):
        return f"the tag !!{shown_key(tag.removeprefix(_CORE))} is not allowed; remove it"
    return f'the tag {shown_key(tag)} is not allowed; a text that starts with "!" is quoted: "{shown_key(tag)}"'


def _decoded(text: str | bytes, label: str) -> str:
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = text[: error.start].decode("utf-8-sig", "replace")
        message = f"the byte 0x{text[error.start]:02X} is not UTF-8; save the file as UTF-8"
        raise _fatal(label, _position(before, len(before)), message) from error


def _position(text: str, index: int) -> Mark:
    """Line and column, from 1, of a character."""
    lines = _LINE_BREAK.split(text[:index])
    return len(lines), len(lines[-1]) + 1


def _start(node: Any) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _place(label: str, mark: Mark) -> str:
    return f"{label}:{mark[0]}:{mark[1]}"


def _fatal(label: str, mark: Mark, message: str) -> ConfigurationError:
    return ConfigurationError([Problem(_place(label, mark), message)])


def _explained(error: yaml.MarkedYAMLError, source: str) -> tuple[Mark, str]:
    """Where the value at fault begins, as far as PyYAML knows, and what to do about it."""
    context = str(error.context or "")
    problem = " ".join(str(error.problem or context or "cannot be read as YAML").split())
    mark, began = _mark_of(error.problem_mark), _mark_of(error.context_mark)
    lines = _LINE_BREAK.split(source)
    if "but found another document" in problem:
        return mark, "a second document begins here; a policy file is one document: remove the ---"
    if "'\\t'" in problem:
        return mark, "a tab cannot indent in YAML; use spaces"
    if "mapping values are not allowed" in problem:
        return (
            mark,
            f'{problem}; a text with ": " in it is quoted, and the keys of one mapping share a column',
        )
    if context.startswith("while parsing a flow "):
        # The name of a tag goes on over a closing bracket: the error is only seen further down.
        tag = _FLOW_TAG.search(_line(lines, began), began[1] - 1)
        if tag:
            return (
                began[0],
                tag.start(1) + 1,
            ), f"a text that starts with '!' is quoted: \"{tag[1].rstrip(']}')}\""
        if "stream end" in problem:
            if context == "while parsing a flow node":
                return mark, "the file ends inside a bracket; close it"
            return began, "a bracket is opened here and never closed"
    if context == "while scanning a quoted scalar" and "end of stream" in problem:
        return began, "a quotation mark is opened here and never closed"
    if context.startswith(("while scanning an alias", "while scanning an anchor")):
        mark = began
    written = _line(lines, mark)
    rest = re.match(r"[^\s,\]}]*", written[mark[1] - 1 :])
    if rest and rest[0][:1] and rest[0][0] in _INDICATORS and mark[1] > 1:
        return mark, f'{problem}; a text that starts with {rest[0][0]!r} is quoted: "{rest[0][:60]}"'
    for pattern in (_VALUE_WITH_BRACE, _VALUE_WITH_INDICATOR):
        found = pattern.search(written)
        if found:
            return mark, f'{problem}; a text that starts with {found[1][0]!r} is quoted: "{found[1][:60]}"'
    if "<block end>" in problem:
        return mark, f"{problem}; is this line indented like those it belongs to?"
    return mark, problem


def _mark_of(mark: Any) -> Mark:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


def _line(lines: list[str], mark: Mark) -> str:
    return lines[mark[0] - 1] if mark[0] <= len(lines) else ""


def _escaped(character: str) -> str:
    return f"U+{ord(character):04X}"

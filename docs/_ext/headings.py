"""The objects that pages refer to: settings, policy fields, signals, checks and subcommands, each defined by a heading.

On its page a heading that is nothing but code, such as "### `ENABLED`", defines the object of that name; {setting}`ENABLED`
refers to it from anywhere. So the pages need no directives, and are read as they stand where there is no Sphinx.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes

#: Kind -> the page that defines all of that kind, and what the index calls one.
KINDS = {
    "setting": ("settings", "setting"),
    "field": ("policies", "policy field"),
    "signal": ("signals", "signal"),
    "check": ("checks", "system check"),
    "subcommand": ("operations", "subcommand"),
}


def define(app: Any, document: nodes.document) -> None:
    """Note every object of the page that has just been read."""
    page = app.env.docname
    for kind, (defining, _) in KINDS.items():
        if page != defining:
            continue
        for section in document.findall(nodes.section):
            name = _code_of(section.next_node(nodes.title))
            if name is not None:
                section["ids"].append(f"{kind}-{name.lower()}")
                app.env.get_domain("std").note_object(kind, name, section["ids"][0], location=section)


def _code_of(title: nodes.title | None) -> str | None:
    """The text of a heading that is nothing but code."""
    if title is None or len(title.children) != 1 or not isinstance(title.children[0], nodes.literal):
        return None
    return title.astext()


def setup(app: Any) -> dict[str, bool]:
    for kind, (_, called) in KINDS.items():
        app.add_object_type(kind, kind, objname=called)
    app.connect("doctree-read", define)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

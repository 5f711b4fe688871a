"""llms.txt: every page in one line, made when the docs are built, beside index.html.

The line is the first sentence of the page; the link leads to its source, which is Markdown.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

INDEX = "index"


def line_of(text: str) -> tuple[str, str]:
    """The title of a page, and its first sentence, without markup. Raises: ValueError for a page that has none."""
    found = re.match(r"# (.+)\n\n(?!#|```|\|)(.+)", text)
    if found is None:
        raise ValueError("a page begins with its title and a paragraph")
    sentence = re.match(r".+?\.(?=\s|$)", found[2])
    return _plain(found[1]), _plain(sentence[0] if sentence else found[2]).rstrip(".") + "."


def text(pages: dict[str, str]) -> str:
    """The file, of name -> source in the order of the table of contents."""
    title, about = line_of(pages[INDEX])
    lines = [f"# {title}", "", f"> {about}", "", "## Docs", ""]
    for name, source in pages.items():
        if name != INDEX:
            title, sentence = line_of(source)
            lines.append(f"- [{title}](_sources/{name}.md.txt): {sentence}")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    return re.sub(r"\{\w+\}(?=`)", "", text).replace("**", "")


def write(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    order = [INDEX, *(page for pages in _contents(app.env) for page in pages)]
    source = Path(app.srcdir)
    pages = {name: (source / f"{name}.md").read_text() for name in order}
    (Path(app.outdir) / "llms.txt").write_text(text(pages))


def _contents(env: Any) -> list[list[str]]:
    """The pages of each table of contents."""
    from sphinx import addnodes

    found = env.get_doctree(INDEX).findall(addnodes.toctree)
    return [[page for _, page in toctree["entries"] if page] for toctree in found]


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

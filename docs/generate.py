"""Writes anew the parts of the pages that are made from the table of policy fields: `make schema`.

They stand between two marks; what is around them is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "policies.md"
BEGIN = "<!-- made from the table of fields: make schema -->"
END = "<!-- end of what is made -->"


def fields() -> str:
    """A heading, the default and the description of each field."""
    from django_concurrency_mw.fields import FIELDS

    parts = []
    for name, row in FIELDS.items():
        facts = ["required" if row.required else f"default: {_default(row.default)}"]
        if not row.decorator:
            facts.append("not for a decorator")
        parts.append(f"### `{name}`\n\n*{'; '.join(facts)}*\n\n{row.doc}")
    return "\n\n".join(parts)


def _default(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def written(page: str) -> str:
    """The page with its generated part made anew."""
    made, count = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n\n{fields()}\n\n{END}", page, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE.name}: the marks are not there once each")
    return made


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(written(PAGE.read_text()))

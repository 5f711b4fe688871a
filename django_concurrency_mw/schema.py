"""The JSON Schema of a policy file, made from the table of fields, for editors.

It knows less than `loader`: nothing about names that two places have to share, and nothing about the YAML around the data.
The wheel has it as `policies.schema.json`; `python -m django_concurrency_mw.schema` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .fields import FIELDS, NOT_IN_SHADOW, POLICY_NAME, Field

#: Newer drafts are not read by every editor.
DRAFT = "http://json-schema.org/draft-07/schema#"
Schema = dict[str, Any]
_SHADOW: Schema = {"const": False}


def policy_file() -> Schema:
    """The whole of it."""
    fields = {name: _field(row) for name, row in FIELDS.items()}
    required = [name for name, row in FIELDS.items() if row.required]
    return {
        "$schema": DRAFT,
        "title": "Policies of django_concurrency_mw",
        "description": "Limits how many requests are in flight at once for each key.",
        "type": "object",
        "properties": {
            "version": {"const": 1, "description": "Of this format; optional."},
            "defaults": {"$ref": "#/definitions/fields", "description": "For the policies of this file."},
            "policies": {
                "type": "object",
                "description": "Policy name to policy. All that match a request apply.",
                "propertyNames": {"pattern": f"^{POLICY_NAME.pattern}$"},
                "additionalProperties": {"$ref": "#/definitions/fields"},
            },
        },
        "patternProperties": {"^x-": {"description": "Yours: a home for YAML anchors."}},
        "additionalProperties": False,
        "required": ["policies"],
        "allOf": [*map(_needed, required), *_shadow_by_default()],
        "definitions": {
            "fields": {
                "type": "object",
                "properties": fields,
                "additionalProperties": False,
                "allOf": [
                    {"if": _given("block", _SHADOW), "then": {"not": _given(name, row.schema)}}
                    for name, row in NOT_IN_SHADOW.items()
                ],
            }
        },
    }


def text() -> str:
    """As the file has it."""
    return json.dumps(policy_file(), indent=2, ensure_ascii=False) + "\n"


def _field(row: Field) -> Schema:
    schema: Schema = {"description": row.doc.replace("`", ""), "markdownDescription": row.doc, **row.schema}
    if row.default is not None and row.default != ():
        schema["default"] = row.default
    return schema


def _given(name: str, value: Mapping[str, Any] | None = None) -> Schema:
    """A mapping that has this field, and with such a value."""
    having: Schema = {"required": [name]}
    return having if value is None else {**having, "properties": {name: value}}


def _by_default(condition: Schema) -> Schema:
    return {"required": ["defaults"], "properties": {"defaults": condition}}


def _each_policy(condition: Schema) -> Schema:
    return {"properties": {"policies": {"additionalProperties": condition}}}


def _needed(name: str) -> Schema:
    """A field that every policy has to give, where the defaults do not."""
    return {"if": {"not": _by_default(_given(name))}, "then": _each_policy(_given(name))}


def _shadow_by_default() -> list[Schema]:
    """The contradictions to the shadow mode, between the defaults and a policy that does not say otherwise."""
    found: list[Schema] = []
    for name, row in NOT_IN_SHADOW.items():
        for field, value, other, refused in (
            ("block", _SHADOW, name, row.schema),
            (name, row.schema, "block", _SHADOW),
        ):
            # Who gives `other` so, without giving `field` itself, inherits what contradicts it.
            policy = {"if": {"not": _given(field)}, "then": {"not": _given(other, refused)}}
            found.append({"if": _by_default(_given(field, value)), "then": _each_policy(policy)})
    return found


if __name__ == "__main__":
    print(text(), end="")

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


def policy_file() -> Schema:
    """The whole of it. Fields that are not carried out yet are not in it, and so are refused as unknown ones are."""
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
                "allOf": [_never_beside("block", [False], name, values) for name, values in _not_in_shadow().items()],
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


def _given(name: str, values: list[Any] | None = None) -> Schema:
    """A mapping that has this field, and with one of these values."""
    having: Schema = {"required": [name]}
    return having if values is None else {**having, "properties": {name: {"enum": values}}}


def _by_default(condition: Schema) -> Schema:
    return {"required": ["defaults"], "properties": {"defaults": condition}}


def _each_policy(condition: Schema) -> Schema:
    return {"properties": {"policies": {"additionalProperties": condition}}}


def _needed(name: str) -> Schema:
    """A field that every policy has to give, where the defaults do not."""
    return {"if": {"not": _by_default(_given(name))}, "then": _each_policy(_given(name))}


def _not_in_shadow() -> Mapping[str, list[Any]]:
    """Field -> the values that contradict `block: false`."""
    return {
        name: [value for value in FIELDS[name].schema["enum"] if refused(value)]
        for name, refused in NOT_IN_SHADOW.items()
        if name != "wait"
    }


def _never_beside(name: str, values: list[Any], other: str, refused: list[Any]) -> Schema:
    return {"if": _given(name, values), "then": {"not": _given(other, refused)}}


def _shadow_by_default() -> list[Schema]:
    """The same contradictions between the defaults and a policy that does not say otherwise."""
    found: list[Schema] = []
    for name, refused in _not_in_shadow().items():
        for field, values, other, others in (("block", [False], name, refused), (name, refused, "block", [False])):
            # Who gives `other` so, without giving `field` itself, inherits what contradicts it.
            policy = {"if": {"not": _given(field)}, "then": {"not": _given(other, others)}}
            found.append({"if": _by_default(_given(field, values)), "then": _each_policy(policy)})
    return found


if __name__ == "__main__":
    print(text(), end="")

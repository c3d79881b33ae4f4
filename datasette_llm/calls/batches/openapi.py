"""JSON schemas in the words of OpenAPI 3.0, for interfaces that read no others."""

from __future__ import annotations

from typing import Any

_KEPT = frozenset(
    {
        "type", "format", "title", "description", "nullable", "enum", "maxItems", "minItems", "properties",
        "required", "minProperties", "maxProperties", "minLength", "maxLength", "pattern", "anyOf",
        "propertyOrdering", "default", "items", "minimum", "maximum",
    }
)  # fmt: skip
#: A schema that contains itself ends here.
_DEEPEST = 12


def plain_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without references, lists of types and what OpenAPI does not have."""
    definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
    found = _plain(schema, definitions, 0)
    return found if isinstance(found, dict) else {}


def _plain(schema: Any, definitions: dict[str, Any], depth: int) -> Any:
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return {} if isinstance(schema, dict) else schema
    reference = schema.get("$ref")
    if isinstance(reference, str):
        schema = {**definitions.get(reference.rpartition("/")[2], {}), **schema}
    plain = {name: value for name, value in schema.items() if name in _KEPT}
    if "const" in schema:
        plain["enum"] = [schema["const"]]
    if "oneOf" in schema:
        plain["anyOf"] = schema["oneOf"]
    kinds = plain.get("type")
    if isinstance(kinds, list):
        others = [kind for kind in kinds if kind != "null"]
        plain["nullable"] = len(others) < len(kinds)
        plain.pop("type")
        if len(others) == 1:
            plain["type"] = others[0]
        else:
            plain["anyOf"] = [{"type": kind} for kind in others]
    if isinstance(plain.get("properties"), dict):
        plain["properties"] = {
            name: _plain(inner, definitions, depth + 1) for name, inner in plain["properties"].items()
        }
    if "items" in plain:
        plain["items"] = _plain(plain["items"], definitions, depth + 1)
    if isinstance(plain.get("anyOf"), list):
        choices = [_plain(inner, definitions, depth + 1) for inner in plain["anyOf"]]
        others = [choice for choice in choices if choice.get("type") != "null"]
        if len(others) < len(choices):
            plain["nullable"] = True
        if len(others) == 1:
            plain.pop("anyOf")
            plain = {**others[0], **plain}
        else:
            plain["anyOf"] = others
    return plain

"""JSON schemas: what an answer has to be, checked by a pydantic model made from the schema.

llm hands a schema to the provider, and providers differ in how much of it they enforce. So the
answer is checked here too, strictly: "5" is no integer. Keywords that are not known here are left to
the provider.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import llm
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, create_model

from ..errors import EnrichInputError, RowError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_STRICT: dict[str, Any] = {"string": str, "integer": int}
_BOUNDS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "minLength": "min_length",
    "maxLength": "max_length",
    "minItems": "min_length",
    "maxItems": "max_length",
    "pattern": "pattern",
}
# JSON schema's patterns may look ahead, which pydantic's default engine cannot.
_CONFIG = ConfigDict(strict=True, extra="ignore", regex_engine="python-re")
_FENCE = re.compile(r"^```[a-zA-Z]*\s*\n(.*)\n```$", re.DOTALL)


def read_schema(schema: str | Mapping[str, Any] | type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of an object, from llm's concise syntax, JSON text, a dict or a model.

    Raises:
        EnrichInputError: it is none of these, or it describes something without properties.
    """
    if isinstance(schema, type):
        parsed: Any = schema.model_json_schema()
    elif isinstance(schema, str) and schema.lstrip().startswith(("{", "[")):
        try:
            parsed = json.loads(schema)
        except ValueError as error:
            raise EnrichInputError(f"The schema is not valid JSON: {error}") from None
    elif isinstance(schema, str):
        try:
            parsed = llm.schema_dsl(schema)
        except ValueError as error:
            raise EnrichInputError(f"The schema is not valid: {error}") from None
    else:
        parsed = dict(schema)
    properties = parsed.get("properties") if isinstance(parsed, dict) else None
    if not isinstance(properties, dict) or not properties:
        raise EnrichInputError(
            "The schema must describe an object with properties, one column each: "
            "'name, age int, bio: one sentence' or JSON schema"
        )
    return dict(parsed)


class AnswerCheck:
    """Checks answers against one schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        try:
            self._model = self._object(dict(schema), "Answer")
        except EnrichInputError:
            raise
        except Exception as error:
            raise EnrichInputError(f"The schema cannot be used: {error}") from error

    def parse(self, text: str) -> dict[str, Any]:
        """Return the answer as a dict of its properties.

        Raises:
            RowError: it is no JSON, or it does not fit the schema.
        """
        stripped = text.strip()
        fenced = _FENCE.match(stripped)
        try:
            value = json.loads(fenced.group(1) if fenced else stripped)
        except ValueError:
            raise RowError(f"the answer is not JSON: {_shortened(text)}") from None
        try:
            self._model.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the answer"
            raise RowError(f"the answer does not fit the schema: {where}: {first['msg']}") from None
        return dict(value)

    def _type(self, schema: Any, name: str) -> Any:
        """Return the Python type that a part of the schema describes."""
        if not isinstance(schema, dict):
            return Any
        if "$ref" in schema:
            return self._type(self._referenced(schema["$ref"]), name)
        if "enum" in schema or "const" in schema:
            return _literal(schema.get("enum", [schema.get("const")]), name)
        for union in ("anyOf", "oneOf"):
            if schema.get(union):
                return _union(self._type(branch, name) for branch in schema[union])
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kinds, list):
            return _union(self._type({**schema, "type": kind}, name) for kind in kinds)
        return self._typed(kinds, schema, name)

    def _typed(self, kind: Any, schema: dict[str, Any], name: str) -> Any:
        bounds: dict[str, Any] = {_BOUNDS[word]: schema[word] for word in _BOUNDS if word in schema}
        if kind == "object":
            if not isinstance(schema.get("properties"), dict):
                return dict[str, Any]
            return self._object(schema, name)
        if kind == "array":
            items: Any = self._type(schema.get("items"), name + "Item")
            return Annotated[list.__class_getitem__(items), Field(strict=True, **bounds)]
        if kind == "number":
            # JSON has one kind of number: 3 is a fine answer where 3.5 would be.
            return Annotated[float, Field(strict=True, **bounds)]
        if kind == "null":
            return type(None)
        if kind == "boolean":
            return StrictBool
        if kind in _STRICT:
            return Annotated[_STRICT[kind], Field(strict=True, **bounds)]
        if kind is None:
            return Any
        raise EnrichInputError(f"The schema has a type {kind!r} that JSON schema does not have")

    def _object(self, schema: dict[str, Any], name: str) -> type[BaseModel]:
        required = set(schema.get("required", ()))
        # Fields get names of our own and the property's as alias: a property may be called anything.
        fields: dict[str, Any] = {
            f"field{number}": (
                self._type(part, f"{name}{number}"),
                Field(alias=prop) if prop in required else Field(default=None, alias=prop),
            )
            for number, (prop, part) in enumerate(schema["properties"].items())
        }
        return create_model(name, __config__=_CONFIG, **fields)

    def _referenced(self, reference: str) -> Any:
        found: Any = self._schema
        for part in reference.removeprefix("#/").split("/"):
            try:
                found = found[part]
            except (KeyError, TypeError):
                raise EnrichInputError(
                    f"The schema refers to {reference!r}, which it does not contain"
                ) from None
        return found


def _union(types: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, types)


def _literal(values: list[Any], name: str) -> Any:
    if not values or not all(value is None or isinstance(value, (str, int, bool)) for value in values):
        raise EnrichInputError(f"The schema has an enum that is empty or not of plain values ({name})")
    return Literal[tuple(values)]


def _shortened(text: str, length: int = 80) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= length else flat[:length] + "...")

"""JSON schemas: what an answer has to be, checked by a pydantic model made from the schema.

llm hands a schema to the provider, and providers differ in how much of it they enforce. So the
answer is checked here too, strictly: "5" is no integer; 7.0 is one, as JSON schema says. Keywords that
are not known here are left to the provider.

Models write more than was asked for. Of all the objects in an answer exactly one has to fit the schema;
the same object written several times is one.
"""

from __future__ import annotations

import functools
import json
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import llm
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, create_model

from ..errors import AnswerError, EnrichInputError
from .finding import NotJSON, inside, objects, whole
from .whole import beginning, spoken

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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
        self._properties = frozenset(schema["properties"])
        try:
            self._model = self._object(dict(schema), "Answer")
        except EnrichInputError:
            raise
        except Exception as error:
            raise EnrichInputError(f"The schema cannot be used: {error}") from error

    def parse(self, text: str) -> dict[str, Any]:
        """Return the one object in an answer that fits the schema, as a dict of its properties.

        Raises:
            AnswerError: no object in it fits, or several do.
        """
        found: dict[str, dict[str, Any]] = {}
        problem = ""
        try:
            for candidate in _candidates(text):
                try:
                    fitting = self._fitting(candidate)
                except ValidationError as error:
                    problem = problem or _worded(error)
                    continue
                for one in fitting:
                    found[json.dumps(one, sort_keys=True)] = one
                if len(found) > 1:
                    raise AnswerError(
                        f"more than one object in the answer fits the schema: {beginning(text)}",
                        kind="several answers",
                    )
        except NotJSON as error:
            raise AnswerError(
                f"the answer is not JSON, {error}: {beginning(text)}", kind="not JSON"
            ) from None
        except RecursionError:
            raise AnswerError(
                f"the answer is nested too deeply: {beginning(text)}", kind="not JSON"
            ) from None
        for one in found.values():
            return one
        if problem:
            raise AnswerError(
                f"the answer does not fit the schema: {problem}: {beginning(text)}",
                kind="does not fit the schema",
            )
        raise AnswerError(f"the answer is not JSON: {beginning(text)}", kind="not JSON")

    def _fitting(self, candidate: Any) -> list[dict[str, Any]]:
        """Return what fits: the candidate, or else what it wraps.

        Raises:
            ValidationError: nothing does.
        """
        try:
            checked = self._checked(candidate)
        except ValidationError:
            wrapped = self._wrapped(candidate)
            if not wrapped:
                raise
            return wrapped
        # Where no property is required, a wrapper fits too: as an answer that has no value for any.
        if self._properties.isdisjoint(checked):
            return self._wrapped(candidate) or [checked]
        return [checked]

    def _wrapped(self, candidate: Any) -> list[dict[str, Any]]:
        fitting = []
        for inner in inside(candidate) if isinstance(candidate, (dict, list)) else ():
            try:
                checked = self._checked(inner)
            except ValidationError:
                continue
            if not self._properties.isdisjoint(checked):
                fitting.append(checked)
        return fitting

    def _checked(self, candidate: Any) -> dict[str, Any]:
        return dict(_as_checked(candidate, self._model.model_validate(candidate)))

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
        if kind == "string":
            return Annotated[str, Field(strict=True, **bounds)]
        if kind == "integer":
            return Annotated[int, Field(strict=True, **bounds), BeforeValidator(_integer)]
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


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_checked(given: Any, checked: Any) -> Any:
    """Return what was given, with the integers that were written as 7.0 as the integers they are."""
    if isinstance(checked, BaseModel):
        names = {str(field.alias): name for name, field in type(checked).model_fields.items()}
        return {
            key: _as_checked(value, getattr(checked, names[key])) if key in names else value
            for key, value in given.items()
        }
    if isinstance(checked, list):
        return [_as_checked(*pair) for pair in zip(given, checked, strict=True)]
    return checked if isinstance(given, float) and type(checked) is int else given


def _candidates(text: str) -> Iterator[Any]:
    """Yield what the answer may be: all of it, or the objects that stand in it."""
    try:
        yield whole(text.strip())
    except NotJSON:
        pass
    else:
        return
    yield from objects(spoken(text))


def _worded(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the answer'}: {first['msg']}"

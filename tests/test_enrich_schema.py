"""Schemas: what is understood, and which answers fit."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from pydantic import BaseModel

from datasette_llm.enrich.answers.schema import AnswerCheck, read_schema
from datasette_llm.enrich.errors import EnrichInputError, RowError


class Animal(BaseModel):
    name: str
    legs: int | None = None


@pytest.mark.parametrize(
    ("given", "properties"),
    [
        ("name, age int: in years", {"name", "age"}),
        ("name\nage int", {"name", "age"}),
        ('{"type": "object", "properties": {"a": {}}}', {"a"}),
        ({"properties": {"a": {"type": "string"}}}, {"a"}),
        (Animal, {"name", "legs"}),
    ],
)
def test_every_way_to_write_a_schema(given: Any, properties: set[str]) -> None:
    assert set(read_schema(given)["properties"]) == properties


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(
            "name strin",
            "unknown type 'strin'",
            marks=pytest.mark.skipif(
                version("llm") in ("0.32", "0.32.1"), reason="this llm takes an unknown type for text"
            ),
        ),
        ("{", "not valid JSON"),
        ("[1]", "must describe an object"),
        ("", "must describe an object"),
        ('{"type": "string"}', "must describe an object"),
        ({"properties": {"a": {"type": "nonsense"}}}, "'nonsense'"),
        ({"properties": {"a": {"enum": []}}}, "enum"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "does not contain"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "cannot be used"),
    ],
)
def test_schemas_that_are_no_good(given: Any, message: str) -> None:
    with pytest.raises(EnrichInputError) as caught:
        AnswerCheck(read_schema(given))
    assert message in str(caught.value)


PARTS: list[tuple[Any, list[str], list[str]]] = [
    ({"type": "string"}, ['"x"'], ["1", "null"]),
    ({"type": "integer"}, ["1"], ["1.5", '"1"', "true"]),
    ({"type": "number"}, ["1", "1.5"], ['"1"', "true"]),
    ({"type": "boolean"}, ["true"], ["1", '"true"']),
    ({"type": "null"}, ["null"], ["0"]),
    ({"type": ["string", "null"]}, ['"x"', "null"], ["1"]),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"x"'], ["1.5"]),
    ({"enum": ["a", "b", None]}, ['"a"', "null"], ['"c"']),
    ({"const": "a"}, ['"a"'], ['"b"']),
    ({"type": "integer", "minimum": 1, "maximum": 5}, ["1", "5"], ["0", "6"]),
    ({"type": "string", "pattern": "^a(?=b)"}, ['"ab"'], ['"ac"']),
    ({"type": "string", "maxLength": 2}, ['"ab"'], ['"abc"']),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1}, ["[1]"], ["[]", '["a"]', "1"]),
    ({"type": "array"}, ["[]", '[1, "a"]'], ["{}"]),
    ({"type": "object"}, ['{"x": 1}'], ["[]"]),
    ({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, ['{"n": 1}'], ["{}"]),
    ({"$ref": "#/$defs/color"}, ['"red"'], ['"green"']),
    ({}, ["1", "null", "[]"], []),
    (True, ["1"], []),
]


@pytest.mark.parametrize(("part", "fitting", "others"), PARTS)
def test_answers_that_fit_and_answers_that_do_not(part: Any, fitting: list[str], others: list[str]) -> None:
    check = AnswerCheck(
        {"properties": {"odd name!": part}, "required": ["odd name!"], "$defs": {"color": {"enum": ["red"]}}}
    )
    for answer in fitting:
        assert "odd name!" in check.parse(f'{{"odd name!": {answer}, "more": 1}}')
    for answer in others:
        with pytest.raises(RowError, match="does not fit the schema: odd name!"):
            check.parse(f'{{"odd name!": {answer}}}')


def test_optional_properties_fences_and_text_that_is_no_json() -> None:
    check = AnswerCheck({"properties": {"a": {"type": "string"}, "b": {"type": "string"}}, "required": ["a"]})
    assert check.parse('```json\n{"a": "x"}\n```') == {"a": "x"}
    with pytest.raises(RowError, match="not JSON: 'Sorry"):
        check.parse("Sorry, " + "no " * 100)
    with pytest.raises(RowError, match="does not fit"):
        check.parse("[1]")

"""Prompts: what a template may be, and what each kind of mistake in it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from datasette_llm.enrich.errors import EnrichInputError, RowError
from datasette_llm.enrich.reading.template import PromptTemplate

COLUMNS = ("id", "name", "odd name", "notes", "picture", "row")
ROW: dict[str, Any] = {
    "id": 7, "name": "Ada", "odd name": "odd", "notes": None, "picture": b"text", "row": "r",
}  # fmt: skip


@pytest.mark.parametrize(
    ("source", "shown", "read"),
    [
        ("Hello", "Hello", ()),
        ("{{ name }}, {{ id }}\n", "Ada, 7\n", ("id", "name")),
        ("{{ row['odd name'] }} {{ row.name }}", "odd Ada", ("name", "odd name")),
        ("{{ row['row'] }}", "r", ("row",)),
        ("{{ name ~ notes ~ '.' }}", "Ada.", ("name", "notes")),
        ("x{{ notes|upper }}{{ notes|truncate(3) }}", "x", ("notes",)),
        ("{% if notes is none %}no notes{% endif %}", "no notes", ("notes",)),
        ("{% if notes == none %}no notes{% endif %}", "no notes", ("notes",)),
        ("{% if notes %}has{% else %}none{% endif %}", "none", ("notes",)),
        ("{{ notes or 'none' }}", "none", ("notes",)),
        ("{{ notes|default('none', true) }}", "none", ("notes",)),
        ("{{ picture }}", "text", ("picture",)),
        ("{% for key in row %}{{ key }};{% endfor %}", "id;name;odd name;notes;picture;row;", COLUMNS),
        ("{% set name = 'x' %}{{ name }}", "x", ()),
        ("{{ range(3)|join }}", "012", ()),
        ("{{ row.items()|length }}", "6", COLUMNS),
    ],
)
def test_rendering_and_the_columns_that_are_read(source: str, shown: str, read: tuple[str, ...]) -> None:
    template = PromptTemplate(source, COLUMNS)
    assert template.columns == read
    assert template.render({name: ROW[name] for name in read}) == shown


def test_the_row_as_json_is_plain_json() -> None:
    shown = PromptTemplate("{{ row|tojson }}", COLUMNS).render({**ROW, "name": "<é & 'ß'>"})
    assert json.loads(shown) == {**ROW, "name": "<é & 'ß'>", "picture": "text"}
    assert "<é & 'ß'>" in shown


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "prompt is empty"),
        ("{{ nmae }}", "'nmae', which is no column: did you mean 'name'"),
        ("{{ NAME }}", "did you mean 'name'"),
        ("{{ zzzz }}", "the columns are: 'id', 'name'"),
        ("{{ row['nmae'] }}", "did you mean 'name'"),
        ("{% if false %}{{ nmae }}{% endif %}", "no column"),
        ("{{ name", "line 1"),
        ("{% for %}", "line 1"),
        ("a\n{{ name|nofilter }}", "line 2: No filter named 'nofilter'"),
        ("{{ name is nosuchtest }}", "No test named"),
        ("{% include 'x' %}", "cannot read other templates"),
        ("{% import 'x' as y %}", "cannot read other templates"),
        ("{% extends 'x' %}", "cannot read other templates"),
        ("{{ name.__class__.__mro__ }}", "outside of the template sandbox"),
        ("{{ name['__class__'] }}", "outside of the template sandbox"),
        ("{{ name|attr('__class__') }}", "outside of the template sandbox"),
        ("{{ [name]|map(attribute='__class__')|list }}", "outside of the template sandbox"),
        ("{% if false %}{{ ''.__class__ }}{% endif %}", "outside of the template sandbox"),
        ("{{ lipsum }}", "no column"),
    ],
)
def test_mistakes_in_the_source_are_found_before_any_row(source: str, message: str) -> None:
    with pytest.raises(EnrichInputError) as caught:
        PromptTemplate(source, COLUMNS)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '{0.__class__}'.format(name) }}",
        "{{ name|attr('_' ~ '_class__') }}",
        "{{ name['__cl' ~ 'ass__'] }}",
        "{{ row.update({'x': 1}) }}",
    ],
)
def test_leaving_the_sandbox_while_rendering_is_the_jobs_error(source: str) -> None:
    template = PromptTemplate(source, COLUMNS)
    with pytest.raises((EnrichInputError, RowError), match=r"sandbox|cannot be rendered"):
        template.render(ROW)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ name + 1 }}", "TypeError"),
        ("{{ name.nothing }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_what_fails_on_one_row_is_that_rows_error(source: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        PromptTemplate(source, COLUMNS).render(ROW)


def test_a_prompt_of_nothing_but_white_space_is_empty() -> None:
    assert PromptTemplate("{{ notes }}", COLUMNS).render(ROW) == ""
    assert PromptTemplate(" {{ notes }}\n", COLUMNS).render({"notes": " \t"}) == ""


def test_a_blob_that_is_not_text_is_that_rows_error() -> None:
    with pytest.raises(RowError, match="blob that is not text"):
        PromptTemplate("{{ picture }}", COLUMNS).render({"picture": b"\xff"})

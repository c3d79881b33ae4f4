"""Bulk enrichment in datasette-enrichments' page: what it offers, to whom, and what it refuses at once."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import pytest
from datasette.plugins import pm

from ..fakes import FakeModel, registered
from ..hooks import hooked
from .enriching import ANA, Site, register

pytest.importorskip("datasette_enrichments", reason="datasette-enrichments is not installed")

from datasette_llm.enrich.reading.template import PromptTemplate
from datasette_llm.pages.columns import column_reference
from datasette_llm.pages.enrichments import versions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock

TABLE = "create table words (id integer primary key, word text, length integer, odd as (length % 2))"
ROWS = (TABLE, "insert into words (word, length) values ('one', 3), ('two', 3), ('three', 5)")
PICKER = "/-/enrich/data/words"
PAGE = "/-/enrich/data/words/prompt-rows"
FORM = {"model": "fake", "prompt": "Say {{ word }}", "column": "said"}

ALL = {"enrichments": {"id": "ana"}, "update-row": {"id": "ana"}, "alter-table": {"id": "ana"}}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


class Plain(FakeModel):
    supports_schema = False


@pytest.fixture(autouse=True)
def model() -> Iterator[FakeModel]:
    register()
    others = (FakeModel(model_id="second"), FakeModel(model_id="secret"), Plain(model_id="plain"))
    with registered(fake := FakeModel(), *others):
        yield fake


def errors_of(page: Any) -> list[str]:
    assert page.status_code == 200
    form = page.text.split('<div class="config-form">')[1]
    return [html.unescape(part.split("</li>")[0]) for part in form.split("<li>")[1:]]


class TestForm:
    async def test_the_picker_and_the_page_offer_it(self, tmp_path: Path) -> None:
        site = Site(tmp_path, *ROWS)
        picker = await site.get(PICKER + "?length=3")
        assert PAGE + "?length=3" in picker.text
        page = await site.get(PAGE + "?length=3")
        assert page.status_code == 200
        assert "2 rows selected" in page.text
        for name in ("word", "length", "odd"):
            assert f"<code>{{{{ {name} }}}}</code>" in page.text

    async def test_the_models_are_those_of_the_visitor_for_the_purpose(self, tmp_path: Path) -> None:
        asked: list[tuple[Any, Any]] = []

        def without_secret(models: Any, actor: Any, purpose: Any) -> list[Any]:
            asked.append((actor and actor["id"], purpose))
            return [model for model in models if model.model_id != "secret"]

        settings = {"purposes": {"enrichments": {"model": "second"}}, "models": ["fake", "second", "secret"]}
        with hooked(llm_filter_models=without_secret):
            page = await Site(tmp_path, *ROWS, settings=settings).get(PAGE)
        offered = [part.split('"')[1] for part in page.text.split("<option value=")[1:]]
        assert offered == ["second", "fake"]
        assert set(asked) == {("ana", "enrichments")}

    @pytest.mark.parametrize(
        "name",
        [
            "word",
            "odd name",
            'a "quote"',
            "back\\slash",
            "ünïcode",
            "row",
            "none",
            "in",
            "loop",
            "1st",
            "a-b",
            "}}",
            "{%",
            "true",
            "class",
            "range",
            "not",
            "it's",
        ],
    )
    def test_suggested_references_read_the_column(self, name: str) -> None:
        template = PromptTemplate(column_reference(name), [name, "other"])
        assert template.render({name: "its value", "other": "wrong"}) == "its value"

    async def test_beside_the_other_enrichment_for_language_models(self, tmp_path: Path) -> None:
        other = pytest.importorskip("datasette_enrichments_llm", reason="not installed")
        pm.register(other)
        page = await Site(tmp_path, *ROWS).get(PICKER)
        assert f'"{PICKER}/llm"' in page.text
        assert f'"{PAGE}"' in page.text

    async def test_without_any_model_it_says_so(self, tmp_path: Path) -> None:
        site = Site(tmp_path, *ROWS, settings={"models": [], "default_model": None})
        page = await site.get(PAGE)
        assert page.status_code == 200
        (error,) = errors_of(await site.post(PAGE, {**FORM, "model": ""}))
        assert "There is no model that you may use here" in error


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ({"prompt": "Say {{ wrd }}"}, "'wrd', which is no column: did you mean 'word'?"),
            ({"prompt": "Say {{ word"}, "The prompt is no valid template, line 1"),
            ({"prompt": "{{ word.__class__ }}"}, "outside of the template sandbox"),
            ({"prompt": "{% include 'x' %}"}, "cannot read other templates"),
            ({"prompt": ""}, "Write what to ask about each row."),
            ({"prompt": "   "}, "Write what to ask about each row."),
            ({"column": ""}, "Say which column the answers go to"),
            ({"column": "id"}, "part of the primary key"),
            ({"column": "odd"}, "generated column"),
            ({"column": "rowid"}, "would hide the key"),
            ({"schema": "{not json"}, "The schema is not valid JSON"),
            ({"schema": "{not json", "column": ""}, "The schema is not valid JSON"),
            ({"schema": '{"type": "string"}'}, "must describe an object with properties"),
            ({"schema": "said, age int"}, "share the column 'said'"),
            ({"schema": "length: how long", "column": ""}, "The column 'length' is integer"),
            ({"schema": '{"properties": {"a": {"$ref": "#/x"}}}'}, "refers to '#/x'"),
            ({"model": "nope"}, "The model 'nope' is not available. Choose one of the list."),
            ({"model": "plain", "schema": "name"}, "'plain' does not support schemas"),
        ],
    )
    async def test_wrong_input_stands_beside_its_field(
        self, fields: dict[str, str], error: str, tmp_path: Path, model: FakeModel
    ) -> None:
        site = Site(tmp_path, *ROWS)
        errors = errors_of(await site.post(PAGE, {**FORM, **fields}))
        assert error.lower() in " ".join(errors).lower()
        assert len(errors) == 1
        assert site.jobs() == 0
        assert site.run("select name from pragma_table_info('words')")[-1] == ("length",)
        assert model.prompts == []

    async def test_what_was_written_is_still_there(self, tmp_path: Path) -> None:
        page = await Site(tmp_path, *ROWS).post(PAGE, {**FORM, "prompt": "<b>{{ wrd }}", "overwrite": "y"})
        assert "&lt;b&gt;{{ wrd }}</textarea>" in page.text
        assert "checked" in page.text
        assert 'value="said"' in page.text

    async def test_all_errors_at_once(self, tmp_path: Path) -> None:
        wrong = {"model": "x", "prompt": "{{ x }}", "column": "id", "schema": "{"}
        page = await Site(tmp_path, *ROWS).post(PAGE, wrong)
        assert len(errors_of(page)) == 4

    async def test_leaving_the_sandbox_shows_with_the_first_row(self, tmp_path: Path) -> None:
        site = Site(tmp_path, *ROWS)
        refused = await site.post(PAGE, {**FORM, "prompt": "{{ word|attr('_' ~ '_class_' ~ '_') }}"})
        assert refused.status_code == 400
        assert "tries to leave the template sandbox" in refused.text
        assert site.jobs() == 0

    async def test_a_view_cannot_be_written(self, tmp_path: Path) -> None:
        site = Site(tmp_path, *ROWS, "create view shown as select * from words")
        refused = await site.get("/-/enrich/data/shown/prompt-rows")
        assert refused.status_code == 400
        assert "is a view" in refused.text


class TestPermissions:
    @pytest.mark.parametrize("missing", ["enrichments", "update-row"])
    async def test_both_are_needed_to_see_and_to_start_it(
        self, missing: str, tmp_path: Path, model: FakeModel
    ) -> None:
        bob = {"id": "bob"}
        given = {name: {"id": ["ana", "bob"]} for name in ALL if name != missing}
        site = Site(tmp_path, *ROWS, permissions={**ALL, **given})
        assert PAGE in (await site.get(PICKER)).text
        for actor in (bob, None):
            assert PAGE not in (await site.get(PICKER, actor)).text
            assert (await site.get(PAGE, actor)).status_code == 403
            assert (await site.post(PAGE, FORM, actor)).status_code == 403
        assert site.jobs() == 0
        assert model.prompts == []

    @pytest.mark.parametrize("missing", ["enrichments", "update-row"])
    async def test_both_are_needed_for_a_job(self, missing: str, tmp_path: Path) -> None:
        given = {name: {"id": ["ana", "bob"]} for name in ALL if name != missing}
        site = Site(tmp_path, *ROWS, permissions={**ALL, **given})
        await site.post(PAGE, FORM)
        before = await site.ended()
        for actor in ({"id": "bob"}, None):
            assert (await site.get("/-/enrich/data/-/jobs/1", actor)).status_code == 403
            for action in ("pause", "resume", "cancel"):
                refused = await site.post(f"/-/enrich/data/-/jobs/1/{action}", actor=actor)
                assert refused.status_code == 403
        assert site.job(1) == before
        assert (await site.get("/-/enrich/data/-/jobs/1")).status_code == 200

    async def test_adding_a_column_takes_its_own(self, tmp_path: Path) -> None:
        without = {name: who for name, who in ALL.items() if name != "alter-table"}
        site = Site(tmp_path, *ROWS, permissions=without)
        assert "may not add columns" in (await site.get(PAGE)).text
        (error,) = errors_of(await site.post(PAGE, FORM))
        assert error == "You may not add the column 'said' to this table."
        (error,) = errors_of(await site.post(PAGE, {**FORM, "column": "word", "schema": "mood"}))
        assert error == "You may not add the column 'mood' to this table."
        started = await site.post(PAGE, {**FORM, "column": "word", "overwrite": "y"})
        assert started.status_code == 302
        await site.ended()
        assert site.run("select word from words") == [("Say one",), ("Say two",), ("Say three",)]

    async def test_on_a_single_table(self, tmp_path: Path) -> None:
        """Permissions given for one table do not reach to its neighbour."""
        site = Site(tmp_path, *ROWS, "create table other (id integer primary key)", permissions={})
        site.datasette.config["databases"] = {
            "data": {
                "permissions": {"enrichments": {"id": "ana"}},
                "tables": {"words": {"permissions": {"update-row": {"id": "ana"}}}},
            }
        }
        assert (await site.get(PAGE)).status_code == 200
        assert (await site.get("/-/enrich/data/other/prompt-rows")).status_code == 403
        assert "prompt-rows" not in (await site.get("/-/enrich/data/other")).text

    async def test_a_job_that_never_was(self, tmp_path: Path) -> None:
        site = Site(tmp_path, *ROWS)
        for actor, status in ((ANA, 404), (None, 403)):
            assert (await site.get("/-/enrich/data/-/jobs/1", actor)).status_code == status

    async def test_jobs_of_others_are_not_our_business(self, tmp_path: Path) -> None:
        site = Site(tmp_path, *ROWS)
        await site.post(PAGE, FORM)
        await site.ended()
        site.run("update _enrichment_jobs set enrichment = 'another', status = 'running'")
        paused = await site.post("/-/enrich/data/-/jobs/1/pause", actor=ANA)
        assert paused.status_code == 302
        assert site.job(1)["status"] == "paused"


async def test_nothing_of_it_where_datasette_enrichments_is_not_loaded(tmp_path: Path) -> None:
    import datasette_enrichments

    pm.unregister(datasette_enrichments)
    try:
        assert (await Site(tmp_path, *ROWS).get(PAGE)).status_code == 404
    finally:
        pm.register(datasette_enrichments)


async def test_a_version_that_cannot_work_says_how_to_get_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.5.1")
    site = Site(tmp_path, "create table t (body)")
    for path in ("/-/enrich/data/t", "/-/enrich/data/t/prompt-rows", "/-/enrich/data/-/jobs/1"):
        page = await site.get(path)
        assert page.status_code == 501
        assert "datasette-enrichments 0.5.1 does not work with Datasette 1.0" in page.text
        assert "datasette install" in page.text
    for installed in ("0.6a0", "0.6", "1.0a1", "0.10"):
        monkeypatch.setattr(versions, "version", lambda name, installed=installed: installed)
        assert versions.outdated() is None

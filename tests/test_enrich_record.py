"""What a job records, and what that saves: questions asked once, answers without a value, stale rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

from datasette_llm.enrich import EnrichInputError

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

pytestmark = pytest.mark.real_clock

COLOURS = ("red", "green", "blue")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(tmp_path, "create table t (id integer primary key, body text)")
    file.run_many("insert into t (body) values (?)", [(COLOURS[n % 3],) for n in range(60)])
    yield file
    file.close()


def answers(file: TableFile) -> list[tuple[Any, ...]]:
    return file.run("select answer, count(*) from t group by answer order by 2 desc, 1")


def runs(file: TableFile) -> list[tuple[Any, ...]]:
    return file.run("select written, reused, no_value, failed, outcome from _llm_runs order by id")


async def said(prompt: str) -> AsyncGenerator[str, None]:
    await anyio.lowlevel.checkpoint()
    yield f"<{prompt}>"


async def test_identical_questions_are_asked_once(file: TableFile) -> None:
    with fake_model(said) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=7)
    assert sorted(model.prompts) == sorted(COLOURS)
    assert answers(file) == [("<blue>", 20), ("<green>", 20), ("<red>", 20)]
    assert (report.written, report.reused, report.remaining) == (60, 57, None)
    assert "57 rows asked what another row had asked: 57 prompts" in report.summary()
    assert runs(file) == [(60, 57, 0, 0, "done")]
    assert file.run("select count(*), count(distinct question) from _llm_answers") == [(60, 3)]


async def test_an_earlier_run_has_the_answer_already(file: TableFile) -> None:
    with fake_model(said) as model:
        await file.enrich("t", "{{ body }}", column="answer", limit=3)
        file.run("update t set answer = 'corrected by hand' where id = 1")
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert len(model.prompts) == 3
    assert answers(file) == [("<blue>", 20), ("<green>", 20), ("corrected by hand", 20)]
    assert (report.written, report.reused) == (57, 57)


async def test_a_value_that_was_taken_away_is_asked_for_again(file: TableFile) -> None:
    with fake_model(said) as model:
        await file.enrich("t", "{{ body }}", column="answer")
        file.run("update t set answer = null")
        await file.enrich("t", "{{ body }}", column="answer")
    assert len(model.prompts) == 6


@pytest.mark.parametrize("keywords", [{"reuse": False}, {"overwrite": True}])
async def test_whoever_wants_new_answers_gets_them(file: TableFile, keywords: dict[str, Any]) -> None:
    with fake_model(said) as model:
        await file.enrich("t", "{{ body }}", column="answer")
        file.run("update t set answer = null where id > 30")
        model.prompts.clear()
        await file.enrich("t", "{{ body }}", column="answer", **keywords)
    # Without reuse each of the 30 rows; to overwrite, each question once.
    assert len(model.prompts) == (30 if "reuse" in keywords else 3)


async def test_another_column_or_model_or_option_is_another_question(file: TableFile) -> None:
    with fake_model(said) as model:
        await file.enrich("t", "{{ body }}", column="answer", limit=3)
        await file.enrich("t", "{{ body }}", column="other", limit=3)
        await file.enrich("t", "{{ body }}", column="answer", limit=3, system="Shout")
        assert len(model.prompts) == 9
        await file.enrich("t", "{{ body }}", column="answer", model="second")
    assert len(model.prompts) == 9


async def test_a_failure_is_shared_by_the_rows_that_waited_for_it(file: TableFile) -> None:
    read = anyio.Event()

    async def refuse_red(prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "blue":
            read.set()
        elif prompt == "red":
            await read.wait()
            await anyio.wait_all_tasks_blocked()
        yield "" if prompt == "red" else prompt

    with fake_model(refuse_red) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=3)
        assert (report.written, report.failed) == (40, 20)
        assert [(each.kind, each.count) for each in report.failures] == [("empty", 20)]
        assert model.prompts.count("red") < 20
        model.prompts.clear()
        again = await file.enrich("t", "{{ body }} again", column="answer", retry_failed=True)
    assert (again.written, model.prompts) == (20, ["red again"])


async def test_no_value_is_an_answer_where_the_schema_allows_it(file: TableFile) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"type": ["string", "null"]}},
        "required": ["mood"],
    }

    async def only_red(prompt: str) -> AsyncGenerator[str, None]:
        yield json.dumps({"mood": "angry" if prompt == "red" else None})

    with fake_model(only_red) as model:
        report = await file.enrich("t", "{{ body }}", schema=schema)
        assert (report.written, report.failed, report.no_value, report.stopped) == (60, 0, 40, None)
        assert "40 rows answered with no value" in report.summary()
        asked = len(model.prompts)
        again = await file.enrich("t", "{{ body }}", schema=schema)
        assert (again.written, len(model.prompts)) == (0, asked), "nobody pays for it again"
        limited = await file.enrich("t", "{{ body }}", schema=schema, dry_run=True)
        assert limited.total == 0
    assert file.run("select mood, count(*) from t group by mood order by 1") == [(None, 40), ("angry", 20)]


async def test_an_answer_without_any_of_the_columns_is_no_answer(file: TableFile) -> None:
    schema = {"type": "object", "properties": {"mood": {"type": ["string", "null"]}}}

    async def nothing(prompt: str) -> AsyncGenerator[str, None]:
        yield "{}"

    with fake_model(nothing):
        report = await file.enrich("t", "{{ body }}", schema=schema, limit=3)
    assert (report.written, report.failed) == (0, 3)


async def test_stale_rows_are_those_whose_question_would_be_another(file: TableFile) -> None:
    with fake_model(said) as model:
        await file.enrich("t", "{{ body }}", column="answer")
        file.run("update t set body = 'violet' where id <= 5")
        file.run("insert into t (body) values ('not asked yet')")
        model.prompts.clear()
        counted = await file.enrich("t", "{{ body }}", column="answer", stale=True, dry_run=True)
        assert (counted.total, model.prompts) == (5, [])
        report = await file.enrich("t", "{{ body }}", column="answer", stale=True)
        assert (report.written, model.prompts) == (5, ["violet"])
        again = await file.enrich("t", "{{ body }}", column="answer", stale=True)
        assert (again.written, model.prompts) == (0, ["violet"])
        edited = await file.enrich("t", "Say {{ body }}", column="answer", stale=True, dry_run=True)
        assert edited.total == 60
    assert file.run("select count(*) from t where answer = '<violet>'") == [(5,)]
    assert file.run("select answer from t where id = 61") == [(None,)]


async def test_a_value_of_unknown_origin_is_never_stale(file: TableFile) -> None:
    with fake_model(said):
        await file.enrich("t", "{{ body }}", column="answer", limit=3)
        file.run("update t set answer = 'typed' where answer is null")
        report = await file.enrich("t", "Other {{ body }}", column="answer", stale=True)
    assert report.written == 3
    assert file.run("select count(*) from t where answer = 'typed'") == [(57,)]


async def test_a_schema_that_grew_makes_its_column_and_says_who_waits_for_it(file: TableFile) -> None:
    def answering(*names: str) -> Any:
        async def answer(prompt: str) -> AsyncGenerator[str, None]:
            yield json.dumps(dict.fromkeys(names, prompt))

        return answer

    with fake_model(answering("mood", "tone")):
        await file.enrich("t", "{{ body }}", schema="mood, tone")
    with fake_model(answering("mood", "tone", "reason")) as model:
        report = await file.enrich("t", "{{ body }}", schema="mood, tone, reason")
        assert (report.written, report.incomplete, report.incomplete_columns) == (0, 60, ("reason",))
        assert "60 rows have values of an earlier schema and no reason yet: --stale" in report.summary()
        assert model.prompts == []
        grown = await file.enrich("t", "{{ body }}", schema="mood, tone, reason", stale=True)
        assert (grown.written, grown.incomplete, len(model.prompts)) == (60, 0, 3)
        done = await file.enrich("t", "{{ body }}", schema="mood, tone, reason")
    assert (done.incomplete, done.incomplete_columns) == (0, ())
    assert file.run("select count(*) from t where reason is null") == [(0,)]


async def test_rows_of_an_earlier_schema_are_told_of_until_they_are_asked_again(file: TableFile) -> None:
    schema = {"type": "object", "properties": {"mood": {"type": ["string", "null"]}}}

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        yield json.dumps({"mood": None if prompt == "red" else prompt, "reason": prompt})

    async def told(**keywords: Any) -> tuple[int, tuple[str, ...]]:
        report = await file.enrich("t", "{{ body }}", schema=grown, **keywords)
        assert ("--stale asks again" in report.summary()) == bool(report.incomplete)
        return report.incomplete, report.incomplete_columns

    with fake_model(answer):
        await file.enrich("t", "{{ body }}", schema=schema, where="id <= 30")
        file.run("update t set mood = 'typed' where id = 60")
        grown = {**schema, "properties": {**schema["properties"], "reason": {"type": "string"}}}  # type: ignore[dict-item]
        assert await told(dry_run=True, where="id < 4") == (3, ("reason",)), "one of them has no value"
        assert await told(dry_run=True) == (30, ("reason",))
        assert await told(limit=1) == (30, ("reason",)), "what is new was asked with the schema of now"
        await file.enrich("t", "{{ body }}", schema=grown, stale=True, limit=10)
        assert await told() == (20, ("reason",)), "though the column is there by now"
        assert await told(record=False) == (0, ())


async def test_what_is_written_without_a_record_leaves_none_of_what_it_replaces(file: TableFile) -> None:
    with fake_model(said):
        await file.enrich("t", "{{ body }}", column="answer")
        await file.enrich("t", "New {{ body }}", column="answer", overwrite=True, record=False, limit=20)
        assert file.run("select count(*), min(pk) from _llm_answers") == [(40, 21)]
        stale = await file.enrich("t", "{{ body }}", column="answer", stale=True, dry_run=True)
    assert stale.total == 0, "of what is not on record nobody knows"


async def test_a_table_made_anew_has_no_answers_of_the_old_one(file: TableFile) -> None:
    schema = {"type": "object", "properties": {"mood": {"type": ["string", "null"]}}}

    async def none(prompt: str) -> AsyncGenerator[str, None]:
        yield json.dumps({"mood": None})

    with fake_model(none) as model:
        await file.enrich("t", "{{ body }}", schema=schema)
        file.run("drop table t")
        file.run("create table t (id integer primary key, body text)")
        file.run("insert into t (body) values ('brown'), ('pink')")
        report = await file.enrich("t", "{{ body }}", schema=schema)
    assert (report.written, report.no_value, model.prompts[3:]) == (2, 2, ["brown", "pink"])


async def test_without_a_record_nothing_is_recorded_and_nothing_can_be_stale(file: TableFile) -> None:
    with fake_model(said) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", record=False)
        assert (report.run, len(model.prompts)) == (None, 3), "in one run they are still asked once"
        for keywords, words in (
            ({"record": False}, "--no-record"),
            ({}, "on record"),
            ({"overwrite": True}, "--overwrite"),
            ({"retry_failed": True}, "--retry-failed"),
        ):
            with pytest.raises(EnrichInputError, match=words):
                await file.enrich("t", "{{ body }}", column="answer", stale=True, **keywords)
    assert file.run("select name from sqlite_master where name like '%llm%'") == []


async def test_an_empty_table_gets_its_columns(file: TableFile) -> None:
    file.run("delete from t")
    with fake_model(said):
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert (report.written, report.total) == (0, 0)
    assert file.run("select answer from t") == []


async def test_a_run_says_how_it_ended_and_what_was_asked(file: TableFile) -> None:
    with fake_model(said):
        report = await file.enrich(
            "t", "{{ body }}", column="answer", where="id > 3", max_tokens_total=1, actor={"id": "ada"}
        )
    (run,) = file.run('select id, "by", "table", columns, model, prompt, spec, outcome, ended from _llm_runs')
    assert run[:6] == (report.run, "ada", "t", '["answer"]', "fake", "{{ body }}")
    assert json.loads(run[6]) == {"where": "id > 3", "column": "answer"}
    assert run[7] == (report.stopped or "done")
    assert run[8] is not None


async def test_compound_keys_text_keys_and_blobs_are_recorded(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (a text, b blob, body text, primary key (a, b)) without rowid")
    file.run_many("insert into t values (?, ?, ?)", [("x'1", b"\0\xff", "one"), ("ü,", b"", "two")])
    schema = {"type": "object", "properties": {"mood": {"type": ["string", "null"]}}}

    async def none(prompt: str) -> AsyncGenerator[str, None]:
        yield '{"mood": null}'

    with fake_model(none) as model:
        await file.enrich("t", "{{ body }}", schema=schema)
        again = await file.enrich("t", "{{ body }}", schema=schema)
    assert (again.total, len(model.prompts)) == (0, 2)
    file.close()

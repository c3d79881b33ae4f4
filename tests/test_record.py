"""The record of answers by itself: its tables, what a run notes in them, and what is found again."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from datasette_llm.enrich.question import DIGEST_BYTES, QuestionHasher
from datasette_llm.enrich.record.answers import (
    Answered,
    find_answered,
    has_no_value_sql,
    note_answers,
    question_sql,
)
from datasette_llm.enrich.record.keys import key_of, noted_key, noted_key_sql
from datasette_llm.enrich.record.runs import (
    RunDescription,
    RunNumbers,
    add_numbers,
    begin_run,
    end_run,
    find_job,
    list_runs,
)
from datasette_llm.enrich.record.tables import forget_what_is_gone, has_record

if TYPE_CHECKING:
    from collections.abc import Iterator

HASHER = QuestionHasher("gpt")


@pytest.fixture
def conn() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("create table birds (id integer primary key, name text, note text)")
    connection.executemany("insert into birds (name) values (?)", [("heron",), ("ibis",), ("stork",)])
    yield connection
    connection.close()


def described(*columns: str, table: str = "birds", **more: Any) -> RunDescription:
    return RunDescription(table, columns or ("note",), "gpt", "Describe {{ name }}", **more)


def test_a_question_is_all_that_is_sent() -> None:
    base: dict[str, Any] = {
        "options": {"temperature": 0},
        "system": "Be brief",
        "schema": {"properties": {"a": {}}},
    }
    asked = QuestionHasher("gpt", **base).digest("Hello")
    assert len(asked) == DIGEST_BYTES
    assert QuestionHasher("gpt", **base).digest("Hello") == asked
    others = [
        QuestionHasher("gpt-2", **base).digest("Hello"),
        QuestionHasher("gpt", **{**base, "options": {}}).digest("Hello"),
        QuestionHasher("gpt", **{**base, "system": None}).digest("Hello"),
        QuestionHasher("gpt", **{**base, "schema": None}).digest("Hello"),
        QuestionHasher("gpt", **base).digest("Hello "),
        QuestionHasher("gpt", **base).digest("Hello", [("image/png", "https://example.com/a.png")]),
        QuestionHasher("gpt", **base).digest("Hello", [("image/pnghttps://example.com/a.png", "")]),
    ]
    assert len({asked, *others}) == len(others) + 1


def test_the_order_of_options_does_not_make_another_question_and_any_text_can_be_hashed() -> None:
    one = QuestionHasher("gpt", options={"a": 1, "b": 2}).digest("x \ud800 \0 \U0001f426")
    assert QuestionHasher("gpt", options={"b": 2, "a": 1}).digest("x \ud800 \0 \U0001f426") == one


@pytest.mark.parametrize(
    "key",
    [
        (1,),
        ("one",),
        (b"\0\xff",),
        (1.5,),
        (1, "two"),
        ("a,b", 'c"d'),
        (b"\0\xff", 3),
        ("ü", "x'00"),
        (1, 2.5),
    ],
)
def test_a_key_is_noted_as_sql_makes_it_of_the_row(conn: sqlite3.Connection, key: tuple[Any, ...]) -> None:
    names = [f'"k{number}"' for number in range(len(key))]
    conn.execute(f"create table keyed ({', '.join(names)})")
    conn.execute(f"insert into keyed values ({', '.join('?' for _ in key)})", key)
    noted = noted_key(key)
    sql = noted_key_sql([f"keyed.{name}" for name in names])
    assert conn.execute(f"select {sql} from keyed").fetchone() == (noted,)
    assert key_of(noted, len(key)) == key


def test_what_is_no_key_of_this_table_is_none() -> None:
    assert [key_of(noted, 2) for noted in (5, "x", "[1]", "{}", None)] == [None] * 5


def test_a_run_is_recorded_from_its_begin_to_its_end(conn: sqlite3.Connection) -> None:
    assert not has_record(conn)
    assert list_runs(conn) == []
    run = begin_run(conn, described(by="ada", options={"temperature": 0}, spec={"limit": 5}))
    (under_way,) = list_runs(conn)
    assert (under_way["ended"], under_way["written"], under_way["by"]) == (None, 0, "ada")
    note_answers(conn, run, [Answered((1,), HASHER.digest("heron"), 10, 2)])
    add_numbers(conn, run, RunNumbers(written=1, input_tokens=10, output_tokens=2))
    add_numbers(conn, run, RunNumbers())
    end_run(conn, run.run, "done", cost=0.25, failures=[{"kind": "empty", "count": 1}])
    (ended,) = list_runs(conn, table="birds", run=run.run)
    assert (ended["outcome"], ended["written"], ended["cost"]) == ("done", 1, 0.25)
    assert (ended["columns"], ended["options"], ended["spec"]) == (["note"], {"temperature": 0}, {"limit": 5})
    assert ended["failures"] == [{"kind": "empty", "count": 1}]
    assert list_runs(conn, table="other") == []


def test_runs_on_the_same_columns_are_one_job_and_find_each_others_answers(conn: sqlite3.Connection) -> None:
    for column in ("mood", "score", "reason", "other"):
        conn.execute(f"alter table birds add column {column}")
    first = begin_run(conn, described("mood", "score"))
    note_answers(conn, first, [Answered((1,), HASHER.digest("heron"))])
    grown = begin_run(conn, described("mood", "score", "reason"))
    elsewhere = begin_run(conn, described("other"))
    assert (grown.job, elsewhere.job != first.job) == (first.job, True)
    assert find_answered(conn, grown.job, HASHER.digest("heron")) == (1, 0, 0)
    assert find_answered(conn, grown.job, HASHER.digest("ibis")) is None
    assert find_answered(conn, elsewhere.job, HASHER.digest("heron")) is None


def test_a_row_has_one_record_that_of_its_latest_answer(conn: sqlite3.Connection) -> None:
    first, second = begin_run(conn, described()), begin_run(conn, described())
    note_answers(conn, first, [Answered((2,), HASHER.digest("old"), no_value=True)])
    no_value = f"select id from birds where {has_no_value_sql(first.job, ['birds.id'])}"
    assert conn.execute(no_value).fetchall() == [(2,)]
    assert find_answered(conn, first.job, HASHER.digest("old")) is None, "there is no value to give to others"
    note_answers(conn, second, [Answered((2,), HASHER.digest("new"))])
    assert conn.execute(no_value).fetchall() == []
    question = f"select {question_sql(first.job, ['birds.id'])} from birds order by id"
    assert conn.execute(question).fetchall() == [(None,), (HASHER.digest("new"),), (None,)]
    assert find_answered(conn, first.job, HASHER.digest("old")) is None


def test_the_answers_of_a_table_or_column_that_is_gone_are_forgotten(conn: sqlite3.Connection) -> None:
    conn.execute("create table fish (id integer primary key, note text)")
    birds, fish = begin_run(conn, described()), begin_run(conn, described(table="fish"))
    for run in (birds, fish):
        note_answers(conn, run, [Answered((1,), HASHER.digest("x"))])
    conn.execute("drop table fish")
    forget_what_is_gone(conn)
    assert conn.execute("select job from _llm_answers").fetchall() == [(birds.job,)]
    conn.execute("create table fish (id integer primary key, note text)")
    assert find_job(conn, "fish", ["note"]) is None
    assert begin_run(conn, described(table="fish")).job != fish.job
    assert len(list_runs(conn, table="fish")) == 2, "the history of runs stays"
    conn.execute("alter table birds drop column note")
    forget_what_is_gone(conn)
    assert conn.execute("select count(*) from _llm_answers").fetchone() == (0,)


def test_tables_of_an_older_version_get_the_columns_they_lack(conn: sqlite3.Connection) -> None:
    conn.execute('create table _llm_runs ("id" integer primary key, "job" integer, "table" text)')
    conn.execute("insert into _llm_runs values (7, null, 'birds')")
    run = begin_run(conn, described())
    assert run.run == 8
    assert [each["table"] for each in list_runs(conn)] == ["birds", "birds"]


def test_a_lone_surrogate_in_a_prompt_does_not_keep_a_run_from_beginning(conn: sqlite3.Connection) -> None:
    begin_run(conn, RunDescription("birds", ("note",), "gpt", "odd \ud800", system="\udfff"))
    assert list_runs(conn)[0]["prompt"] == "odd ?"


def test_looking_for_a_question_uses_the_index(conn: sqlite3.Connection) -> None:
    run = begin_run(conn, described())
    steps: list[str] = []
    conn.set_trace_callback(steps.append)
    find_answered(conn, run.job, HASHER.digest("x"))
    conn.set_trace_callback(None)
    plan = " ".join(str(row) for row in conn.execute(f"explain query plan {steps[0]}"))
    assert "_llm_answers_question" in plan
    waiting = f"select id from birds where note is null and not {has_no_value_sql(run.job, ['birds.id'])}"
    plan = " ".join(str(row) for row in conn.execute(f"explain query plan {waiting}"))
    assert "SEARCH _llm_answers USING PRIMARY KEY (job=? AND pk=?)" in plan

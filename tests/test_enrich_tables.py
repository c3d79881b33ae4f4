"""Every kind of table: its rows are found, asked about once, and written."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import enrich
from datasette_llm.backends.datasette_side import call
from datasette_llm.enrich import EnrichError, EnrichInputError, database, plan
from datasette_llm.enrich.reading import selection
from datasette_llm.enrich.writing import landing

from .enrich_tables import TableFile, fake_model
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .fakes import FakeModel

    MakeTable = Callable[..., TableFile]

pytestmark = pytest.mark.real_clock


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeTable]:
    made: list[TableFile] = []

    def make_table(*statements: str) -> TableFile:
        made.append(TableFile(tmp_path, *statements))
        return made[-1]

    yield make_table
    for file in made:
        file.close()


@pytest.fixture
def model() -> Iterator[FakeModel]:
    with fake_model() as model:
        yield model


# Each: the table, its rows, and the condition that a person would expect the rows to be ordered by.
KINDS = {
    "rowid": ("create table t (body)", "insert into t values ('a'), ('b'), ('c')"),
    "integer key": (
        "create table t (id integer primary key, body)",
        "insert into t values (5, 'a'), (-3, 'b'), (9000000000, 'c')",
    ),
    "text key": (
        "create table t (code text primary key, body)",
        "insert into t values ('é', 'a'), ('it''s', 'b'), ('', 'c')",
    ),
    "text key with nulls": (
        "create table t (code text primary key, body)",
        "insert into t values ('x', 'a'), (null, 'b'), (null, 'c')",
    ),
    "text key without case": (
        "create table t (code text collate nocase primary key, body)",
        "insert into t values ('B', 'a'), ('a', 'b'), ('C', 'c')",
    ),
    "compound key": (
        "create table t (a text, b integer, body, primary key (a, b))",
        "insert into t values ('x', 2, 'a'), ('x', 1, 'b'), ('a', 7, 'c')",
    ),
    "compound key in another order": (
        "create table t (b integer, body, a text, primary key (a, b))",
        "insert into t values (2, 'a', 'x'), (1, 'b', 'x'), (7, 'c', 'a')",
    ),
    "without rowid": (
        "create table t (code text primary key, body) without rowid",
        "insert into t values ('q', 'a'), ('r', 'b'), ('s', 'c')",
    ),
    "compound without rowid": (
        "create table t (a, b blob, body, primary key (a, b)) without rowid",
        "insert into t values (1, x'00ff', 'a'), (1, x'00', 'b'), ('1', 2.5, 'c')",
    ),
    "column called rowid": (
        "create table t (rowid text, body)",
        "insert into t values ('x', 'a'), ('x', 'b'), ('x', 'c')",
    ),
    "strict": (
        "create table t (id integer primary key, body text) strict",
        "insert into t values (1, 'a'), (2, 'b'), (3, 'c')",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_rows_of_every_kind_of_table_are_written_once(
    kind: str, make: MakeTable, model: FakeModel
) -> None:
    file = make(*KINDS[kind])

    report = await file.enrich("t", "{{ body }}!", column="answer")

    assert (report.written, report.failed, report.changed, report.total) == (3, 0, 0, 3)
    assert dict(file.run("select body, answer from t")) == {"a": "a!", "b": "b!", "c": "c!"}
    again = await file.enrich("t", "{{ body }}!", column="answer")
    assert (again.written, again.total, again.model) == (0, 0, None)
    assert sorted(model.prompts) == ["a!", "b!", "c!"]


@pytest.mark.parametrize("kind", KINDS)
async def test_failed_rows_of_every_kind_of_table_are_recorded_and_retried(
    kind: str, make: MakeTable
) -> None:
    file = make(*KINDS[kind])
    broken = True

    async def answer(prompt: str) -> Any:
        if prompt == "b" and broken:
            raise ValueError("cannot do b")
        yield prompt.upper()

    with fake_model(answer) as model:
        report = await file.enrich("t", "{{ body }}", column="answer")
        assert (report.written, report.failed) == (2, 1)
        [(table, column, model_id, error, attempts, when)] = file.run(
            'select "table", "column", model, error, attempts, "when" from _llm_enrich_errors'
        )
        assert (table, column, model_id, attempts) == ("t", "answer", "fake", 1)
        assert error == "ValueError: cannot do b"
        assert when.endswith("Z")

        await file.enrich("t", "{{ body }}", column="answer", retry_failed=True)
        assert file.run("select attempts from _llm_enrich_errors") == [(2,)]

        broken = False
        file.run("update t set answer = null where body = 'a'")
        retried = await file.enrich("t", "{{ body }}", column="answer", retry_failed=True)
        assert (retried.written, retried.total) == (1, 1)
        assert file.run("select * from _llm_enrich_errors") == []
        assert dict(file.run("select body, answer from t")) == {"a": None, "b": "B", "c": "C"}
        assert model.prompts.count("c") == 1


async def test_names_with_spaces_quotes_brackets_and_unicode(make: MakeTable, model: FakeModel) -> None:
    table, key, column, output = 'my "table" [x]', "the key]", 'body "of" [it] é', 'out ]"put 🙂'

    def quote(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    file = make(
        f"create table {quote(table)} ({quote(key)} text primary key, {quote(column)} text)",
        f"insert into {quote(table)} values ('k', 'v')",
    )

    await file.enrich(table, "{{ row['body \"of\" [it] é'] }}", column=output)

    assert file.run(f"select {quote(output)} from {quote(table)}") == [("v",)]


async def test_nulls_blobs_and_ten_megabytes(make: MakeTable) -> None:
    file = make("create table t (id integer primary key, body, picture blob)")
    big = "x" * 10_000_000
    file.run("insert into t values (1, null, ?), (2, ?, null), (3, 'no', ?)", (b"text", big, b"\xff\xfe"))

    async def answer(prompt: str) -> Any:
        yield str(len(prompt))

    with fake_model(answer):
        report = await file.enrich("t", "{{ body }}|{{ picture }}", column="size")

    assert file.run("select id, size from t") == [(1, "5"), (2, "10000001"), (3, None)]
    assert (report.written, report.failed) == (2, 1)
    assert "blob that is not text" in report.failures[0].example


async def test_text_that_is_not_utf8_is_written_all_the_same(make: MakeTable, model: FakeModel) -> None:
    file = make("create table t (body text)", "insert into t values (cast(x'61ff62' as text))")

    report = await file.enrich("t", "{{ body }}", column="answer")

    assert report.written == 1
    assert model.prompts == ["a\ufffdb"]


async def test_an_empty_table_has_nothing_to_do_and_gets_its_column(
    make: MakeTable, model: FakeModel
) -> None:
    file = make("create table t (body)")

    report = await file.enrich("t", "{{ body }}", column="answer")

    assert (report.total, report.written) == (0, 0)
    assert "Nothing left to do" in report.summary()
    assert file.run("select name from pragma_table_info('t')") == [("body",), ("answer",)]


@pytest.mark.parametrize(
    ("statements", "kwargs", "message"),
    [
        (["create view v as select 1 as body"], {"table": "v"}, "'v' is a view"),
        ([], {"table": "tt"}, "no table 'tt': did you mean 't'"),
        ([], {"database": "other"}, "no database 'other'"),
        (["create virtual table f using fts4(body)"], {"table": "f"}, "SQLite manages itself"),
        (
            ["create table g (body, loud as (upper(body)))", "insert into g values (1)"],
            {"table": "g", "column": "loud"},
            "generated column",
        ),
        ([], {"column": "id"}, "part of the primary key"),
        ([], {"column": " "}, "no name for a column"),
        ([], {"column": None}, "which column"),
        (["create table r (body)"], {"table": "r", "column": "rowid"}, "would hide the key"),
        (["create table h (rowid, _rowid_, oid, body)"], {"table": "h"}, "cannot be told apart"),
        ([], {"where": "nonsense = 3"}, "no such column"),
        ([], {"where": "1) or (1"}, None),
        ([], {"where": "id = ("}, "not valid here"),
        ([], {"limit": 0}, "limit must be more than 0"),
        ([], {"schema": "id int"}, "part of the primary key"),
        (["alter table t add column score integer"], {"column": None, "schema": "score"}, "is integer"),
    ],
)
async def test_what_cannot_be_done_is_said_before_anything_is_sent_or_written(
    statements: list[str], kwargs: dict[str, Any], message: str | None, make: MakeTable, model: FakeModel
) -> None:
    file = make(
        "create table t (id integer primary key, body)", "insert into t(body) values ('a')", *statements
    )
    before = file.run("select sql from sqlite_master")
    asked: dict[str, Any] = {"database": "data", "table": "t", "column": "answer", **kwargs}

    if message is None:
        await enrich(file.datasette(), prompt="{{ body }}", model="fake", **asked)
        return
    with pytest.raises(EnrichInputError, match="(?i)" + message.replace("(", r"\(")):
        await enrich(file.datasette(), prompt="{{ body }}", model="fake", **asked)
    assert model.prompts == []
    assert file.run("select sql from sqlite_master") == before


async def test_an_unknown_model_leaves_the_table_alone(make: MakeTable, model: FakeModel) -> None:
    file = make("create table t (body)", "insert into t values ('a')")
    with pytest.raises(Exception, match="nonesuch"):
        await file.enrich("t", "{{ body }}", column="answer", model="nonesuch")
    assert file.run("select name from pragma_table_info('t')") == [("body",)]


async def test_generated_columns_can_be_read(make: MakeTable, model: FakeModel) -> None:
    file = make("create table t (body, loud as (upper(body)) stored)", "insert into t values ('a')")
    await file.enrich("t", "{{ loud }}", column="answer")
    assert file.run("select answer from t") == [("A",)]


async def test_triggers_run_and_one_that_refuses_fails_its_row_only(
    make: MakeTable, model: FakeModel
) -> None:
    file = make(
        "create table t (id integer primary key, body, answer)",
        "create table log (id)",
        "create trigger logged after update on t begin insert into log values (new.id); end",
        "create trigger no before update on t when new.body = 'b' begin select raise(abort, 'no b'); end",
        "create trigger c before update on t when new.body = 'c' begin select raise(rollback, 'no c'); end",
        "insert into t(body) values ('a'), ('b'), ('c'), ('d')",
    )

    report = await file.enrich("t", "{{ body }}", column="answer")

    assert (report.written, report.failed) == (2, 2)
    assert dict(file.run("select body, answer from t")) == {"a": "a", "b": None, "c": None, "d": "d"}
    assert file.run("select id from log order by id") == [(1,), (4,)]
    errors = [error for (error,) in file.run("select error from _llm_enrich_errors order by pk")]
    assert ["no b" in errors[0], "trigger rolled" in errors[1]] == [True, True]


async def test_foreign_keys_and_checks_refuse_their_row_only(make: MakeTable, model: FakeModel) -> None:
    file = make(
        "create table kinds (name text primary key)",
        "insert into kinds values ('good')",
        "create table t (id integer primary key, body, kind references kinds, short check (short < 'b'))",
        "insert into t(body) values ('good'), ('awful')",
    )
    await file.enrich("t", "{{ body }}", column="kind")  # SQLite enforces foreign keys only when asked to.
    report = await file.enrich("t", "{{ body }}", column="short")
    assert (report.written, report.failed) == (1, 1)
    assert "CHECK constraint failed" in report.failures[0].example


@pytest.mark.parametrize(
    ("declared", "answer", "stored"),
    [
        ("integer", " 42 ", 42),
        ("integer", "forty", None),
        ("integer", "4_2", None),
        ("integer", str(2**70), None),
        ("real", "2.5", 2.5),
        ("real", "nan", None),
        ("blob", "x", "x"),
        ("boolean", "true", "true"),
        ("varchar(3)", "long text", "long text"),
    ],
)
async def test_an_existing_column_of_another_type(
    declared: str, answer: str, stored: Any, make: MakeTable
) -> None:
    file = make(f"create table t (body, answer {declared})", "insert into t(body) values ('a')")

    async def script(prompt: str) -> Any:
        yield answer

    with fake_model(script):
        report = await file.enrich("t", "{{ body }}", column="ANSWER")

    assert file.run("select answer from t") == [(stored,)]
    assert report.failed == (stored is None)


async def test_rows_with_a_value_are_asked_about_only_with_overwrite(
    make: MakeTable, model: FakeModel
) -> None:
    file = make("create table t (body, answer)", "insert into t values ('a', 'mine'), ('b', ''), ('c', null)")

    await file.enrich("t", "{{ body }}", column="answer")
    assert file.run("select answer from t") == [("mine",), ("",), ("c",)]

    await file.enrich("t", "{{ body }}2", column="answer", overwrite=True, where="body != 'c' -- not c")
    assert file.run("select answer from t") == [("a2",), ("b2",), ("c",)]


async def test_limit_and_where(make: MakeTable, model: FakeModel) -> None:
    file = make("create table t (n integer)")
    file.run_many("insert into t values (?)", [(n,) for n in range(20)])
    report = await file.enrich("t", "{{ n }}", column="answer", where="n % 2", limit=3)
    assert (report.written, report.total) == (3, 3)
    assert file.run("select n from t where answer is not null order by n") == [(1,), (3,), (5,)]


async def test_many_pages(make: MakeTable, model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "COUNT_ROWS", 300)
    file = make("create table t (a, b, primary key (a, b))")
    file.run_many("insert into t values (?, ?)", [(n % 7, n) for n in range(1_100)])  # pages have 500
    report = await file.enrich("t", "{{ a }}-{{ b }}", column="answer")
    assert (report.written, report.total) == (1_100, 1_100)
    assert file.run("select count(*) from t where answer = a || '-' || b") == [(1_100,)]


async def test_a_schema_makes_one_typed_column_per_property(make: MakeTable) -> None:
    file = make("create table t (body)", "insert into t values ('a'), ('b'), ('c'), ('d')")
    answers = {
        "a": '{"name": "A", "age": 3, "tags": ["x"], "good": true, "size": 2}',
        "b": '```json\n{"name": "B", "age": 4, "tags": [], "good": false, "size": 0.5}\n```',
        "c": '{"name": "C", "age": "four", "tags": [], "good": false, "size": 0.5}',
        "d": "I would rather not",
    }
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "good": {"type": "boolean"},
            "size": {"type": "number"},
        },
        "required": ["name", "age", "tags", "good", "size"],
    }

    async def script(prompt: str) -> Any:
        yield answers[prompt]

    with fake_model(script) as model:
        report = await file.enrich("t", "{{ body }}", schema=schema)
        assert report.columns == ("name", "age", "tags", "good", "size")
        assert (report.written, report.failed) == (2, 2)
        await file.enrich("t", "{{ body }}", schema=schema, retry_failed=True)
        assert len(model.prompts) == 6

    assert file.run("select name, age, tags, good, size from t where body < 'c'") == [
        ("A", 3, '["x"]', 1, 2.0),
        ("B", 4, "[]", 0, 0.5),
    ]
    types = dict(file.run("select name, type from pragma_table_info('t')"))
    assert [types[name] for name in ("name", "age", "tags", "good", "size")] == [
        "TEXT", "INTEGER", "TEXT", "INTEGER", "REAL",
    ]  # fmt: skip
    errors = [error for (error,) in file.run("select error from _llm_enrich_errors order by pk")]
    assert "does not fit the schema: age" in errors[0]
    assert "not JSON: 'I would rather not'" in errors[1]


async def test_a_schema_with_a_column_keeps_the_whole_answer_too(make: MakeTable) -> None:
    file = make("create table t (body)", "insert into t values ('a')")

    async def script(prompt: str) -> Any:
        yield '{"name": null}'

    with fake_model(script) as model:
        schema = {"properties": {"name": {"type": ["string", "null"]}}}
        for _ in range(2):
            await file.enrich("t", "{{ body }}", column="answer", schema=schema)
        assert len(model.prompts) == 1
    assert file.run("select name, answer from t") == [(None, '{"name": null}')]


async def impatient(datasette: Any) -> None:
    """Have SQLite itself not wait for locks, so that a test need not either."""

    def set_timeout(conn: Any) -> None:
        conn.execute("pragma busy_timeout = 1")

    database = datasette.get_database("data")
    await call(database.execute_write_fn, set_timeout, transaction=False)
    await call(database.execute_fn, set_timeout)


async def test_a_database_that_cannot_be_read_is_waited_for_and_then_said(
    make: MakeTable, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make("create table t (body, answer)", "insert into t(body) values ('a')")
    monkeypatch.setattr(database, "LOCKED_SECONDS", 0.3)
    datasette = file.datasette(settings={"num_sql_threads": 1})
    await impatient(datasette)
    other = sqlite3.connect(file.path)
    other.execute("begin exclusive")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "recover", read_nothing)
        with pytest.raises(EnrichError, match=r"has kept the database 'data' locked for \d+ seconds"):
            await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake")
    other.close()
    report = await file.enrich("t", "{{ body }}", column="answer")
    assert report.written == 1


async def test_a_database_that_cannot_be_written_ends_the_job_and_its_answers_are_kept(
    make: MakeTable, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make("create table t (body, answer)", "insert into t(body) values ('a')")
    datasette = file.datasette(settings={"num_sql_threads": 1})
    await impatient(datasette)
    other = sqlite3.connect(file.path)
    other.execute("begin immediate")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "recover", read_nothing)
        report = await enrich(
            datasette, "data", "t", "{{ body }}", column="answer", model="fake", lock_timeout=0.3
        )
    other.close()
    assert (report.stopped, report.written, report.in_side_file) == ("database", 0, 1)
    again = await file.enrich("t", "{{ body }}", column="answer")
    assert (again.taken_up, len(model.prompts)) == (1, 1)


async def read_nothing(database: Any, **kwargs: Any) -> None:
    pass


async def test_a_database_that_is_locked_for_a_while_gets_its_answers_then(make: MakeTable) -> None:
    file = make("create table t (body, answer)", "insert into t(body) values ('a'), ('b')")
    datasette = file.datasette(settings={"num_sql_threads": 1})
    await impatient(datasette)
    other = sqlite3.connect(file.path, check_same_thread=False)
    other.execute("begin immediate")
    tries = 0
    original = landing.Landing.land

    def transaction(self: Any, batch: Any, conn: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 3:
            other.rollback()
        return original(self, batch, conn)

    with fake_model(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(landing.Landing, "land", transaction)
        report = await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake")
    assert (report.written, tries) == (2, 3)
    other.close()


async def test_it_works_in_a_background_task_of_datasette(make: MakeTable, model: FakeModel) -> None:
    file = make("create table t (body)", "insert into t values ('a')")
    datasette = file.datasette()
    if not hasattr(datasette, "add_background_task"):
        pytest.skip("this Datasette has no background tasks")
    reports = []

    async def main() -> None:  # Datasette's own code, on asyncio whichever the backend.
        done = anyio.Event()

        async def job(datasette: Any) -> None:
            reports.append(await enrich(datasette, "data", "t", "{{ body }}", column="answer", model="fake"))
            done.set()

        datasette.add_background_task(job)
        await datasette.invoke_startup()
        await datasette.start_background_tasks()
        with anyio.fail_after(PATIENCE_SECONDS):
            await done.wait()
        await datasette.invoke_shutdown()

    await call(main)
    assert reports[0].written == 1

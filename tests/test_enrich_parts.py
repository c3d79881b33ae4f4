"""The small parts of enrichment, each alone."""

from __future__ import annotations

import logging
import os
import re
import signal
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm._compat import BaseExceptionGroup, ExceptionGroup
from datasette_llm.backends.datasette_side import call, open_side
from datasette_llm.enrich import EnrichError, EnrichInputError, JobSpec, job
from datasette_llm.enrich import database as database_side
from datasette_llm.enrich.answers.outputs import Outputs
from datasette_llm.enrich.command import exit_code, go_on, run_job
from datasette_llm.enrich.errors import raise_bare
from datasette_llm.enrich.reading.selection import literal
from datasette_llm.enrich.reading.table import Column, Table
from datasette_llm.enrich.record.failures import key_from_stored, stored_key
from datasette_llm.enrich.telling.display import Silence
from datasette_llm.enrich.telling.report import EnrichReport, FailureKind
from datasette_llm.enrich.telling.words import nearest
from datasette_llm.enrich.writing import lock

from .enrich_tables import TableFile, close_datasette, fake_model

if TYPE_CHECKING:
    from pathlib import Path

TABLE = Table("t", (Column("id", "INTEGER", key_position=1), Column("n", "INTEGER")), ('"id"',), ("id",))


@pytest.mark.parametrize(
    "key", [(1,), ("a",), (b"\xff",), (None,), (1, "a"), ("é", 2.5, b"\x00\xff"), (None, "[1]")]
)
def test_keys_are_kept_and_found_again(key: tuple[Any, ...]) -> None:
    assert key_from_stored(stored_key(key), len(key)) == key


@pytest.mark.parametrize("stored", ["no json", "[1]", "{}", None, 5])
def test_a_key_of_another_shape_is_no_key(stored: Any) -> None:
    assert key_from_stored(stored, 2) is None


@pytest.mark.parametrize("value", [None, 5, -2.5, "it's", "nul\x00l", b"\x00\xff", 1e300, "é🙂"])
def test_literals_are_what_sqlite_reads(value: Any) -> None:
    [(read,)] = sqlite3.connect(":memory:").execute(f"select {literal(value)}")
    assert read == value


def test_outputs_that_clash_or_say_nothing() -> None:
    with pytest.raises(EnrichInputError, match="share the column 'A'"):
        Outputs(TABLE, "A", {"properties": {"a": {}}})
    outputs = Outputs(TABLE, None, {"properties": {"a": {"type": ["string", "null"]}}})
    with pytest.raises(ValueError, match="no value for any column"):
        outputs.parse("{}")
    assert outputs.parse('{"a": null}') == (None,)
    outputs = Outputs(TABLE, None, {"properties": {"a": {"type": "integer"}}})
    with pytest.raises(ValueError, match="too large for SQLite"):
        outputs.parse('{"a": 99999999999999999999}')


def test_names_that_are_near() -> None:
    assert nearest("x", []) == "there are: none"
    assert nearest("zz", [f"name{n}" for n in range(20)]).endswith("'name11' and 8 more")


def test_exit_codes_and_the_command_to_go_on_with() -> None:
    report = EnrichReport("data", "t", ("a",))
    assert exit_code(report) == 0
    report.failed = 1
    assert exit_code(report) == 1
    report.stopped = "SIGTERM"
    assert exit_code(report) == 143
    report.resume_where = "id > 7"
    options = [("--overwrite", None), ("--where", "id > 1"), ("--model", "m")]
    assert go_on(report, ["d b", "t", "p"], options) == (
        "datasette llm enrich 'd b' t p --overwrite --model m --where 'id > 7'"
    )


def test_a_long_report_is_kept_readable() -> None:
    report = EnrichReport("data", "t", ("a",), model="m", written=3, failed=1, retries=2, cancelled=4)
    report.failures = [FailureKind("ValueError", 1, "long " * 100, (b"\xff", 1))]
    text = report.summary()
    assert "4 prompts in flight were cancelled" in text
    assert "2 retries" in text
    assert max(len(line) for line in text.splitlines()) < 300
    assert report.as_dict()["failures"][0]["pk"] == ["ff", 1]
    report = EnrichReport("data", "t", ("a",), dry_run=True, total=1, prompts=["x" * 5_000])
    assert "(5,000 characters)" in report.summary()


@pytest.mark.real_clock
async def test_a_dry_run_says_which_of_the_first_rows_would_fail(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (body)", "insert into t values (null), (x'ff')")
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer", dry_run=True)
    assert report.prompts == [
        "(row 1 would be skipped: nothing to ask)",
        "(row 2 would fail: the prompt shows a blob that is not text (1 byte))",
    ]
    assert "Of the 2 rows shown, 1 would be skipped: nothing to ask." in report.summary()
    file.close()


@pytest.mark.real_clock
async def test_an_immutable_database_is_refused(tmp_path: Path) -> None:
    from datasette.app import Datasette

    from datasette_llm import enrich

    file = TableFile(tmp_path, "create table t (body)")
    datasette = Datasette([], immutables=[file.path])
    with pytest.raises(EnrichInputError, match="immutable"):
        await enrich(datasette, "data", "t", "{{ body }}", column="a")
    close_datasette(datasette)


@pytest.mark.real_clock
async def test_what_a_killed_program_left_half_written_is_undone_first(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (body, filler)")
    file.run_many("insert into t values (?, ?)", [(f"row {n}", "x" * 4_000) for n in range(50)])
    file.leave_half_written("update t set body = null")
    assert (tmp_path / "data.db-journal").exists()
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert report.written == 50
    file.close()


@pytest.mark.real_clock
async def test_a_table_that_is_dropped_meanwhile_ends_the_job_clearly(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (body, answer)", "insert into t(body) values ('a')")

    async def answer(prompt: str) -> Any:
        file.run("drop table t")
        yield "too late"

    with fake_model(answer):
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert (report.stopped, report.written, report.in_side_file) == ("database", 0, 1)
    assert re.search(r"cannot be written: no such table: (main\.)?t", report.summary())
    assert exit_code(report) == 1
    file.close()


@pytest.mark.real_clock
async def test_a_writer_that_waits_for_a_reader_lets_other_readers_in(tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (body)")
    file.run_many("insert into t values (?)", [("x" * 4_000,) for _ in range(50)])
    database = file.datasette().get_database("data")
    forgotten, other = (sqlite3.connect(file.path, timeout=0) for _ in range(2))
    cursor = forgotten.execute("select body from t")
    cursor.fetchone()

    def update(conn: sqlite3.Connection) -> int:
        patience.append(conn.execute("pragma busy_timeout").fetchone()[0])
        conn.execute("begin immediate")
        count = conn.execute("update t set body = 'y'").rowcount
        conn.commit()
        return count

    async def read_when_possible() -> None:
        while True:
            try:
                other.execute("select count(*) from t").fetchone()
            except sqlite3.OperationalError:
                refused.set()
            else:
                if refused.is_set():
                    break  # after the writer has let go, and before it is through
            await anyio.sleep(0.01)
        assert not written
        cursor.close()

    patience: list[int] = []
    written: list[int] = []
    refused = anyio.Event()
    async with open_side(), anyio.create_task_group() as tasks:
        tasks.start_soon(read_when_possible)
        written.append(await database_side.write(database, update))
        await call(
            database.execute_write_fn,
            lambda conn: patience.append(conn.execute("pragma busy_timeout").fetchone()[0]),
        )
    assert written == [50]
    assert len(patience) > 2
    assert (patience[0], patience[-1]) == (250, 5_000)
    forgotten.close()
    other.close()
    file.close()


@pytest.mark.real_clock
async def test_a_count_that_fails_costs_the_total_and_not_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = anyio.Event()

    async def count_rows(database: Any, source: Any) -> int:
        tried.set()
        raise EnrichError("locked")

    async def answer(prompt: str) -> Any:
        await tried.wait()
        yield "in time"

    monkeypatch.setattr(job, "count_rows", count_rows)
    file = TableFile(tmp_path, "create table t (body)", "insert into t values ('a')")
    with fake_model(answer):
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert (report.written, report.total, report.stopped) == (1, 1, None)
    assert "cannot be counted: locked" in caplog.text
    file.close()


def test_what_the_database_does_to_several_tasks_is_said_once() -> None:
    locked, gone = EnrichError("locked"), EnrichError("gone")
    with pytest.raises(EnrichError) as caught:
        raise_bare(BaseExceptionGroup("", [ExceptionGroup("", [locked]), gone]))
    assert caught.value is locked
    with pytest.raises(BaseExceptionGroup):
        raise_bare(BaseExceptionGroup("", [locked, ValueError("a bug")]))


@pytest.mark.real_clock
async def test_a_prompt_that_hangs_does_not_outlive_the_deadline_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "DEADLINE_GRACE_SECONDS", 0.1)
    file = TableFile(tmp_path, "create table t (body)", "insert into t values ('a')")

    async def answer(prompt: str) -> Any:
        await anyio.sleep_forever()
        yield ""

    with fake_model(answer):
        report = await file.enrich("t", "{{ body }}", column="answer", deadline=3)
    assert (report.stopped, report.written, report.cancelled) == ("deadline", 0, 1)
    file.close()


@pytest.mark.real_clock
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal handlers in event loops")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_first_signal_stops_the_job(number: signal.Signals, tmp_path: Path) -> None:
    file = TableFile(tmp_path, "create table t (body)")
    file.run_many("insert into t values (?)", [(f"row {n}",) for n in range(50)])

    async def answer(prompt: str) -> Any:
        if prompt == "row 5":
            os.kill(os.getpid(), number)
            await anyio.sleep(0.05)
        yield prompt

    spec = JobSpec(database="", table="t", prompt="{{ body }}", column="answer", model="fake", concurrency=2)
    notes: list[str] = []

    class Notes(Silence):
        def note(self, text: str) -> None:
            notes.append(text)

    with fake_model(answer):
        report = await run_job(file.datasette, spec, Notes(sys.stderr))
    assert report.stopped == number.name
    assert 6 <= report.written < 50
    assert " in flight, then the last answers" in notes[0]


def test_where_no_lock_can_be_had_the_job_is_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Database:
        path = str(tmp_path / "data.db")

    def refuse(*args: Any) -> int:
        raise PermissionError("read-only directory")

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.WARNING), lock.only_job(Database(), "t", ["a"]):
        pass
    assert "Nothing keeps a second job" in caplog.text

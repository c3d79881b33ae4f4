"""A job from beginning to end: what is written when, what stops it, and what others do meanwhile."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import ModelNotFoundError
from datasette_llm.enrich import AlreadyRunning, EnrichInputError, EnrichJob, JobSpec, enrich, ledger
from datasette_llm.enrich.writing import writer
from datasette_llm.enrich.writing.lock import only_job

from .enrich_tables import TableFile, close_datasette, fake_model
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from datasette_llm.enrich import EnrichProgress

pytestmark = pytest.mark.real_clock


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    """A table ``t`` of ten rows, 'row 1' to 'row 10'."""
    file = TableFile(tmp_path, "create table t (id integer primary key, body, answer)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(1, 11)])
    yield file
    file.close()


class Gate:
    """Answers that wait until a test lets them go; those in ``free`` do not wait."""

    def __init__(self, *free: str) -> None:
        self.free = free
        self.asked = 0
        self._one_more = anyio.Event()
        self.open = anyio.Event()

    async def until_asked(self, times: int) -> None:
        while self.asked < times:
            await self._one_more.wait()

    async def __call__(self, prompt: str) -> AsyncGenerator[str, None]:
        self.asked += 1
        self._one_more.set()
        self._one_more = anyio.Event()
        if prompt not in self.free:
            await self.open.wait()
        yield prompt.upper()


@contextmanager
def gated(*free: str) -> Iterator[Gate]:
    gate = Gate(*free)
    with fake_model(gate):
        yield gate


def job_of(file: TableFile, **kwargs: Any) -> EnrichJob:
    asked: dict[str, Any] = {
        "database": "data",
        "table": "t",
        "prompt": "{{ body }}",
        "column": "answer",
        "model": "fake",
        **kwargs,
    }
    on_progress = asked.pop("on_progress", None)
    return EnrichJob(file.datasette(), JobSpec(**asked), on_progress=on_progress)


async def until(file: TableFile, sql: str, expected: Any) -> None:
    """Wait until a query, seen by another program, has this answer."""
    with anyio.fail_after(PATIENCE_SECONDS):
        while file.run(sql) != expected:  # noqa: ASYNC110 - no event crosses from another program
            await anyio.sleep(0.02)


async def test_answers_are_in_the_table_while_others_are_still_out(file: TableFile) -> None:
    with gated("row 1", "row 2") as gate:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(job_of(file, concurrency=5).run)
            await until(file, "select answer from t where answer is not null", [("ROW 1",), ("ROW 2",)])
            gate.open.set()
    assert file.run("select count(answer) from t") == [(10,)]


async def test_rows_deleted_edited_or_filled_meanwhile_get_no_stale_answer(file: TableFile) -> None:
    with gated() as gate:
        async with anyio.create_task_group() as tasks:
            job = job_of(file, concurrency=10)
            reports = []

            async def run() -> None:
                reports.append(await job.run())

            tasks.start_soon(run)
            await gate.until_asked(10)
            file.run("delete from t where id in (1, 2)")
            file.run("insert into t(id, body) values (2, 'somebody else')")
            file.run("update t set body = 'edited' where id = 3")
            file.run("update t set answer = 'by hand' where id = 4")
            file.run("insert into t(id, body) values (11, 'late')")
            gate.open.set()
    [report] = reports
    assert dict(file.run("select body, answer from t where id < 5 or id > 10")) == {
        "somebody else": None,
        "edited": None,
        "row 4": "by hand",
        "late": None,
    }
    assert (report.written, report.changed, report.failed) == (6, 4, 0)
    assert "4 rows were deleted, edited or filled meanwhile" in report.summary()
    with fake_model():
        again = await file.enrich("t", "{{ body }}", column="answer")
    assert again.written == 3


async def test_a_row_that_fails_and_is_deleted_meanwhile_is_not_recorded(file: TableFile) -> None:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        file.run("delete from t where body = ?", (prompt,))
        raise ValueError("too late")
        yield ""

    with fake_model(answer):
        report = await file.enrich("t", "{{ body }}", column="answer", limit=1)
    assert (report.changed, report.failed) == (1, 0)


async def test_stop_completes_what_is_in_flight(file: TableFile) -> None:
    with gated() as gate:
        job = job_of(file, concurrency=3)
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def _() -> None:
                await gate.until_asked(1)
                job.stop("SIGTERM")
                gate.open.set()

            report = await job.run()
    assert report.stopped == "SIGTERM"
    assert 1 <= report.written <= 4
    assert report.remaining == 10 - report.written
    assert report.cancelled == 0
    assert "Stopped early: terminated" in report.summary()


async def test_stop_with_a_grace_cancels_what_is_still_in_flight_and_writes_the_rest(file: TableFile) -> None:
    with gated("row 1") as gate:
        job = job_of(file, concurrency=3)
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def _() -> None:
                await gate.until_asked(3)
                job.stop(grace_seconds=0.05)

            report = await job.run()
    assert (report.stopped, report.written, report.failed) == ("stopped", 1, 0)
    assert report.cancelled >= 2
    assert file.run("select id from t where answer is not null") == [(1,)]


async def test_cancelling_the_job_writes_what_was_answered(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "TRANSACTION_SECONDS", 3600.0)
    answered = anyio.Event()
    with gated("row 1") as gate:
        job = job_of(file, concurrency=3)
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                @tasks.start_soon
                async def _() -> None:
                    await gate.until_asked(4)  # So the first has been answered, and is in the buffer.
                    answered.set()
                    scope.cancel()

                await job.run()
    assert answered.is_set()
    assert file.run("select id, answer from t where answer is not null") == [(1, "ROW 1")]


async def test_a_deadline_stops_and_the_same_call_goes_on(file: TableFile) -> None:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "row 3":
            await anyio.sleep(
                0.6
            )  # Longer than the deadline: it is completed, and nothing after it is asked.
        yield prompt

    with fake_model(answer) as model:
        first = await file.enrich("t", "{{ body }}", column="answer", concurrency=1, deadline=0.5)
        assert first.stopped == "deadline"
        assert first.written < 10
        second = await file.enrich("t", "{{ body }}", column="answer")
        assert first.written + second.written == len(model.prompts) == 10
        assert second.stopped is None


async def test_max_failures_stops_a_job_that_can_only_fail(file: TableFile) -> None:
    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "row 1":
            raise ValueError("no such luck")
        raise RuntimeError("wrong key sk-12345 for you")
        yield ""

    with fake_model(answer) as model:
        report = await file.enrich(
            "t", "{{ body }}", column="answer", concurrency=1, max_failures=3, key="sk-12345"
        )
    assert report.stopped == "max_failures"
    assert 3 <= report.failed < 10
    assert len(model.prompts) == report.failed
    kinds = {failure.kind: failure for failure in report.failures}
    assert set(kinds) == {"error"}
    kinds = {failure.exception: failure for failure in report.failures}
    assert kinds["ValueError"].pk == (1,)
    assert kinds["RuntimeError"].example == "wrong key *** for you"
    assert "sk-12345" not in str(file.run("select error from _llm_enrich_errors"))
    assert "x error (RuntimeError), for instance row 2" in report.summary()


async def test_failures_in_a_row_stop_a_job_without_a_limit(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "FAILURES_IN_A_ROW", 3)

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        if prompt not in ("row 1", "row 4"):
            raise RuntimeError("nobody there")
        yield prompt

    with fake_model(answer) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=1)
    assert report.stopped == "failing"
    assert "in a row failed" in report.summary()
    assert (report.written, len(model.prompts)) == (2, report.failed + 2)
    assert report.failed in (5, 6)
    with fake_model(answer):
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=1, max_failures=20)
    assert (report.stopped, report.failed) == (None, 8)


async def test_a_refused_key_stops_the_job(file: TableFile) -> None:
    class UnauthorizedError(Exception):
        status_code = 401

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        raise UnauthorizedError("incorrect API key")
        yield ""

    with fake_model(answer) as model:
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=2)
    assert report.stopped == "key_refused"
    assert "the API key is refused" in report.summary()
    assert len(model.prompts) <= 2


async def test_max_tokens_total_stops_at_about_the_budget(file: TableFile) -> None:
    with fake_model() as model:  # Two words in and one out: three tokens a row.
        report = await file.enrich("t", "{{ body }}", column="answer", concurrency=1, max_tokens_total=12)
    assert report.stopped == "max_tokens_total"
    assert 3 <= report.written <= 6
    assert len(model.prompts) == report.written
    assert report.input_tokens + report.output_tokens == 3 * report.written


async def test_an_overwriting_job_says_which_rows_are_left(file: TableFile) -> None:
    file.run("update t set answer = 'old'")
    job = job_of(file, overwrite=True, concurrency=1, where="id > 1")

    async def answer(prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "row 4":
            job.stop()
        yield "new"

    with fake_model(answer) as model:
        first = await job.run()
        assert (first.stopped, first.resume_where) == (
            "stopped",
            f'(id > 1) and "id" > {model.prompts[-1].split()[1]}',
        )
        second = await file.enrich(
            "t", "{{ body }}", column="answer", overwrite=True, where=first.resume_where
        )
        assert len(model.prompts) == first.written + second.written == 9
    assert file.run("select id from t where answer = 'old'") == [(1,)]


async def test_an_overwriting_job_begins_again_with_the_first_row_that_was_cut_off(file: TableFile) -> None:
    with gated("row 1", "row 3") as gate:
        job = job_of(file, overwrite=True, concurrency=2)
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def _() -> None:
                await gate.until_asked(4)
                job.stop(grace_seconds=0.0)

            report = await job.run()
    assert report.resume_where == '"id" >= 2'
    assert file.run("select id from t where answer is not null") == [(1,), (3,)]


async def test_a_second_job_on_the_same_column_is_told_so(file: TableFile) -> None:
    with gated() as gate:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(job_of(file).run)
            await gate.until_asked(1)
            with pytest.raises(AlreadyRunning, match=r"already filling the column 'answer' of 't' \(process"):
                await file.enrich("t", "{{ body }}", column="ANSWER")
            other = await file.enrich("t", "{{ body }}", column="other", limit=1, model="second")
            assert other.written == 1
            gate.open.set()
    assert file.beside() == ["data.db"]


def test_locks_of_databases_in_memory_belong_to_the_process() -> None:
    class Database:
        path = None
        memory_name = "shared"

    with only_job(Database(), "t", ["b", "a"]):
        with pytest.raises(AlreadyRunning, match="in this process"), only_job(Database(), "T", ["A"]):
            pass
        with only_job(Database(), "t", ["c"]):
            pass
    with only_job(Database(), "t", ["a"]):
        pass


async def test_a_database_in_memory_can_be_enriched() -> None:
    from datasette.app import Datasette

    from datasette_llm.backends.datasette_side import call

    datasette = Datasette(memory=True)
    database = datasette.add_memory_database("enrich_in_memory")
    await call(database.execute_write_script, "drop table if exists t; create table t(a)")
    await call(database.execute_write, "insert into t values ('x')")
    with fake_model():
        report = await enrich(datasette, "enrich_in_memory", "t", "{{ a }}", column="b", model="fake")
    assert report.written == 1
    close_datasette(datasette)


async def test_a_dry_run_counts_shows_prompts_and_sends_nothing(file: TableFile) -> None:
    before = file.run("select sql from sqlite_master")
    with fake_model() as model:
        report = await file.enrich("t", "Say {{ body }}", column="new", dry_run=True)
        limited = await file.enrich("t", "Say {{ body }}", column="answer", dry_run=True, limit=2)
        assert model.prompts == []
    assert (report.total, report.written, report.model) == (10, 0, "fake")
    assert report.prompts == ["Say row 1", "Say row 2", "Say row 3"]
    assert (limited.total, len(limited.prompts)) == (2, 2)
    assert "10 rows of t (new) would be sent to fake" in report.summary()
    assert file.run("select sql from sqlite_master") == before


async def test_progress_is_told_and_the_last_one_is_complete(file: TableFile) -> None:
    seen: list[tuple[int, int | None]] = []

    async def on_progress(progress: EnrichProgress) -> None:
        seen.append((progress.done, progress.total))

    with fake_model():
        await job_of(file, on_progress=on_progress).run()
    assert seen[-1] == (10, 10)


async def test_system_schema_options_and_key_reach_the_model(file: TableFile) -> None:
    with fake_model() as model:
        with pytest.raises(EnrichInputError, match=r"option 'temprature' is not right .*'temperature'"):
            await file.enrich("t", "{{ body }}", column="answer", options={"temprature": "1"})
        with pytest.raises(EnrichInputError, match="option 'temperature' is not right"):
            await file.enrich("t", "{{ body }}", column="answer", options={"temperature": "hot"})
        assert model.prompts == []
        report = await file.enrich(
            "t", "{{ body }}", column="answer", options={"temperature": "0.5"}, system="Be brief", limit=1
        )
    assert report.written == 1


async def test_a_model_without_schemas_is_refused_before_anything_is_sent(file: TableFile) -> None:
    with fake_model() as model:
        model.supports_schema = False
        with pytest.raises(EnrichInputError, match="does not support schemas"):
            await file.enrich("t", "{{ body }}", schema="name")
        assert model.prompts == []
    assert ("name",) not in file.run("select name from pragma_table_info('t')")


async def test_rows_that_cannot_be_rendered_are_recorded_and_the_others_go_on(file: TableFile) -> None:
    file.run("update t set body = x'ff' where id = 2")
    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer")
    assert (report.written, report.failed) == (9, 1)
    assert file.run("select pk, attempts, error from _llm_enrich_errors") == [
        (2, 0, "cannot be rendered: the prompt shows a blob that is not text (1 byte)")
    ]


async def test_the_report_is_json(file: TableFile) -> None:
    import json

    with fake_model():
        report = await file.enrich("t", "{{ body }}", column="answer")
    data = json.loads(json.dumps(report.as_dict()))
    assert (data["written"], data["done"], data["stopped"]) == (10, 10, None)


async def test_without_a_model_it_says_how_to_configure_one(file: TableFile) -> None:
    with pytest.raises(ModelNotFoundError):
        await file.enrich("t", "{{ body }}", column="answer", model=None)

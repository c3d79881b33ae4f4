"""Answers that have been paid for, while the database cannot be written."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm.backends.datasette_side import call, open_side
from datasette_llm.enrich import EnrichInputError, EnrichJob, JobSpec
from datasette_llm.enrich.command import exit_code
from datasette_llm.enrich.reading.selection import Row
from datasette_llm.enrich.telling.display import line
from datasette_llm.enrich.trouble import trouble_of
from datasette_llm.enrich.writing import side_file, writer
from datasette_llm.enrich.writing.results import Result
from datasette_llm.enrich.writing.side_file import SideFile

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.real_clock


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the side file goes when it cannot be beside the database."""
    directory = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    """A table ``t`` of 60 rows, 'row 1' to 'row 60'."""
    file = TableFile(tmp_path, "create table t (id integer primary key, body, answer)")
    file.run_many("insert into t(body) values (?)", [(f"row {n}",) for n in range(1, 61)])
    yield file
    file.close()


def answers_of(file: TableFile) -> Path:
    return Path(file.path + "-llm-answers.jsonl")


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not holds():  # noqa: ASYNC110 - what another thread does sets no event
            await anyio.sleep(0.02)


def make_file(path: Path) -> None:
    path.write_text("no directory")


def records(file: TableFile) -> list[dict[str, Any]]:
    return [json.loads(text) for text in answers_of(file).read_text().splitlines()]


def written(file: TableFile) -> int:
    return int(file.run("select count(*) from t where answer = upper(body)")[0][0])


class Locking:
    """Answers in capitals; another program locks the database when the ``after``th prompt comes."""

    def __init__(self, file: TableFile, after: int) -> None:
        self.asked = 0
        self._file = file
        self._after = after
        self._conn: sqlite3.Connection | None = None

    async def __call__(self, prompt: str) -> Any:
        self.asked += 1
        if self.asked == self._after:
            self._conn = sqlite3.connect(self._file.path, timeout=5, check_same_thread=False)
            self._conn.execute("begin immediate")
        yield prompt.upper()

    def release(self) -> None:
        if self._conn is not None:
            self._conn.close()
            self._conn = None


@contextmanager
def locking(file: TableFile, after: int = 10) -> Iterator[Locking]:
    answers = Locking(file, after)
    with fake_model(answers):
        try:
            yield answers
        finally:
            answers.release()


def job_of(file: TableFile, **kwargs: Any) -> EnrichJob:
    on_progress = kwargs.pop("on_progress", None)
    asked: dict[str, Any] = {
        "database": "data",
        "table": "t",
        "prompt": "{{ body }}",
        "column": "answer",
        "model": "fake",
        "concurrency": 2,
        **kwargs,
    }
    return EnrichJob(file.datasette(), JobSpec(**asked), on_progress=on_progress)


async def test_a_lock_that_passes_costs_nothing_and_nothing_is_sent_meanwhile(file: TableFile) -> None:
    seen: list[str] = []
    asked: list[int] = []

    with locking(file) as answers:

        def look(progress: Any) -> None:
            if progress.waiting:
                seen.append(line(progress))
                asked.append(answers.asked)
                if len(asked) == 3:
                    answers.release()

        report = await job_of(file, on_progress=look).run()
    assert (report.written, report.in_side_file, report.stopped, written(file)) == (60, 0, None, 60)
    assert "waiting: another program has locked data.db, " in seen[0]
    assert asked[1] == asked[2]
    assert not answers_of(file).exists()


async def test_a_lock_that_stays_leaves_a_file_that_the_next_run_takes_up_first(file: TableFile) -> None:
    with locking(file) as answers:
        report = await job_of(file, lock_timeout=0.5).run()
    assert report.stopped == "database"
    assert report.written + report.in_side_file == answers.asked == report.written + len(records(file))
    assert (report.failed, report.lost, report.cancelled, written(file)) == (0, 0, 0, report.written)
    assert exit_code(report) == 1
    assert "Stopped early: another program has locked data.db for " in report.summary()
    assert f"could not be written and went to {answers_of(file)}: the next run" in report.summary()
    with fake_model() as model:
        again = await job_of(file).run()
    assert (again.taken_up, again.outdated) == (report.in_side_file, 0)
    assert again.written == len(model.prompts) == 60 - answers.asked
    assert f"{again.taken_up} answers written that an earlier run had to leave" in again.summary()
    assert not answers_of(file).exists()
    assert file.run("select count(*) from t where answer is null") == [(0,)]


async def test_answers_that_no_longer_fit_are_dropped(file: TableFile) -> None:
    with locking(file, after=3) as answers:
        report = await job_of(file, lock_timeout=0, limit=3, concurrency=1).run()
        assert report.in_side_file == answers.asked == 3
    file.run("delete from t where id = 1")
    file.run("update t set body = 'edited' where id = 2")
    file.run("update t set answer = 'by hand' where id = 3")
    with fake_model():
        again = await job_of(file, limit=1).run()
    assert (again.taken_up, again.outdated) == (0, 3)
    assert "3 answers dropped that an earlier run had left in a file" in again.summary()
    assert not answers_of(file).exists()
    assert file.run("select answer from t where id = 3") == [("by hand",)]


async def test_taken_up_twice_lands_once(file: TableFile) -> None:
    with locking(file):
        report = await job_of(file, lock_timeout=0.2).run()
    kept = answers_of(file).read_bytes()
    with fake_model():
        await job_of(file).run()
        answers_of(file).write_bytes(kept)  # Killed after writing the table, before removing the lines.
        again = await job_of(file).run()
    assert report.in_side_file
    assert (again.taken_up, again.outdated, again.written) == (0, 0, 0)
    assert "Nothing left to do" in again.summary()


async def test_lines_of_others_and_torn_lines(file: TableFile) -> None:
    other = {"table": "t", "columns": ["another"], "key": [1], "values": ["x"], "asked_of": [], "model": None}
    text = json.dumps(other | {"fingerprint": "", "overwrite": False})
    answers_of(file).write_text(text + "\n" + '{"table": "t", "ke')
    with locking(file):
        report = await job_of(file, lock_timeout=0.2).run()
    with fake_model():
        again = await job_of(file).run()
    assert again.taken_up == report.in_side_file > 0
    assert answers_of(file).read_text() == text + "\n"


async def test_failures_are_kept_too(file: TableFile) -> None:
    answers = Locking(file, after=1)

    async def refuse(prompt: str) -> Any:
        async for _ in answers(prompt):
            pass
        raise ValueError("no")
        yield ""

    with fake_model(refuse):
        report = await job_of(file, lock_timeout=0.2, limit=2).run()
    answers.release()
    assert (report.failed, report.in_side_file, report.lost) == (2, 0, 0)
    assert len(records(file)) == 2
    with fake_model() as model:
        await job_of(file, limit=1, where="id > 50").run()
        failed = file.run("select pk, error from _llm_enrich_errors order by pk")
        assert failed == [(1, "ValueError: no"), (2, "ValueError: no")]
        await job_of(file, retry_failed=True).run()
    assert len(model.prompts) == 3


async def test_an_overwriting_job_replaces_when_it_is_taken_up(file: TableFile) -> None:
    file.run("update t set answer = 'old'")
    with locking(file, after=1):
        report = await job_of(file, lock_timeout=0, overwrite=True, limit=2).run()
    assert (report.in_side_file, written(file)) == (2, 0)
    with fake_model():
        await job_of(file).run()
    assert written(file) == 2


async def test_without_a_place_beside_the_database_it_is_one_of_the_users_own(
    file: TableFile, temporary: Path
) -> None:
    answers_of(file).mkdir()  # A file of that name cannot be made.
    with locking(file):
        report = await job_of(file, lock_timeout=0.2).run()
    assert report.side_file is not None
    path = Path(report.side_file)
    assert path.is_relative_to(temporary)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert report.in_side_file == len(SideFile(file.path, "t", ["answer"]).read()) > 0
    with fake_model():
        again = await job_of(file).run()
    assert again.taken_up == report.in_side_file
    assert SideFile(file.path, "t", ["answer"]).read() == []


async def test_what_could_be_written_nowhere_is_said_to_be_lost(
    file: TableFile, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LAST_TRIES", 2)
    answers_of(file).mkdir()
    for name in ("datasette-llm", f"datasette-llm-{getattr(os, 'getuid', str)()}"):
        make_file(temporary / name)
    with locking(file) as answers:
        report = await job_of(file, lock_timeout=0.2).run()
    assert report.lost > 0
    assert (report.in_side_file, report.side_file) == (0, None)
    assert report.written + report.lost == answers.asked
    assert "lost, since neither the database nor a file" in report.summary()
    assert exit_code(report) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
async def test_a_place_that_others_can_write_to_is_no_place(file: TableFile, temporary: Path) -> None:
    answers = SideFile(file.path, "t", ["answer"])
    answers_of(file).mkdir()
    answers.append([Result(Row((1,), {}), ("a",))], model=None, overwrite=False)
    assert answers.path is not None
    answers.path.parent.chmod(0o777)
    with pytest.raises(OSError, match="only this user"):
        answers.append([Result(Row((2,), {}), ("b",))], model=None, overwrite=False)
    assert answers.read() == []


async def test_half_of_an_append_is_taken_back(file: TableFile, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = SideFile(file.path, "t", ["answer"])
    answers.append([Result(Row((1, b"\x00"), {"body": None}), ("a",))], model="m", overwrite=False)
    original = side_file._write
    refused: list[int] = []

    def write_half(descriptor: int, data: bytes) -> None:
        if not refused:
            refused.append(len(data))
            original(descriptor, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        original(descriptor, data)

    monkeypatch.setattr(side_file, "_write", write_half)
    answers.append([Result(Row((2, b"\x01"), {"body": 1.5}), (b"\xff",))], model="m", overwrite=False)
    assert len(records(file)) == 1
    assert [(found.key, found.values) for found in answers.read()] == [
        ((1, b"\x00"), {"answer": "a"}),
        ((2, b"\x01"), {"answer": b"\xff"}),
    ]
    answers.forget()
    assert answers.read() == []


async def test_a_killed_process_loses_no_more_than_a_second_while_it_waits(file: TableFile) -> None:
    with locking(file) as answers:
        job = job_of(file)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(job.run)
            await until(
                lambda: answers_of(file).exists() and written(file) + len(records(file)) == answers.asked
            )
            answers.release()
    # It could be written after all, and then there is nothing to take up.
    assert not answers_of(file).exists()
    assert written(file) == 60


async def test_stopping_waits_for_a_lock_as_long_as_the_grace(file: TableFile) -> None:
    with locking(file) as answers:

        def look(progress: Any) -> None:
            if progress.waiting:
                job.stop("SIGINT", grace_seconds=0.1)

        job = job_of(file, on_progress=look, lock_timeout=1_000)
        report = await job.run()
        assert report.stopped == "SIGINT"
        assert report.written + report.in_side_file == answers.asked
        assert report.in_side_file == len(records(file)) > 0


async def test_cancelled_while_locked_it_leaves_the_file(
    file: TableFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_AT_END", 0.1)
    with locking(file) as answers:
        job = job_of(file)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(job.run)
            await until(lambda: bool(job.progress.waiting))
            tasks.cancel_scope.cancel()
    assert written(file) + len(records(file)) == answers.asked


def test_what_may_pass_is_told_from_what_does_not() -> None:
    class Database:
        name = "data"
        path = "/somewhere/data.db"

    def words(text: str) -> str | None:
        return trouble_of(sqlite3.OperationalError(text), Database())

    assert words("database is locked") == "another program has locked data.db"
    assert words("database or disk is full") == "the disk that data.db is on is full"
    assert "too many files" in str(words("unable to open database file"))
    assert words("disk I/O error") == "the disk that data.db is on reports an error"
    assert "read-only" in str(words("attempt to write a readonly database"))
    assert words("no such table: t") is None
    assert trouble_of(sqlite3.DatabaseError("database disk image is malformed"), Database()) is None


async def test_a_full_database_is_waited_for_in_the_same_way(file: TableFile) -> None:
    datasette = file.datasette()

    def limit(conn: sqlite3.Connection) -> None:
        conn.execute("pragma max_page_count = 1")  # SQLite takes what there is now.

    async def answer(prompt: str) -> Any:
        yield prompt.upper() * 2_000

    async with open_side():
        await call(datasette.get_database("data").execute_write_fn, limit, transaction=False)
    spec = JobSpec(
        database="data", table="t", prompt="{{ body }}", column="answer", model="fake", lock_timeout=0.3
    )
    with fake_model(answer) as model:
        report = await EnrichJob(datasette, spec).run()
        assert report.trouble is not None
        assert "the disk that data.db is on is full" in report.trouble
        assert report.written + report.in_side_file == len(model.prompts)
        again = await job_of(file).run()
    assert again.taken_up == report.in_side_file > 0
    assert again.taken_up + again.written + report.written == 60


async def test_a_negative_timeout_is_refused(file: TableFile) -> None:
    with fake_model(), pytest.raises(EnrichInputError, match="lock_timeout must not be less than 0"):
        await job_of(file, lock_timeout=-1).run()

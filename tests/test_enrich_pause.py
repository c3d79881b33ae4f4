"""A job that somebody has pause, and one whose run is on record before its first answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm.enrich.job import EnrichJob
from datasette_llm.enrich.spec import JobSpec

from .enrich_tables import TableFile, fake_model

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from datasette_llm.enrich import EnrichReport

pytestmark = pytest.mark.real_clock

SPEC = JobSpec(database="data", table="t", prompt="{{ body }}", column="answer", model="fake", concurrency=1)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TableFile]:
    file = TableFile(
        tmp_path,
        "create table t (id integer primary key, body)",
        "insert into t (body) values ('one'), ('two'), ('three'), ('four')",
    )
    yield file
    file.close()


async def test_a_paused_job_asks_about_no_more_rows_until_it_goes_on(file: TableFile) -> None:
    reports: list[EnrichReport] = []
    paused = anyio.Event()

    async def script(prompt: str) -> Any:
        if prompt == "one":
            job.pause()
        yield prompt

    def look(progress: Any) -> None:
        if progress.paused and progress.done == 1 and not progress.running:
            paused.set()

    async def run() -> None:
        reports.append(await job.run())

    with fake_model(script) as fake:
        job = EnrichJob(file.datasette(), SPEC, on_progress=look)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await paused.wait()
            assert fake.prompts == ["one"]
            assert file.run("select answer from t where id = 1") == [("one",)]
            job.go_on()
    assert fake.prompts == ["one", "two", "three", "four"]
    assert reports[0].written == 4


async def test_a_paused_job_can_be_stopped(file: TableFile) -> None:
    async def script(prompt: str) -> Any:
        job.pause()
        yield prompt

    def look(progress: Any) -> None:
        if progress.paused and progress.done == 1:
            job.stop()

    with fake_model(script):
        job = EnrichJob(file.datasette(), SPEC, on_progress=look)
        report = await job.run()
    assert (report.written, report.stopped) == (1, "stopped")


async def test_a_run_can_be_on_record_before_its_first_answer(file: TableFile) -> None:
    begun: list[tuple[int, Any]] = []

    async def script(prompt: str) -> Any:
        begun.append((len(numbers), file.run("select id, job, written, ended from _llm_runs")))
        raise ValueError(f"no answer to {prompt}")
        yield ""

    numbers: list[int] = []
    with fake_model(script):
        report = await EnrichJob(file.datasette(), SPEC, on_begun=numbers.append).run()
    assert begun[0] == (1, [(1, None, 0, None)])
    assert numbers == [1]
    assert report.run == 1
    assert file.run("select outcome, failed from _llm_runs") == [("done", 4)]
    (failure,) = report.failures
    assert failure.rows == [(1,), (2,), (3,), (4,)]

"""A server collects by itself what was submitted in batches, and its pages show how they stand."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from datasette.app import Datasette
from datasette.utils import StartupError

from benchmarks.provider import json_reply
from datasette_llm.access.settings import parse_settings
from datasette_llm.calls.batches import http
from datasette_llm.enrich.writing.lock import only_job
from datasette_llm.pages.jobs import collecting, is_possible
from datasette_llm.pages.jobs.collecting import Collector

from ..patience import PATIENCE_SECONDS
from ..protocols import PLUGIN_MARKS
from .jobs import HOUR, Job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    *PLUGIN_MARKS,
    pytest.mark.skipif(not is_possible(Datasette), reason="this Datasette has no background tasks"),
]

JOBS = "/data/-/llm/jobs"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # Datasette serves its pages with it.


@asynccontextmanager
async def serving(job: Job, collect: Any = 0.05, **options: Any) -> AsyncIterator[Any]:
    """A server whose background tasks run."""
    datasette = job.file.datasette(
        config={"plugins": {"datasette-llm": {**job.config, "collect_batches": collect}}}, **options
    )
    await datasette.start_background_tasks()
    try:
        yield datasette
    finally:
        await datasette.invoke_shutdown()


def silent(job: Job, **options: Any) -> Any:
    """A server that looks at nothing by itself."""
    return job.file.datasette(
        config={"plugins": {"datasette-llm": {**job.config, "collect_batches": False}}}, **options
    )


async def text_of(datasette: Any, path: str) -> str:
    answer = await datasette.client.get(path)
    assert answer.status_code == 200
    return " ".join(re.sub(r"<[^>]+>", " ", answer.text.partition("<main")[2]).split())


async def states(datasette: Any) -> list[tuple[str, int]]:
    jobs = (await datasette.client.get(JOBS + ".json")).json()["jobs"]
    return [(job["state"], job["written"]) for job in jobs]


async def all_written(datasette: Any) -> bool:
    jobs = await states(datasette)
    return {state for state, _ in jobs} == {"done"} and sum(written for _, written in jobs) == 10


async def test_a_server_collects_by_itself_and_shows_how_batches_stand(job: Job) -> None:
    await job.run(batch_size=4)
    async with serving(job) as datasette:
        page = await text_of(datasette, f"{JOBS}/1")
        assert "With the provider: not all batches are collected" in page
        assert "3 batches with the provider, 0 of 10 requests answered" in page
        assert "batch-1 in progress" in page
        assert "openai: 0 of 4 answered, what is not by" in page
        assert "3 batches with the provider" in await text_of(datasette, JOBS)
        assert await states(datasette) == [("submitted", 0)]
        job.provider.advance(2 * HOUR)
        with anyio.fail_after(PATIENCE_SECONDS):
            # In one look or in several: the provider may have been asked as its clock moved on.
            while not await all_written(datasette):  # noqa: ASYNC110
                await anyio.sleep(0.02)  # A page is all that tells.
        assert "3 batches, nothing left to collect" in await text_of(datasette, f"{JOBS}/1")
        assert "in batches, at their price" in await text_of(datasette, f"{JOBS}/2")
    assert job.values() == job.expected
    assert set(job.provider.asked.values()) == {1}
    assert (job.rows_in_batches(), job.provider.live) == (0, 0)


async def test_it_sends_nothing_and_takes_what_whoever_submitted_it_wanted(job: Job) -> None:
    await job.run(limit=4, where="id > 2", allow_empty=True, max_cost=5.0)
    # Rows that wait are for whoever gives the command again; these answers are paid for.
    job.provider.answer = lambda prompt: "" if prompt == "row 3" else f"answer to: {prompt}"
    job.provider.advance(2 * HOUR)
    await Collector(silent(job)).look(60)
    assert job.values() == {
        n: "" if n == 3 else f"answer to: row {n}" if n in (4, 5, 6) else None for n in range(1, 11)
    }
    assert len(job.provider.batches) == 1


async def test_what_another_process_is_at_is_left_to_it(job: Job) -> None:
    await job.run()
    job.provider.advance(2 * HOUR)
    datasette = silent(job)
    asked = len(job.provider.requests)
    with only_job(datasette.databases["data"], "t", ["answer"]):
        await Collector(datasette).look(60)
    assert len(job.provider.requests) == asked
    # Two at once: one of them collects, and each value is written once.
    job.file.run("create table writes (id integer)")
    job.file.run(
        "create trigger watch after update of answer on t begin insert into writes values (new.id); end"
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Collector(datasette).look, 60)
        tasks.start_soon(Collector(silent(job)).look, 60)
    await Collector(datasette).look(60)
    assert job.values() == job.expected
    assert job.file.run("select count(*), count(distinct id) from writes") == [(10, 10)]


async def test_what_cannot_be_collected_is_said_and_not_tried_all_the_time(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    await job.run()
    job.provider.advance(2 * HOUR)
    datasette = silent(job)
    collector = collecting.collector_of(datasette)
    job.provider.instead = lambda asked: json_reply(401, {"error": {"message": "no such key"}})
    await collector.look(60)
    page = await text_of(datasette, f"{JOBS}/1")
    assert "They are not collected here: The provider cannot be asked about batches: no such key" in page
    asked = len(job.provider.requests)
    await collector.look(60)
    assert len(job.provider.requests) == asked
    job.provider.instead = lambda asked: None
    await Collector(datasette).look(60)
    assert job.values() == job.expected
    await collector.look(60)
    assert collector.troubles == {}


async def test_batches_that_a_server_would_ask_otherwise_are_left_to_their_command(job: Job) -> None:
    await job.run()
    job.provider.advance(2 * HOUR)
    config = {"purposes": {"other": {"model": "batched"}}, "default_model": {"model": "batched"}}
    job.file.run("update _llm_runs set prompt = 'Other {{ text }}'")
    datasette = job.file.datasette(config={"plugins": {"datasette-llm": config}})
    collector = Collector(datasette)
    await collector.look(60)
    ((_, trouble),) = collector.troubles.items()
    assert "the command that submitted them collects them" in trouble.text
    assert set(job.values().values()) == {None}
    job.file.run("delete from _llm_runs")
    collector.troubles.clear()
    await collector.look(60)
    assert "not on record any more" in collector.troubles["data", 1].text


async def test_an_immutable_database_is_shown_and_left_alone(job: Job, tmp_path: Path) -> None:
    await job.run()
    job.provider.advance(2 * HOUR)
    datasette = Datasette([], immutables=[job.file.path])
    await Collector(datasette).look(60)
    assert set(job.values().values()) == {None}
    assert "1 batch with the provider" in await text_of(datasette, f"{JOBS}/1")
    datasette.close()


async def test_a_database_that_is_gone_keeps_no_other_from_being_looked_at(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await job.run()
    job.provider.advance(2 * HOUR)
    other = tmp_path / "a_file.db"
    other.write_bytes(b"no database at all, but long enough to be taken for one" * 20)
    datasette = Datasette([str(other), job.file.path])
    await Collector(datasette).look(60)
    assert job.values() == job.expected
    assert "The batches in a_file cannot be looked at" in caplog.text
    datasette.close()


async def test_nothing_is_collected_where_that_is_switched_off(job: Job) -> None:
    await job.run()
    job.provider.advance(2 * HOUR)
    asked = len(job.provider.requests)
    async with serving(job, collect=False) as datasette:
        assert collecting.trouble_with(datasette, "data", 1) is None
        assert "1 batch with the provider" in await text_of(datasette, f"{JOBS}/1")
    assert len(job.provider.requests) == asked


@pytest.mark.parametrize(
    ("value", "seconds"), [(True, 60), ("false", 0), (False, 0), ("90", 90), (None, 60), (7.5, 7.5)]
)
def test_how_often_a_server_looks_is_a_setting(value: Any, seconds: float) -> None:
    assert parse_settings({"collect_batches": value}).collect_batches == seconds


@pytest.mark.parametrize("value", ["often", -1, [5], float("inf")])
def test_a_setting_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(StartupError, match="collect_batches: must be true, false or a number of seconds"):
        parse_settings({"collect_batches": value})

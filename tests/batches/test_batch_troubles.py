"""What may go wrong between a job with batches and its provider: it is said, and nothing is lost."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from benchmarks.batch_api import broken
from benchmarks.provider import json_reply
from datasette_llm.backends.datasette_side import open_side
from datasette_llm.calls.batches import http
from datasette_llm.calls.batches.anthropic import AnthropicBatches
from datasette_llm.calls.batches.openai import OpenAIBatches
from datasette_llm.enrich import EnrichError, EnrichInputError, EnrichJob, JobSpec
from datasette_llm.enrich.batches import collection, courier, outbox
from datasette_llm.enrich.batches.way import BatchWay
from datasette_llm.enrich.database import write

from ..hooks import hooked
from ..protocols import PLUGIN_MARKS
from .jobs import Job, anthropic_model, job_of, openai_model

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Iterator

    from benchmarks.batch_api import Asked
    from benchmarks.batch_provider import BatchProvider
    from benchmarks.provider import Reply

pytestmark = PLUGIN_MARKS

BEGIN, UPLOAD = "/v1/batches", "/v1/files"
PICTURE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001"
    "e221bc330000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once, and what is listed is listed at once."""
    monkeypatch.setattr(courier, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(courier, "LISTED_SECONDS", 0.0)
    monkeypatch.setattr(collection, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(http, "ATTEMPTS", 1)


@pytest.fixture
def claude(tmp_path: Path, provider: BatchProvider) -> Iterator[Job]:
    with job_of(anthropic_model, tmp_path, provider) as job:
        yield job


def answering(path: str, reply: Reply, times: int = 10_000) -> Callable[[Asked], Reply | None]:
    """Answer so many POST requests to a path with this."""
    left = [times]

    def answer(asked: Asked) -> Reply | None:
        if (asked.method, asked.path) != ("POST", path) or not left[0]:
            return None
        left[0] -= 1
        return reply

    return answer


def unanswering(asked: Asked) -> None:
    pass


class Killed(Exception):
    """Stands for the end of the process."""


async def die(*_: Any, **__: Any) -> Any:
    raise Killed


async def all_is_well(job: Job) -> None:
    """Submit what is left, collect it, and see that all came out right and nothing was sent twice."""
    job.provider.instead = unanswering
    await job.run()
    await job.run_later()
    assert job.values() == job.expected
    assert set(job.provider.asked.values()) == {1}
    assert (job.rows_in_batches(), job.files()) == (0, [])


@pytest.mark.parametrize("path", [BEGIN, UPLOAD])
async def test_a_refusal_that_passes_is_waited_for(job: Job, path: str) -> None:
    busy = json_reply(429, {"error": {"message": "too many requests", "code": "rate_limit_exceeded"}})
    job.provider.instead = answering(path, busy, times=2)
    assert (await job.run()).submitted == 10
    await all_is_well(job)


@pytest.mark.parametrize("path", [BEGIN, UPLOAD])
async def test_a_batch_that_cannot_be_sent_is_kept_and_the_next_run_sends_it(job: Job, path: str) -> None:
    job.provider.instead = answering(path, json_reply(503, {"error": {"message": "come back later"}}))
    with pytest.raises(EnrichError, match=r"come back later.*It is kept"):
        await job.run()
    assert job.rows_in_batches() == 10
    assert len(job.files()) == 1
    await all_is_well(job)


async def test_a_connection_that_breaks_before_a_batch_was_begun(job: Job) -> None:
    job.provider.instead = answering(BEGIN, broken())
    with pytest.raises(EnrichError, match="It is kept"):
        await job.run()
    await all_is_well(job)


async def test_a_limit_that_is_not_said_is_searched_for(job: Job) -> None:
    refusal = json_reply(400, {"error": {"message": "too much", "code": "token_limit_exceeded"}})
    job.file.run("delete from t where id > 6")
    job.provider.instead = answering(BEGIN, refusal, times=2)
    assert (await job.run()).submitted > 0
    limits = job.file.run(
        "select token_limit from _llm_enrich_batches where token_limit is not null order by id"
    )
    # Half of what was too much, and half of that.
    assert len(limits) == 2
    assert limits[0][0] >= 2 * limits[1][0] - 1
    for _ in range(8):
        await job.run_later()
    await all_is_well(job)


async def test_a_batch_that_the_provider_has_forgotten_waits_again(job: Job) -> None:
    await job.run()
    job.provider.batches.clear()
    job.provider.asked.clear()
    report = await job.run_later()
    assert report.returned == 10
    assert "10 rows came back without an answer" in report.summary()
    await all_is_well(job)


async def test_a_batch_that_the_provider_gives_up_says_why(job: Job) -> None:
    await job.run()
    (held,) = job.provider.batches.values()
    held.state = "failed"
    report = await job.run()
    assert report.returned == 10
    assert "The provider gave up a batch: failed" in report.summary()
    job.provider.asked.clear()
    await all_is_well(job)


async def test_a_provider_that_does_not_say_how_batches_stand(job: Job) -> None:
    await job.run()
    job.provider.instead = lambda asked: json_reply(500, {"error": {"message": "out of order"}})
    with pytest.raises(EnrichError, match=r"cannot be asked about batches: out of order\. Run this again"):
        await job.run()
    await all_is_well(job)


async def test_what_is_not_sent_yet_is_not_sent_to_be_cancelled(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(OpenAIBatches, "upload", die)
        with pytest.raises(Killed):
            await job.run()
    report = await job.run(batch_cancel=True)
    assert (report.batch.cancelled, job.provider.batches, job.files()) == (1, {}, [])
    await all_is_well(job)


async def test_results_that_always_break_off_are_taken_later(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "PAGE_LINES", 2)
    await job.run()
    job.provider.settings.cut_downloads = collection.TRIES
    report = await job.run_later()
    # The first half came whole each time.
    assert 0 < report.written < 10
    assert report.in_batches == 10 - report.written
    assert (await job.run()).written == 10 - report.written
    await all_is_well(job)


async def test_who_stops_while_answers_are_taken_gets_the_rest_later(job: Job) -> None:
    await job.run(batch_size=5)
    report = await job.run_later(on_settled=lambda running: running.stop("SIGINT"))
    assert report.stopped == "SIGINT"
    assert report.written < 10
    await all_is_well(job)


async def test_who_stops_while_rows_are_submitted_sends_nothing_more(job: Job) -> None:
    running: list[EnrichJob] = []

    def policy(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            if prompt == "row 5":
                running[0].stop("SIGINT")
            yield

        return wrapper

    datasette = job.file.datasette()
    asked: dict[str, Any] = {"prompt": "{{ text }}", "column": "answer", "model": "batched", "batch": True}
    running.append(
        EnrichJob(datasette, JobSpec(database="data", table="t", **asked), way=BatchWay(datasette))
    )
    with hooked(llm_prompt_context=policy):
        report = await running[0].run()
    assert (report.stopped, report.submitted, job.provider.batches) == ("SIGINT", 0, {})
    assert (job.rows_in_batches(), job.files()) == (0, [])
    await all_is_well(job)


async def test_rows_that_share_a_refused_question_wait(job: Job) -> None:
    job.file.run("update t set text = 'the same' where id % 2")
    allowed: list[str] = []

    def policy(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            if prompt == "the same" and not allowed:
                raise PermissionError("not that one")
            yield

        return wrapper

    with hooked(llm_prompt_context=policy):
        report = await job.run()
        assert (report.submitted, report.failed) == (5, 1)
        allowed.append("the same")
        assert (await job.run()).submitted == 5
    assert job.provider.asked["the same"] == 1
    await all_is_well(job)


async def test_rows_that_share_a_question_without_room_wait(job: Job) -> None:
    job.file.run("update t set text = 'the same' where id > 5")
    job.provider.settings.token_limit = 100
    report = await job.run()
    assert 0 < report.submitted < 10
    assert "no more tokens" in report.summary()
    job.provider.settings.token_limit = 0
    for _ in range(6):
        await job.run_later()
    await all_is_well(job)


async def test_files_go_with_their_rows(tmp_path: Path, provider: BatchProvider) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(PICTURE)
    asked: dict[str, Any] = {"attachments": (str(picture),), "files": True}

    def seeing(provider: BatchProvider) -> Any:
        model = openai_model(provider, "seeing")
        model.attachment_types = {"image/png"}
        return model

    with job_of(seeing, tmp_path, provider) as job:
        assert (await job.run(**asked)).submitted == 10
        body = json.dumps(next(iter(provider.batches.values())).lines[0][1])
        assert "data:image/png;base64," in body
        # A file that is another one now makes it another question: its answer is dropped.
        picture.write_bytes(PICTURE + b"\n")
        report = await job.run_later(limit=1, **asked)
        assert (report.written, report.changed) == (0, 10)
        picture.unlink()
        await job.run_later(**asked)
        assert job.rows_in_batches() == 0


@pytest.mark.parametrize(
    "place",
    [
        "missing",
        pytest.param(
            "full", marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device is full")
        ),
    ],
)
async def test_a_file_that_cannot_be_written_is_said_and_nothing_is_sent(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "full":
        where = tmp_path / "full.jsonl"
        where.symlink_to("/dev/full")
    else:
        where = tmp_path / "none" / "file.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(outbox, "file_of", lambda database, reference: where)
        with pytest.raises(EnrichError, match="The file of a batch cannot be written"):
            await job.run()
    assert job.provider.batches == {}
    await all_is_well(job)


async def test_a_provider_that_finalizes_is_waited_for_in_its_words(job: Job) -> None:
    await job.run()
    (held,) = job.provider.batches.values()
    shown = json.loads(json_reply(200, held.api.shown(held)).parts[0].partition(b"\r\n\r\n")[2])
    shown |= {"status": "finalizing", "request_counts": {"total": 10, "completed": 10, "failed": 0}}
    job.provider.instead = lambda asked: (
        json_reply(200, shown) if asked.path == f"{BEGIN}/{held.id}" else None
    )
    said: list[str] = []

    def look(progress: Any) -> None:
        said.append(str(progress.waiting))
        if "finalizing" in said[-1]:
            waiting.stop("SIGINT", grace_seconds=5)

    datasette = job.file.datasette()
    asked: dict[str, Any] = {"prompt": "{{ text }}", "column": "answer", "model": "batched"}
    spec = JobSpec(database="data", table="t", batch=True, wait=True, **asked)
    waiting = EnrichJob(datasette, spec, way=BatchWay(datasette, poll_seconds=60), on_progress=look)
    report = await waiting.run()
    assert "all answered, the provider is finalizing" in said
    assert "10 of 10 requests answered" in report.summary()
    await all_is_well(job)


async def test_a_database_in_memory_has_no_batches(job: Job) -> None:
    from datasette.app import Datasette

    def make(conn: sqlite3.Connection) -> None:
        conn.execute("create table t (id integer primary key, text text)")
        conn.execute("insert into t (text) values ('one')")
        conn.commit()

    datasette = Datasette(memory=True)
    # An older Datasette cannot be closed, and whoever opens one of this name finds it again.
    name = f"nowhere_{uuid4().hex}"
    async with open_side():
        await write(datasette.add_memory_database(name), make)
    asked: dict[str, Any] = {"prompt": "{{ text }}", "column": "answer", "model": "batched", "batch": True}
    spec = JobSpec(database=name, table="t", **asked)
    with pytest.raises(EnrichInputError, match="a database in memory cannot have any"):
        await EnrichJob(datasette, spec, way=BatchWay(datasette)).run()
    if hasattr(datasette, "close"):
        datasette.close()


def begin_anothers(provider: BatchProvider, model_of: Job) -> Any:
    """Have somebody else begin a batch of the same size with the same key."""
    api = next(api for api in provider._apis if type(api).__name__ == "Anthropic")
    body = {"model": "m", "messages": [{"role": "user", "content": "of somebody else"}]}
    return provider.begin(api, [(f"other-{number}", body) for number in range(10)])


async def test_a_batch_of_another_with_the_same_size_is_not_taken_for_ours(claude: Job) -> None:
    provider = claude.provider
    create = AnthropicBatches.create

    async def create_and_die(self: Any, *args: Any) -> Any:
        await create(self, *args)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnthropicBatches, "create", create_and_die)
        with pytest.raises(Killed):
            await claude.run()
    # Batches of this provider have no names: of two of one size the latest is taken, until it tells.
    other = begin_anothers(provider, claude)
    assert (await claude.run()).in_batches == 10
    report = await claude.run(batch_cancel=True)
    assert (report.batch.cancelled, report.batch.uncertain) == (0, [other.id])
    assert f"only size and moment tell that they are ours: {other.id}" in report.summary()
    assert not other.is_done
    assert (await claude.run_later()).written == 0
    assert (await claude.run()).written == 10
    del provider.asked["of somebody else"]
    await all_is_well(claude)


async def test_only_a_batch_of_another_was_begun(claude: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnthropicBatches, "create", die)
        with pytest.raises(Killed):
            await claude.run()
    begin_anothers(claude.provider, claude)
    assert (await claude.run()).in_batches == 10
    assert claude.provider.asked.keys() == {"of somebody else"}
    report = await claude.run_later()
    assert (report.written, report.returned) == (0, 10)
    del claude.provider.asked["of somebody else"]
    await all_is_well(claude)

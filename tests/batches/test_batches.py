"""Jobs whose prompts travel in batches, against a provider that has batches, on both backends."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.batch_provider import BatchProvider, Settings
from benchmarks.provider import json_reply
from datasette_llm.calls import tracing
from datasette_llm.calls.batches.openai import OpenAIBatches
from datasette_llm.enrich import EnrichError, EnrichInputError, EnrichJob, JobSpec
from datasette_llm.enrich.batches import courier, outbox
from datasette_llm.enrich.batches.way import BatchWay
from datasette_llm.enrich.estimate import estimate_job

from ..enrich_tables import fake_model
from ..hooks import hooked
from ..protocols import PLUGIN_MARKS
from .jobs import FAMILIES, HOUR, Job, job_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = PLUGIN_MARKS


@FAMILIES
async def test_the_same_command_submits_and_collects(
    make: Any, tmp_path: Path, provider: BatchProvider
) -> None:
    provider.settings.shuffle = True
    with job_of(make, tmp_path, provider) as job:
        report = await job.run(batch_size=4)
        assert (report.submitted, report.batch.submitted, report.written) == (10, 3, 0)
        assert report.in_batches == job.rows_in_batches() == 10
        assert "run the same command to collect" in report.summary()
        again = await job.run(batch_size=4)
        assert (again.submitted, again.written, again.in_batches) == (0, 0, 10)
        assert len(provider.batches) == 3

        provider.advance(2 * HOUR)
        job.file.run("insert into t (id, text) values (11, 'row 11')")
        report = await job.run(batch_size=4)
        assert (report.written, report.submitted, report.failed) == (10, 1, 0)
        assert (job.rows_in_batches(), len(provider.batches)) == (1, 4)
        provider.advance(2 * HOUR)
        assert (await job.run()).written == 1
        last = await job.run()
        assert job.values() == job.expected
        assert set(provider.asked.values()) == {1}
        assert provider.live == 0
        assert (last.written, last.submitted, job.rows_in_batches(), job.files()) == (0, 0, 0, [])


async def test_live_and_by_batch_the_same_comes_out_at_half_the_cost(tmp_path: Path, job: Job) -> None:
    live = Job(_made(tmp_path / "live"), job.provider)
    accounted: dict[str, list[Any]] = {"live": [], "batch": []}
    now = "live"

    def account(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            yield
            usage = await result.response.usage()
            accounted[now].append((prompt, usage.input, usage.output, await result.response.text()))

        return wrapper

    with hooked(llm_prompt_context=account):
        usual = await live.run(batch=False)
        now = "batch"
        await job.run()
        report = await job.run_later()
    assert job.values() == live.values() == live.expected
    assert sorted(accounted["live"]) == sorted(accounted["batch"])
    assert (report.input_tokens, report.output_tokens) == (usual.input_tokens, usual.output_tokens)
    assert report.cost == pytest.approx(usual.cost / 2)
    query = "select question, pk, input_tokens, output_tokens, no_value from _llm_answers order by pk"
    assert job.file.run(query) == live.file.run(query)
    assert job.provider.live == 10
    live.file.close()


async def test_spans_say_that_prompts_travel_in_batches(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    tracer = TracerProvider()
    tracer.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: tracer)
    monkeypatch.setattr(tracing, "_tracer", tracer.get_tracer("test"))
    await job.run(limit=2)
    await job.run_later(limit=1)
    await job.run(batch=False)
    told = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    # Two are recorded, two replayed, a third one recorded; the other seven are live.
    assert [each.get("datasette_llm.batch") for each in told].count(True) == 5
    assert len([each for each in told if "datasette_llm.batch" not in each]) == 7
    answered = [
        each for each in told if each.get("datasette_llm.batch") and "gen_ai.usage.input_tokens" in each
    ]
    assert len(answered) == 2


async def test_rows_that_ask_the_same_share_a_request(job: Job) -> None:
    job.file.run("update t set text = 'the same' where id % 2")
    await job.run()
    job.file.run("insert into t (id, text) values (11, 'the same'), (12, 'the same')")
    await job.run()
    report = await job.run_later()
    assert job.provider.asked["the same"] == 1
    assert report.written == 12
    assert job.values() == job.expected


async def test_what_a_policy_refuses_is_not_sent(job: Job) -> None:
    def policy(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            if prompt == "row 3":
                raise PermissionError("not that one")
            yield

        return wrapper

    with hooked(llm_prompt_context=policy):
        report = await job.run()
        assert (report.submitted, report.failed) == (9, 1)
        assert "row 3" not in job.provider.asked
        assert (await job.run_later()).written == 9


@FAMILIES
async def test_faults_cost_their_rows_and_no_batch(
    make: Any, tmp_path: Path, provider: BatchProvider
) -> None:
    provider.settings = Settings(
        HOUR, refuse=5, missing=7, torn=3, twice=2, expire=2, shuffle=True, cut_downloads=1
    )
    with job_of(make, tmp_path, provider) as job:
        job.file.run("delete from t where id > 9")
        await job.run()
        job.file.run("update t set text = 'edited' where id = 1")
        job.file.run("delete from t where id = 2")
        report = await job.run_later()
        # 3 and 6 are torn, 7 is missing, 8 and 9 expired, 5 is refused, 1 was edited and 2 deleted.
        assert (report.written, report.failed, report.changed, report.returned) == (1, 1, 2, 5)
        assert job.values()[4] == "answer to: row 4"
        assert [failure.kind for failure in report.failures] == ["rejected"]
        provider.settings = Settings(HOUR)
        await job.run()
        await job.run_later()
        assert job.values() == job.expected
        assert job.rows_in_batches() == 0


async def test_a_batch_that_was_begun_without_an_answer_is_not_sent_again(job: Job) -> None:
    job.provider.settings.lost_answers = 1
    report = await job.run()
    assert (report.submitted, len(job.provider.batches)) == (10, 1)
    assert (await job.run_later()).written == 10
    assert set(job.provider.asked.values()) == {1}


@pytest.mark.parametrize("state", ["writing", "prepared", "creating", "begun"])
async def test_what_a_killed_process_left_is_put_right(
    job: Job, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(courier, "LISTED_SECONDS", 0.0)

    class Killed(Exception):
        pass

    async def die(*_: Any, **__: Any) -> Any:
        raise Killed

    async def forget(box: outbox.Outbox) -> None:
        box._file.close()

    with monkeypatch.context() as patch:
        if state == "writing":
            patch.setattr(outbox.Outbox, "seal", die)
            patch.setattr(outbox.Outbox, "discard", forget)
        elif state == "prepared":
            patch.setattr(OpenAIBatches, "upload", die)
        elif state == "creating":
            patch.setattr(OpenAIBatches, "create", die)
        else:
            patch.setattr(courier.Courier, "_running", die)
        with pytest.raises(Killed):
            await job.run()
    assert len(job.provider.batches) == (state == "begun")
    assert (await job.run()).in_batches == 10
    assert (await job.run_later()).written == 10
    assert job.values() == job.expected
    assert set(job.provider.asked.values()) == {1}
    assert job.files() == []


async def test_how_much_may_be_enqueued_is_found_out_and_kept(job: Job) -> None:
    job.provider.settings = Settings(seconds=HOUR, token_limit=100)
    report = await job.run()
    # A batch of all rows is refused; smaller ones are sent until the provider is full.
    assert 0 < report.submitted < 10
    assert "no more tokens" in report.summary()
    refused = sum(each.code is not None for each in job.provider.batches.values())
    for _ in range(10):
        await job.run_later()
    assert job.values() == job.expected
    assert set(job.provider.asked.values()) == {1}
    assert sum(each.code is not None for each in job.provider.batches.values()) == refused == 1


async def test_who_waits_gets_all_of_it(job: Job) -> None:
    job.provider.settings = Settings(seconds=0.2, token_limit=100)
    report = await job.run(wait=True)
    assert (report.written, report.in_batches) == (10, 0)
    assert job.values() == job.expected


async def test_who_stops_waiting_is_told_what_goes_on(job: Job) -> None:
    def look(progress: Any) -> None:
        if "1 batch in progress" in str(progress.waiting):
            waiting.stop("SIGINT", grace_seconds=5)

    datasette = job.file.datasette()
    asked: dict[str, Any] = {"prompt": "{{ text }}", "column": "answer", "batch": True, "wait": True}
    spec = JobSpec(database="data", table="t", model="batched", **asked)
    waiting = EnrichJob(datasette, spec, way=BatchWay(datasette), on_progress=look)
    report = await waiting.run()
    assert (report.stopped, report.in_batches) == ("SIGINT", 10)
    assert "They go on there, and are billed" in report.summary()
    assert (await job.run_later()).written == 10


async def test_a_cancelled_batch_gives_what_it_has_answered(job: Job) -> None:
    await job.run()
    report = await job.run(batch_cancel=True)
    assert report.batch.cancelled == 1
    assert "what was answered before is billed" in report.summary()
    report = await job.run(limit=1)
    assert (report.written, report.returned) == (5, 5)


async def test_a_live_run_leaves_submitted_rows_alone(job: Job) -> None:
    await job.run(limit=6)
    report = await job.run(batch=False)
    assert (report.written, report.in_batches) == (4, 6)
    assert "6 rows are in batches and were left alone" in report.summary()
    report = await job.run(batch=False, include_submitted=True)
    assert report.written == 6
    report = await job.run_later()
    assert (report.written, report.changed) == (0, 6)
    assert job.values() == job.expected


async def test_batches_of_another_prompt_are_left_to_its_command(job: Job) -> None:
    await job.run(limit=5)
    report = await job.run(prompt="other {{ text }}")
    assert (report.batch.others, report.submitted, report.written) == (1, 5, 0)
    assert "of another prompt" in report.summary()
    assert (await job.run_later(prompt="other {{ text }}")).written == 5
    assert (await job.run()).written == 5


async def test_an_overwritten_row_is_not_sent_a_second_time(job: Job) -> None:
    await job.run(batch=False)
    await job.run(overwrite=True, batch_size=5)
    report = await job.run_later(overwrite=True)
    assert (report.written, report.submitted) == (10, 0)


async def test_the_estimated_cost_of_what_is_sent_is_limited(job: Job) -> None:
    report = await job.run(max_cost=1.2)
    assert report.stopped == "max_cost"
    assert 0 < report.submitted < 10


async def test_an_estimate_says_both_prices(job: Job) -> None:
    datasette = job.file.datasette(config={"plugins": {"datasette-llm": job.config}})
    spec = JobSpec(
        database="data", table="t", prompt="{{ text }}", column="answer", model="batched", batch=True
    )
    found = await estimate_job(datasette, spec)
    assert found.cost is not None
    assert found.due == found.batch_cost == pytest.approx(found.cost / 2)
    assert "in batches" in found.line()
    assert found.as_dict()["batch_cost"] == found.batch_cost


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch": False, "wait": True}, "--wait is about batches"),
        ({"include_submitted": True}, "for live runs"),
        ({"record": False}, "without --batch"),
        ({"reuse": False}, "always asked once"),
        ({"max_tokens_total": 5}, "--max-cost or --limit"),
    ],
)
async def test_what_makes_no_sense_is_refused(job: Job, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(EnrichInputError, match=message):
        await job.run(**asked)


async def test_a_model_without_batches_is_told_at_once(tmp_path: Path, provider: BatchProvider) -> None:
    job = Job(tmp_path, provider)
    job.model_id = "fake"
    with fake_model(), pytest.raises(EnrichInputError, match="takes no batches"):
        await job.run()
    assert "answer" not in str(job.file.run("select sql from sqlite_master"))
    job.file.close()


async def test_a_provider_that_refuses_says_why_and_the_rows_wait(job: Job) -> None:
    refusal = json_reply(403, {"error": {"message": "batches are not for you", "code": "no"}})
    job.provider.instead = lambda asked: refusal if asked.path == "/v1/batches" else None
    with pytest.raises(EnrichError, match="batches are not for you"):
        await job.run()
    job.provider.instead = lambda asked: None
    assert job.rows_in_batches() == 0
    await job.run()
    assert (await job.run_later()).written == 10


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory

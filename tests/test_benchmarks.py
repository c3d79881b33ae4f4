"""The benchmarks' server keeps its word, and every scenario runs."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

import anyio
import httpx2
import openai
import pytest
from datasette.app import Datasette

from benchmarks import report
from benchmarks.__main__ import measuring
from benchmarks.chart import chart
from benchmarks.measure import IN_PROCESS, OVER_HTTP
from benchmarks.provider import Counts, Provider, Settings, answer_text
from benchmarks.report import Outcome, middle
from benchmarks.rows import prompts
from benchmarks.scenarios import all_scenarios
from benchmarks.work import Result, Work

from .patience import PATIENCE_SECONDS
from .provider import provider_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.launch import Server

pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.system,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each measurement is a fork, which Windows has not"),
]


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with provider_server() as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    shared_server.configure()
    return shared_server


def body(prompt: str, **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": prompt}], **more}).encode()


async def ask(server: Server, prompt: str, **more: Any) -> httpx2.Response:
    async with httpx2.AsyncClient() as client:
        return await client.post(f"{server.url}/chat/completions", content=body(prompt, **more))


async def until(server: Server, name: str, value: object) -> None:
    with anyio.fail_after(PATIENCE_SECONDS):
        while server.counts[name] != value:  # noqa: ASYNC110
            await anyio.sleep(0.01)  # the server is another process, nothing here can be waited for


async def test_an_openai_client_gets_its_answer_and_usage(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="sk-any") as client:
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Über uns"}]
        )
    assert answer.choices[0].message.content == answer_text("Über uns")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 4)
    counts = server.counts
    assert (counts["requests"], counts["answered"], counts["statuses"]) == (1, 1, {"200": 1})
    assert (counts["unanswered"], counts["answered_twice"], counts["running"]) == (0, 0, 0)


async def test_a_stream_has_all_the_pieces_then_its_finish_and_usage(server: Server) -> None:
    server.configure(chunks=5, chunk_seconds=0.001)
    answer = await ask(server, "a prompt", stream=True, stream_options={"include_usage": True})
    *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    *pieces, finish, usage = [json.loads(event) for event in events]
    assert done == "[DONE]"
    assert len(pieces) == 5
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert text == answer_text("a prompt")
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


async def test_models_are_listed(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=server.url, api_key="sk-any") as client:
        assert [model.id async for model in client.models.list()] == ["bench"]


async def test_every_prompt_is_counted(server: Server) -> None:
    for prompt in ("a", "b", "a"):
        await ask(server, prompt)
    assert server.prompts == ({"a": 2, "b": 1}, {"a": 2, "b": 1})
    assert server.counts["answered_twice"] == 1
    server.reset()
    assert (server.counts["requests"], server.prompts) == (0, ({}, {}))


async def test_a_schema_is_answered_in_json(server: Server) -> None:
    schema = {"properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
    answer = await ask(
        server, "p", response_format={"type": "json_schema", "json_schema": {"schema": schema}}
    )
    content = answer.json()["choices"][0]["message"]["content"]
    assert json.loads(content) == {"name": "answer to: p", "age": 1}


async def test_a_bucket_refuses_and_says_when_to_come_back(server: Server) -> None:
    server.configure(rate=0.5, burst=2, retry_after="ms", ratelimit_headers=True)
    answers = [await ask(server, str(number)) for number in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "30"
    assert 1 < int(answers[2].headers["retry-after-ms"]) <= 2000


@pytest.mark.parametrize(
    ("style", "header", "value"),
    [
        ("seconds", "retry-after", "3600"),
        ("ms", "retry-after-ms", "3600000"),
        ("date", "retry-after", "GMT"),
        ("none", "retry-after", ""),
    ],
)
async def test_retry_after_styles(server: Server, style: str, header: str, value: str) -> None:
    server.configure(error_429=1, retry_after=style, retry_after_seconds=3600)
    assert (await ask(server, "x")).headers.get(header, "").endswith(value)


async def test_requests_in_flight_are_capped(server: Server) -> None:
    server.configure(in_flight=2, latency=1000)
    async with anyio.create_task_group() as tasks:
        for number in range(2):
            tasks.start_soon(ask, server, str(number))
        await until(server, "running", 2)
        assert [(await ask(server, str(number))).status_code for number in (2, 3)] == [429, 429]
        tasks.cancel_scope.cancel()
    assert server.counts["peak"] == 2


async def test_a_wrong_key_is_refused(server: Server) -> None:
    server.configure(api_key="sk-right")
    async with openai.AsyncOpenAI(base_url=server.url, api_key="sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    assert server.counts["statuses"] == {"401": 1}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault", ["disconnect", "close"])
async def test_connections_are_cut(server: Server, fault: str, stream: bool) -> None:
    server.configure(**{fault: 1})
    with pytest.raises(httpx2.RemoteProtocolError):
        await ask(server, "x", stream=stream)
    assert (server.counts["answered"], server.counts["faults"]) == (0, {fault: 1})


async def test_a_torn_stream_ends_cleanly_without_its_finish(server: Server) -> None:
    server.configure(torn=1)
    answer = await ask(server, "a prompt of some length", stream=True)
    assert answer.text.count("data: ") == 4
    assert "stop" not in answer.text
    assert "[DONE]" not in answer.text


async def test_a_broken_stream_is_not_json(server: Server) -> None:
    server.configure(broken_sse=1)
    answer = await ask(server, "x", stream=True)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answer.text.split("\n\n")[-2].removeprefix("data: "))


@pytest.mark.parametrize("settings", [{"never": 1}, {"latency": 100}, {"chunk_seconds": 100}])
async def test_a_client_that_goes_away_is_counted(server: Server, settings: dict[str, Any]) -> None:
    server.configure(**settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: ask(server, "x", stream=True))
        await until(server, "running", 1)
        tasks.cancel_scope.cancel()
    await until(server, "client_disconnects", 1)
    assert (server.counts["running"], server.counts["answered"]) == (0, 0)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_not_a_request_is_answered(server: Server, request_bytes: bytes) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(request_bytes)
        assert connection.recv(100).startswith(b"HTTP/1.1 40")


def test_a_setting_that_does_not_exist_is_an_error(server: Server) -> None:
    with pytest.raises(ValueError, match=r"not a setting: latncy"):
        server.configure(latncy=1)


def test_the_same_prompts_meet_the_same_faults_in_any_order() -> None:
    prompts = [str(number) for number in range(2000)]
    fates = []
    for order in (prompts, prompts[::-1]):
        provider = Provider(Settings(seed=7, error_500=0.03, latency=1, latency_sigma=0.5))
        replies = {prompt: provider.answer(body(prompt), "") for prompt in order}
        fates.append({prompt: (reply.status, reply.delay) for prompt, reply in replies.items()})
    assert fates[0] == fates[1]
    assert 40 <= sum(status == 500 for status, _ in fates[0].values()) <= 80
    delays = sorted(delay for _, delay in fates[0].values())
    assert 0.9 < delays[1000] < 1.1


def test_a_prompt_sent_again_may_fare_better() -> None:
    provider = Provider(Settings(error_500=0.5))
    statuses = [provider.answer(body("again"), "").status for _ in range(50)]
    assert set(statuses) == {200, 500}
    assert isinstance(provider.counts, Counts)


def test_every_scenario_asks_for_what_there_is() -> None:
    for quick in (True, False):
        for scenario in all_scenarios(quick=quick):
            for label, work in scenario.works.items():
                assert work.way in OVER_HTTP | IN_PROCESS, (scenario.name, label)
                Settings().changed(work.server)
    assert len(set(prompts(10_000))) == 10_000


@pytest.fixture(scope="module")
def measure(shared_server: Server) -> Iterator[Callable[[Work], Result]]:
    with measuring() as run:

        def measured(work: Work) -> Result:
            result = run(replace(work, url=shared_server.url))
            assert result is not None
            return result

        yield measured


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("way", [*OVER_HTTP, *IN_PROCESS])
def test_every_way_gets_right_answers(measure: Callable[[Work], Result], way: str, backend: str) -> None:
    if way in ("page", "page workers", "workers") and backend == "trio":
        pytest.skip("Datasette's server is asyncio's, and so is what measures workers")
    if "workers" in way:
        pytest.importorskip("distributed")
    if way.startswith("page") and not hasattr(Datasette, "add_background_task"):
        pytest.skip("this Datasette has no background tasks")
    work = Work(way, 100 if way == "memory" else 4, 2, stream=way == "prompt", backend=backend)
    result = measure(work)
    assert (result.right, result.wrong, result.failed) == (work.n, 0, 0)
    if way in OVER_HTTP and way != "workers":  # That asks some before it measures.
        assert (result.server["requests"], result.server["answered"]) == (4, 4)


def test_a_measurement_that_fails_is_none(measure: Callable[[Work], Result]) -> None:
    with measuring() as run:
        assert run(Work("no such way", 1)) is None


def a_result(n: int = 10, **more: Any) -> Result:
    server = {"statuses": {"200": 9, "429": 1}, "answered_twice": 0}
    return replace(Result(n, wall=1.0, cpu=0.5, right=n, server=server), **more)


def an_outcome() -> Outcome:
    scenario = all_scenarios(quick=True)[0]
    return Outcome(scenario, "asyncio", {label: a_result() for label in scenario.works})


def test_the_middle_of_several_runs_hides_no_failure() -> None:
    results = [a_result(wall=1), a_result(wall=2, right=9), a_result(wall=9, wrong=1)]
    combined = middle(results)
    assert (combined.wall, combined.right, combined.wrong) == (2, 9, 1)


def test_targets_say_whether_they_are_met() -> None:
    met = {text: met for text, _, _, met in an_outcome().targets}
    assert met["map: lost + wrong + answered twice"]
    assert not met["map: CPU / plain llm"]


def test_results_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    outcome = an_outcome()
    path = report.save([outcome], quick=True, runs=1)
    loaded = report.load(path, all_scenarios(quick=True))
    assert [each.results for each in loaded] == [outcome.results]
    report.README.write_text(f"Before\n{report.BEGIN}\nold\n{report.END}\nAfter\n")
    report.write_readme(loaded, runs=1)
    text = report.README.read_text()
    assert "| steady | asyncio | map |" in text
    assert text.startswith("Before\n")
    assert text.endswith("After\n")
    assert "old" not in text


def test_the_chart_is_an_svg() -> None:
    drawn = ElementTree.fromstring(chart([an_outcome()]))
    assert drawn.tag.endswith("svg")

"""Model calls that workers make: the same as here, whatever is asked, and whatever happens to a worker."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import llm
import pytest
from llm.parts import StreamEvent

from datasette_llm.calls.remote.bench import LEASE_SECONDS, Bench
from datasette_llm.calls.remote.questions import packed
from datasette_llm.calls.remote.suspects import CallKillsWorkers
from datasette_llm.calls.workers import workers_from
from datasette_llm.errors import NoWorkers, WorkersError

from .fakes import FakeModel
from .remote_workers import fake_workers
from .spies import watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def words(prompt: str) -> AsyncGenerator[str, None]:
    for word in prompt.split():
        await anyio.sleep(1)
        yield word + " "


async def test_map_streaming_conversation_and_usage_are_the_same_with_workers() -> None:
    model = FakeModel(words)
    with watched(model) as facade:
        async with fake_workers("a", "b") as workers, facade.group(workers=workers.spec) as group:
            answers = {item: await response.text() async for item, response in group.map(["x y", "z"])}
            assert answers == {"x y": "x y ", "z": "z "}
            began = anyio.current_time()
            response = await group.prompt("one two")
            times = [(chunk, round(anyio.current_time() - began)) async for chunk in response]
            assert times == [("one ", 1), ("two ", 2)]
            assert (await response.usage()).input == 2
            conversation = group.conversation()
            await (await conversation.prompt("first")).text()
            second = await conversation.prompt("second")
            await second.text()
            messages = [message.role for message in second.prompt.messages]
            assert messages == ["user", "assistant", "user"]
            figures = group.stats.workers
            assert figures is not None
            assert sum(figures.prompts.values()) == 5
            assert (set(figures.workers), figures.waiting, figures.deaths) == ({"a", "b"}, 0, 0)
    assert model.counts["running"] == 0


class Listing(FakeModel):
    """Answers with what it was asked, and calls a tool the first time."""

    attachment_types = {"image/png"}  # noqa: RUF012 - llm's way

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[str | StreamEvent, None]:
        if prompt.tools and not prompt.tool_results:
            response.add_tool_call(llm.ToolCall(prompt.tools[0].name, {"number": 2}, "call-1"))
            return
        response.response_json = {"choices": [{"finish_reason": "length", "message": {}}]}
        response.set_resolved_model("listing-2")
        yield StreamEvent("reasoning", "hm")
        yield json.dumps(
            {
                "prompt": prompt.prompt,
                "system": prompt.system,
                "schema": prompt.schema,
                "temperature": prompt.options.temperature,
                "attachments": [each.content_bytes().decode() for each in prompt.attachments],
                "results": [result.output for result in prompt.tool_results],
                "turns": [turn.text_or_raise() for turn in conversation.responses] if conversation else [],
                "stream": stream,
            }
        )


async def test_everything_that_is_asked_and_answered_crosses() -> None:
    model = Listing()

    def double(number: int) -> str:
        return str(2 * number)

    with watched(model) as facade:
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            response = await group.prompt(
                "p",
                system="s",
                schema={"type": "object", "properties": {}},
                temperature=0.5,
                attachments=[llm.Attachment(type="image/png", content=b"pixels")],
                stream=False,
            )
            asked = json.loads(await response.text())
            assert (asked["prompt"], asked["system"]) == ("p", "s")
            assert asked["schema"] == {"type": "object", "properties": {}}
            assert asked["temperature"] == 0.5
            assert asked["attachments"] == ["pixels"]
            assert not asked["stream"]
            assert response.finish_reason == "length"
            assert response.resolved_model == "listing-2"
            events = [event async for event in response.astream_events()]
            assert [(event.type, event.part_index) for event in events] == [("reasoning", 0), ("text", 1)]
            # The tool runs here: no function crosses.
            text = await group.chain("q", tools=[double], stream=False).text()
            assert json.loads(text)["results"] == ["4"]


async def test_a_prompt_that_is_cancelled_is_closed_at_the_worker() -> None:
    model = FakeModel(seconds=1000)
    with watched(model) as facade:
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            response = await group.prompt("x")
            await anyio.sleep(0.5)
            assert model.counts["running"] == 1
            response.cancel()
            await anyio.sleep(0.5)
            assert model.counts["running"] == 0
            assert workers.fleet.figures.workers == {"a": 0}


async def test_a_worker_that_dies_loses_and_repeats_no_answer() -> None:
    model = FakeModel(seconds=1)
    with watched(model) as facade:
        async with (
            fake_workers("a", "b") as workers,
            facade.group(workers=workers.spec, concurrency=10) as group,
            anyio.create_task_group() as tasks,
        ):

            async def kill() -> None:
                await anyio.sleep(3.5)
                await workers.kill("a")

            tasks.start_soon(kill)
            rows = [f"row {number}" for number in range(100)]
            answers = [await response.text() async for _, response in group.map(rows)]
        assert sorted(answers) == sorted(rows)
        # Asked again is only what the dead one had.
        assert 1 <= len(model.prompts) - 100 <= 10
        assert workers.fleet.figures.again == len(model.prompts) - 100
        assert workers.fleet.figures.deaths == 1


async def test_a_prompt_that_kills_three_workers_fails_and_says_so() -> None:
    with watched(FakeModel(seconds=1000)) as facade:
        async with (
            fake_workers("a", "b", "c", "d") as workers,
            facade.group(workers=workers.spec) as group,
        ):
            response = await group.prompt("deadly")
            for _ in range(3):
                await anyio.sleep(2)
                await workers.kill_one_at_work()
            with pytest.raises(CallKillsWorkers, match="3 workers that were given this prompt died"):
                await response.text()


async def test_a_prompt_that_kills_its_workers_takes_nobody_along() -> None:
    with watched(FakeModel(seconds=5)) as facade:
        async with (
            fake_workers("a", "b") as workers,
            facade.group(workers=workers.spec, concurrency=20) as group,
            anyio.create_task_group() as tasks,
        ):

            async def kill() -> None:
                for new in "cdefgh":
                    await anyio.sleep(2)
                    for address, line in workers.fleet.lines.items():
                        if any("deadly" in str(call.question) for call in line.in_flight.values()):
                            await workers.kill(address)
                            workers.add(new)
                            break

            tasks.start_soon(kill)
            rows = ["deadly", *(f"row {number}" for number in range(59))]
            outcomes = {item: response async for item, response in group.map(rows)}
            assert workers.fleet.figures.deaths == 3
        assert isinstance(outcomes.pop("deadly").error, CallKillsWorkers)
        assert [str(response.error) for response in outcomes.values() if response.error] == []


@pytest.mark.parametrize("timeout", [None, 150.0])
async def test_waiting_for_a_worker_is_no_time_of_the_attempt(timeout: float | None) -> None:
    """Nobody works on it: it is neither given up as too slow, nor the provider taken to be away."""
    with watched(FakeModel(seconds=1), config={} if timeout is None else {"timeout": timeout}) as facade:
        async with fake_workers("a", timeout=1000) as workers, facade.group(workers=workers.spec) as group:
            # So that it is known how long answers take.
            assert len([response async for _, response in group.map(map(str, range(40)))]) == 40
            await workers.kill("a")
            response = await group.prompt("x")
            await anyio.sleep(500)
            assert not response.done
            workers.add("b")
            assert await response.text() == "x"
            assert group.stats.retries == 0
            await workers.kill("b")
            late = await group.prompt("y")
            began = anyio.current_time()
            with pytest.raises(NoWorkers):
                await late.text()
            assert 999 <= anyio.current_time() - began <= 1005


async def test_where_workers_die_of_something_else_three_are_no_proof() -> None:
    """Of a thousand rows one may have bad luck three times."""
    with watched(FakeModel(seconds=5)) as facade:
        async with (
            fake_workers("a", "b", "c", "d", "e") as workers,
            facade.group(workers=workers.spec, concurrency=20) as group,
        ):
            response = await group.prompt("harmless")
            await anyio.sleep(2)
            await workers.kill_one_at_work()
            assert await response.text() == "harmless"
            unlucky = await group.prompt("unlucky")
            for _ in range(3):
                await anyio.sleep(2)
                await workers.kill_one_at_work()
            assert await unlucky.text() == "unlucky"
            assert workers.fleet.figures.deaths == 4


async def test_what_kills_every_worker_fails_also_where_they_die_of_something_else() -> None:
    with watched(FakeModel(seconds=1000)) as facade:
        async with (
            fake_workers(*"abcdefgh") as workers,
            facade.group(workers=workers.spec) as group,
        ):
            await anyio.sleep(1)
            await workers.kill("h")  # It had nothing to do.
            response = await group.prompt("deadly")
            for _ in range(6):
                await anyio.sleep(2)
                await workers.kill_one_at_work()
            with pytest.raises(CallKillsWorkers, match="6 workers that were given this prompt died"):
                await response.text()


async def test_without_a_worker_prompts_wait_say_so_and_go_on_with_the_next_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with watched(FakeModel(seconds=1)) as facade:
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            response = await group.prompt("x")
            await anyio.sleep(0.5)
            await workers.kill("a")
            await anyio.sleep(20)
            assert not response.done
            assert "No worker is there: 1 prompts wait for one" in caplog.text
            workers.add("b")
            began = anyio.current_time()
            assert await response.text() == "x"
            assert anyio.current_time() - began < 2.1


async def test_prompts_do_not_wait_for_ever_for_a_worker() -> None:
    with watched(FakeModel(seconds=1)) as facade:
        async with fake_workers(timeout=5) as workers:
            with pytest.raises(NoWorkers, match="no worker for 5 seconds"):
                async with facade.group(workers=workers.spec):
                    pass
            workers.add("a")
            async with facade.group(workers=workers.spec) as group:
                response = await group.prompt("x")
                await anyio.sleep(0.5)
                await workers.kill("a")
                workers.reachable = False
                with pytest.raises(NoWorkers, match="the scheduler does not answer"):
                    await response.text()


async def test_a_worker_whose_coordinator_is_gone_cancels_what_it_does() -> None:
    model = FakeModel(seconds=1000)
    with watched(model):
        bench = Bench()
        async with anyio.create_task_group() as tasks:
            await tasks.start(bench.run)
            await anyio.lowlevel.checkpoint()
            bench.take(packed({"calls": [[1, {"model": "fake", "prompt": "x", "stream": False}]]}))
            await anyio.sleep(LEASE_SECONDS - 0.5)
            assert model.counts["running"] == 1
        assert model.counts["running"] == 0


async def test_a_batch_of_results_that_got_lost_is_told_again() -> None:
    with watched(FakeModel()):
        bench = Bench()
        async with anyio.create_task_group() as tasks:
            await tasks.start(bench.run)
            await anyio.lowlevel.checkpoint()
            parcel = packed({"calls": [[1, {"model": "fake", "prompt": "x", "stream": False}]]})
            bench.take(parcel)
            first = json.loads(await bench.poll(0))
            bench.take(parcel)
            assert json.loads(await bench.poll(0)) == first
            assert json.loads(await bench.poll(first["batch"]))["told"] == []
            bench.end()


async def test_a_slow_worker_gets_less() -> None:
    with watched(FakeModel(seconds=0.1)) as facade:
        async with fake_workers("near") as workers:
            workers.add("far", delay=1.0)
            async with facade.group(workers=workers.spec, concurrency=20) as group:
                await anyio.sleep(5)
                async for _, response in group.map([str(number) for number in range(400)]):
                    await response.text()
            assert workers.links["near"].calls > 3 * workers.links["far"].calls > 0


async def test_a_worker_without_the_model_is_found_before_a_row_is_sent() -> None:
    model = FakeModel()
    with watched(model) as facade:
        async with fake_workers("a") as workers:
            group = facade.group(workers=workers.spec)
            original = llm.get_async_model

            def unknown(name: str | None = None) -> Any:
                raise llm.UnknownModelError(name)

            llm.get_async_model = unknown  # the worker's, which shares this process
            try:
                with pytest.raises(WorkersError, match="worker a: it has no model fake"):
                    async with group:
                        pass
            finally:
                llm.get_async_model = original
    assert model.prompts == []


class KeyModel(llm.AsyncKeyModel):
    """Answers with the key it is given."""

    model_id = "keyed"
    needs_key = "keyed"
    key_env_var = "KEYED_API_KEY"

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None, key: str | None = None
    ) -> AsyncGenerator[str, None]:
        yield f"key {key}"


SECRET = "sk-very-secret-4711"


async def test_a_key_is_sent_only_where_the_worker_lacks_it_and_nobody_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = KeyModel()
    with watched(model, config={"default_model": {"model": "keyed", "key": "PURPOSE_KEY"}}) as facade:
        monkeypatch.setenv("DATASETTE_SECRETS_PURPOSE_KEY", SECRET)
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            assert await (await group.prompt("x", stream=False)).text() == f"key {SECRET}"
            carried = b"".join(workers.links["a"].parcels)
            assert carried.count(SECRET.encode()) == 1
        async with fake_workers("open", private=False) as workers:
            with pytest.raises(WorkersError, match="cannot be sent to it in the open"):
                async with facade.group(workers=workers.spec):
                    pass
            monkeypatch.setenv("KEYED_API_KEY", SECRET)
            async with facade.group(workers=workers.spec) as group:
                assert await (await group.prompt("y", stream=False)).text() == f"key {SECRET}"
            assert SECRET.encode() not in b"".join(workers.links["open"].parcels)


def test_what_workers_can_be() -> None:
    assert workers_from(0) is None
    assert workers_from(3).count == 3  # type: ignore[union-attr]
    assert workers_from("tls://host:8786").scheduler == "tls://host:8786"  # type: ignore[union-attr]
    given = {"scheduler": "tls://host:8786", "security": {"ca_file": "ca.pem"}, "timeout": 5}
    assert "ca.pem" not in repr(workers_from(given))
    for wrong, words_ in [
        (True, "number of processes"),
        (-1, "between 0 and"),
        ("host:8786", "looks like tls://host:8786"),
        ({"scheduler": "tls://host:8786", "secure": 1}, "no setting 'secure'"),
    ]:
        with pytest.raises(ValueError, match=words_):
            workers_from(wrong)


async def test_workers_that_end_are_no_deaths(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with watched(FakeModel()) as facade:
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            await (await group.prompt("x")).text()
    assert caplog.text == ""

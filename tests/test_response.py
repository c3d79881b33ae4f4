"""PromptResponse: any number of readers, and everything that llm's own response offers."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
import sqlite_utils
from anyio.lowlevel import checkpoint
from llm.migrations import migrate
from llm.parts import StreamEvent

from datasette_llm import PromptCancelled, PromptResponse

from .fakes import FakeModel
from .spies import Spy, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

CHUNKS = ["one ", "two ", "three"]


async def talks(prompt: str) -> AsyncGenerator[str, None]:
    for chunk in CHUNKS:
        await anyio.sleep(1)
        yield chunk


class Broken(Exception):
    pass


async def breaks(prompt: str) -> AsyncGenerator[str, None]:
    yield "half"
    await anyio.sleep(1)
    raise Broken("the line is dead")


async def test_many_live_and_late_readers_each_see_every_chunk_once_in_order() -> None:
    seen: dict[str, list[str]] = {}

    async def read(name: str, response: PromptResponse, delay: float, pause: float) -> None:
        await anyio.sleep(delay)
        chunks = seen[name] = []
        async for chunk in response:
            chunks.append(chunk)
            await anyio.sleep(pause)

    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        async with nothing_left(), anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(read, f"live {number}", response, 0, 0)
            tasks.start_soon(read, "half-way", response, 1.5, 0)
            tasks.start_soon(read, "late", response, 100, 0)
            tasks.start_soon(read, "slow", response, 0, 50)
    assert len(seen) == 8
    assert all(chunks == CHUNKS for chunks in seen.values())
    assert not response._bells


async def test_chunks_arrive_while_the_model_still_answers() -> None:
    with watched(FakeModel(talks), Spy()) as facade:
        response = await (await facade.model()).prompt("hi")
        began = anyio.current_time()
        times = [round(anyio.current_time() - began, 1) async for _ in response]
        assert times == [1.0, 2.0, 3.0]


async def test_a_reader_that_leaves_stops_neither_the_prompt_nor_the_others() -> None:
    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        async for chunk in response:
            assert chunk == "one "
            break
        async with aclosing(response.astream_events()) as events:
            assert (await anext(events)).chunk == "one "
        with pytest.raises(StopAsyncIteration):
            await anext(events)
        with anyio.move_on_after(0.5):
            async for _ in response:
                pass
        assert await response.text() == "".join(CHUNKS)
        assert not response._bells


async def test_a_reader_that_is_closed_lets_go_whoever_waits_in_it() -> None:
    heard: list[str] = []

    async def read(reader: Any) -> None:
        heard.extend([event.chunk async for event in reader])

    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        reader = response.astream_events()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, reader)
            await anyio.sleep(1.5)
            await reader.aclose()
        assert heard == ["one "]
        assert await response.text() == "".join(CHUNKS)


async def test_callbacks_of_any_kind_run_in_their_order() -> None:
    order: list[str] = []

    async def later(response: llm.AsyncResponse) -> None:
        await checkpoint()
        order.append("async")

    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        await response.on_done(later)
        await response.on_done(lambda response: order.append("sync"))
        await response.text()
        await response.on_done(lambda response: order.append("afterwards"))
        assert order == ["async", "sync", "afterwards"]


async def test_one_reader_object_goes_on_where_it_stopped() -> None:
    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        assert [await anext(response) for _ in CHUNKS] == CHUNKS
        with pytest.raises(StopAsyncIteration):
            await anext(response)


async def test_a_failed_response_raises_the_same_exception_to_every_reader_every_time() -> None:
    caught: list[BaseException] = []

    async def read(response: PromptResponse) -> None:
        reader = response.astream_events()
        assert (await anext(reader)).chunk == "half"
        with pytest.raises(Broken) as raised:
            await anext(reader)
        caught.append(raised.value)

    with watched(FakeModel(breaks)) as facade:
        response = await (await facade.model()).prompt("hi")
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(read, response)
        await read(response)
        depths = []
        for method in (
            response.text, response.json, response.usage, response.tool_calls, response.messages,
            response.duration_ms, response.datetime_utc, response.to_sync_response, response._force,
            response.reply, response.execute_tool_calls,
        ):  # fmt: skip
            with pytest.raises(Broken) as raised:
                await method()
            caught.append(raised.value)
            depths.append(len(raised.traceback))
        for read_now in (response.text_or_raise, response.tool_calls_or_raise, response.to_dict):
            with pytest.raises(Broken):
                read_now()
        with pytest.raises(Broken):
            response.log_to_db(sqlite_utils.Database(memory=True))
    assert set(map(id, caught)) == {id(response.error)}
    assert max(depths) - min(depths) <= 2, "the traceback grows with every reader"
    assert repr(response) == "<PromptResponse fake failed>"


async def test_a_cancelled_response_raises_prompt_cancelled() -> None:
    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        assert response.error is None
        response.cancel()
        for _ in range(2):
            with pytest.raises(PromptCancelled):
                await response
        assert repr(response) == "<PromptResponse fake cancelled>"


async def test_cancelling_after_the_end_changes_nothing() -> None:
    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi")
        text = await response.text()
        response.cancel()
        assert await response.text() == text
        assert response.error is None


async def test_it_offers_what_llms_response_offers() -> None:
    class Tells(FakeModel):
        async def execute(
            self, prompt: Any, stream: bool, response: Any, conversation: Any = None
        ) -> AsyncGenerator[str | StreamEvent, None]:
            await anyio.sleep(1)
            yield StreamEvent(type="reasoning", chunk="thinking")
            yield "answer"
            response.response_json = {"id": 1}
            response.set_usage(input=3, output=4, details={"cached": 1})
            response.set_resolved_model("fake-2026")

    with watched(Tells()) as facade:
        response = await (await facade.model()).prompt("hi", system="be brief")
        assert isinstance(response, llm.AsyncResponse)
        assert not response.done
        assert repr(response) == "<PromptResponse fake open>"
        with pytest.raises(ValueError, match="await"):
            response.text_or_raise()
        assert await response is response
        assert response.text_or_raise() == await response.text() == "answer"
        assert await response.json() == {"id": 1}
        usage = await response.usage()
        assert (usage.input, usage.output, usage.details) == (3, 4, {"cached": 1})
        assert await response.tool_calls() == response.tool_calls_or_raise() == []
        (message,) = await response.messages()
        assert [part.to_dict()["type"] for part in message.parts] == ["reasoning", "text"]
        assert await response.duration_ms() >= 0
        assert "T" in await response.datetime_utc()
        assert [event.type async for event in response.astream_events()] == ["reasoning", "text"]
        assert (response.resolved_model, response.model.model_id) == ("fake-2026", "fake")
        assert (response.prompt.prompt, response.prompt.system) == ("hi", "be brief")
        assert repr(response) == "<PromptResponse fake succeeded>"
        sync = await response.to_sync_response()
        assert (sync.text(), sync.id) == ("answer", response.id)
        assert response.to_dict()["messages"]
        assert response.attempts == 1
        assert response.token_usage() == sync.token_usage()


async def test_it_can_be_logged_to_llms_database() -> None:
    db = sqlite_utils.Database(memory=True)
    migrate(db)
    with watched(FakeModel(seconds=1)) as facade:
        response = await (await facade.model()).prompt("hi", system="be brief")
        with pytest.raises(ValueError, match="await"):
            response.log_to_db(db)
        await response.text()
        response.log_to_db(db)
    logged = [row for table in db.table_names() if not table.startswith("_") for row in db[table].rows]
    assert any("hi" in map(str, row.values()) or '"hi"' in str(row) for row in logged)
    assert any(response.id in map(str, row.values()) for row in logged)


async def test_reply_goes_on_with_the_exchange_as_history() -> None:
    histories: list[list[str]] = []

    class Remembers(FakeModel):
        async def execute(
            self, prompt: Any, stream: bool, response: Any, conversation: Any = None
        ) -> AsyncGenerator[str | StreamEvent, None]:
            histories.append([message.role for message in prompt.messages])
            yield "answer"

    spy = Spy()
    with watched(Remembers(), spy) as facade:
        first = await (await facade.model()).prompt("hi")
        # No need to wait first: it does.
        second = await first.reply("and then?")
        assert isinstance(second, PromptResponse)
        assert await second.text() == "answer"
    assert histories == [["user"], ["user", "assistant", "user"]]
    assert len(spy.visits) == 2
    assert [visit.left for visit in spy.visits] == [1, 1]


async def test_tool_calls_run_at_the_same_time() -> None:
    async def wait(number: int) -> str:
        await anyio.sleep(10)
        return f"waited {number}"

    class CallsTools(FakeModel):
        async def execute(
            self, prompt: Any, stream: bool, response: Any, conversation: Any = None
        ) -> AsyncGenerator[str | StreamEvent, None]:
            for number in range(3):
                response.add_tool_call(llm.ToolCall(name="wait", arguments={"number": number}))
            yield ""

    with watched(CallsTools()) as facade:
        response = await (await facade.model()).prompt("hi", tools=[wait])
        began = anyio.current_time()
        results = await response.execute_tool_calls()
        assert [result.output for result in results] == ["waited 0", "waited 1", "waited 2"]
        assert anyio.current_time() - began < 11
        one = await response.execute_tool_call((await response.tool_calls())[1])
        assert one.output == "waited 1"


async def test_an_unstreamed_answer_arrives_in_one_piece() -> None:
    with watched(FakeModel(talks)) as facade:
        response = await (await facade.model()).prompt("hi", stream=False)
        assert [chunk async for chunk in response] == CHUNKS
        assert [event.chunk async for event in response.astream_events()] == CHUNKS


async def test_a_retried_prompt_shows_no_reader_a_piece_of_the_attempt_that_failed() -> None:
    attempts = 0

    async def fails_once(prompt: str) -> AsyncGenerator[str, None]:
        nonlocal attempts
        attempts += 1
        yield f"attempt {attempts}"
        if attempts == 1:
            raise ConnectionError("lost")

    with watched(FakeModel(fails_once)) as facade:
        response = await (await facade.model()).prompt("hi")
        while attempts == 0:
            await checkpoint()
        # The reader comes while the prompt waits for its second attempt.
        assert response.attempts == 1
        assert not response.done
        assert [chunk async for chunk in response] == ["attempt 2"]
        assert response.attempts == 2


async def test_a_prompt_whose_chunks_somebody_has_seen_is_not_restarted() -> None:
    attempts = 0

    async def fails(prompt: str) -> AsyncGenerator[str, None]:
        nonlocal attempts
        attempts += 1
        yield "chunk"
        await anyio.sleep(1)
        raise ConnectionError("lost")

    with watched(FakeModel(fails)) as facade:
        response = await (await facade.model()).prompt("hi")
        assert await anext(response) == "chunk"
        with pytest.raises(ConnectionError):
            await anext(response)
    assert attempts == response.attempts == 1

"""Running the tool calls of a turn: what overlaps, what waits, what a cancellation stops."""

from __future__ import annotations

from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from anyio import get_cancelled_exc_class
from datasette.app import Datasette

from datasette_llm import LLM, PromptCancelled

from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from datasette_llm import GroupModel


class CallingModel(FakeModel):
    """Calls these tools at once, and when it has their results says what they were."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        if prompt.tool_results:
            yield ", ".join(result.output for result in prompt.tool_results)
            return
        yield ""
        if self.names and prompt.tools:
            for n, name in enumerate(self.names):
                response.add_tool_call(llm.ToolCall(name, {}, f"c{n}"))


@asynccontextmanager
async def calling(*names: str) -> AsyncIterator[GroupModel]:
    with registered(CallingModel(*names)):
        async with LLM(Datasette()).group("fake") as model:
            yield model


class Clock:
    """Tools that take time, and note when they begin and end."""

    def __init__(self) -> None:
        self.began = anyio.current_time()
        self.notes: list[tuple[float, str]] = []

    def note(self, what: str) -> None:
        self.notes.append((round(anyio.current_time() - self.began, 3), what))

    async def three(self) -> str:
        self.note("three")
        await anyio.sleep(3)
        return "3"

    async def one(self) -> str:
        self.note("one")
        await anyio.sleep(1)
        return "1"

    def at_once(self) -> str:
        self.note("at once")
        return "0"

    def awaitable(self) -> Any:
        async def take_time() -> str:
            await anyio.sleep(2)
            return "2"

        self.note("awaitable")
        return take_time()

    async def hangs(self) -> str:
        self.note("hangs")
        try:
            await anyio.sleep_forever()
        except get_cancelled_exc_class():
            self.note("stopped")
            raise
        return ""

    async def pauses(self) -> str:
        await anyio.sleep(1)
        raise llm.PauseChain("ask")


async def test_async_tools_of_a_turn_overlap() -> None:
    async with calling("three", "one", "three") as model:
        clock = Clock()
        text = await model.chain("go", tools=[clock.three, clock.one]).text()
        assert text == "3, 1, 3"
        assert anyio.current_time() - clock.began == pytest.approx(3)
    assert sorted(clock.notes) == [(0, "one"), (0, "three"), (0, "three")]


async def test_a_sync_tool_that_returns_an_awaitable_keeps_its_place() -> None:
    async with calling("three", "awaitable", "at_once") as model:
        clock = Clock()
        tools = [clock.three, clock.awaitable, clock.at_once]
        assert await model.chain("go", tools=tools).text() == "3, 2, 0"
        assert anyio.current_time() - clock.began == pytest.approx(3)
    assert (2, "at once") in clock.notes


async def test_siblings_of_a_pause_run_to_their_end() -> None:
    async with calling("pauses", "three", "one") as model:
        clock = Clock()
        with pytest.raises(llm.PauseChain, match="ask") as caught:
            await model.chain("go", tools=[clock.pauses, clock.three, clock.one]).text()
        assert anyio.current_time() - clock.began == pytest.approx(3)
    assert [result.output for result in caught.value.tool_results] == ["3", "1"]
    assert caught.value.tool_call is not None
    assert caught.value.tool_call.name == "pauses"


async def test_a_paused_chain_is_resumed_from_its_messages() -> None:
    answered: list[str] = []

    async def ask() -> str:
        if not answered:
            raise llm.PauseChain("ask")
        return answered[0]

    async with calling("one", "ask") as model:
        clock = Clock()
        chain = model.chain("go", tools=[clock.one, ask])
        with pytest.raises(llm.PauseChain) as caught:
            await chain.text()
        first = chain._responses[0]
        messages = [
            *first.prompt.messages,
            *await first.messages(),
            llm.tool_message(
                *(
                    llm.parts.ToolResultPart(name=r.name, output=r.output, tool_call_id=r.tool_call_id)
                    for r in caught.value.tool_results
                )
            ),
        ]
        answered.append("yes")
        resumed = model.chain(None, messages=messages, tools=[clock.one, ask])
        assert await resumed.text() == "yes"
    assert [what for _, what in clock.notes] == ["one"]


@pytest.mark.parametrize("how", ["chain", "group", "scope", "reader"])
async def test_tools_that_hang_are_cancelled(how: str) -> None:
    clock = Clock()
    with anyio.move_on_after(2 if how == "scope" else 100) as scope:
        async with calling("hangs", "hangs", "one") as model:
            chain = model.chain("go", tools=[clock.hangs, clock.one])

            async def reader() -> None:
                if how == "reader":
                    with anyio.move_on_after(2):
                        await chain.text()
                elif how == "scope":
                    await chain.text()
                else:
                    with pytest.raises(PromptCancelled):
                        await chain.text()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reader)
                await anyio.sleep(2)
                if how == "chain":
                    chain.cancel()
                elif how == "group":
                    model.cancel()
    assert scope.cancelled_caught == (how == "scope")
    assert [note for note in clock.notes if note[1] == "stopped"] == [(2, "stopped")] * 2


class Sudden(BaseException):
    """Not an Exception, and nothing that ends the program."""


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_tool_that_raises_no_exception_fails_its_chain_alone(asynchronous: bool) -> None:
    def sudden() -> str:
        raise Sudden("boo")

    async def async_sudden() -> str:
        raise Sudden("boo")

    async_sudden.__name__ = "sudden"
    async with calling("sudden", "one") as model:
        clock = Clock()
        with pytest.raises(RuntimeError, match="tool sudden raised Sudden: boo"):
            await model.chain("go", tools=[async_sudden if asynchronous else sudden, clock.one]).text()
        response = await model.prompt("still there")
        assert await response.text() == ""
    assert model.stats.failed == 1


async def test_a_hook_that_fails_arrives_bare() -> None:
    async def before(tool: Any, tool_call: Any) -> None:
        raise ArithmeticError("before")

    async with calling("one", "three") as model:
        clock = Clock()
        with pytest.raises(ArithmeticError, match="before"):
            await model.chain("go", tools=[clock.one, clock.three], before_call=before).text()


class Box(llm.Toolbox):
    """A toolbox that is slow to prepare."""

    def __init__(self) -> None:
        self.prepared = 0

    async def prepare_async(self) -> None:
        await anyio.sleep(1)
        self.prepared += 1

    async def look(self) -> str:
        await anyio.sleep(1)
        return f"prepared {self.prepared}"


async def test_a_toolbox_is_prepared_once_before_its_calls() -> None:
    box = Box()
    async with calling("Box_look", "Box_look") as model:
        began = anyio.current_time()
        assert await model.chain("go", tools=[box]).text() == "prepared 1, prepared 1"
        assert await model.chain("go", tools=[box]).text() == "prepared 1, prepared 1"
        assert anyio.current_time() - began == pytest.approx(3)


current: ContextVar[str] = ContextVar("current", default="nobody")


async def test_tools_run_in_the_context_of_the_reader_that_started_the_chain() -> None:
    async def who() -> str:
        return current.get()

    async with calling("who") as model:
        chain = model.chain("go", tools=[who])
        current.set("me")
        assert await chain.text() == "me"


# A response's own tool calls, without a chain


async def test_a_response_runs_its_tool_calls() -> None:
    seen: list[str] = []

    def after(tool: llm.Tool, tool_call: llm.ToolCall, result: llm.ToolResult) -> None:
        seen.append(result.output)

    async with calling("three", "one") as model:
        clock = Clock()
        response = await model.prompt("go", tools=[clock.three, clock.one])
        results = await response.execute_tool_calls(after_call=after)
        assert anyio.current_time() - clock.began == pytest.approx(3)
        assert [result.output for result in results] == ["3", "1"]
        assert seen == ["1", "3"]
        assert (await response.execute_tool_call(llm.ToolCall("one", {}))).output == "1"
        none: Sequence[Any] = []
        results = await response.execute_tool_calls(tools=list(none))
        assert [type(result.exception) for result in results] == [KeyError, KeyError]


async def test_a_reply_carries_the_results_of_the_tools() -> None:
    async with calling("one") as model:
        clock = Clock()
        response = await model.prompt("go", tools=[clock.one])
        reply = await response.reply()
        await reply.text()
        roles = [message.role for message in reply.prompt.messages]
        assert roles == ["user", "assistant", "tool"]

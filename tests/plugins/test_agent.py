"""datasette-agent's chat, its questions that suspend a turn, and its background agents."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from datasette.app import Datasette
from datasette.plugins import pm

from ..fakes import FakeModel, registered
from ..hooks import hooked
from ..patience import PATIENCE_SECONDS

datasette_agent = pytest.importorskip("datasette_agent", reason="datasette-agent is not installed")

from datasette_agent.tools import AgentTool  # noqa: E402 - not installed everywhere

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# Datasette's database uses threads, and its web server is asyncio.
pytestmark = [pytest.mark.real_clock, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


class ScriptedModel(FakeModel):
    """Says what its script has for each turn: texts and tool calls."""

    def __init__(self, *turns: list[Any]) -> None:
        super().__init__()
        self.turns = list(turns)
        self.roles: list[list[str]] = []

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        self.roles.append([message.role for message in prompt.messages])
        for step in self.turns.pop(0):
            if isinstance(step, llm.ToolCall):
                response.add_tool_call(step)
            else:
                yield step


class Wrapped:
    """A plugin that wraps prompts and notes how each chain was left."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def llm_prompt_context(self, purpose: str) -> Any:
        assert purpose == "agent"

        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            try:
                yield
            except Exception as error:
                self.ended.append(type(error).__name__)
                raise
            self.ended.append("complete" if result.chain_complete else "paused")

        return wrapper


async def shout(datasette: Any, actor: Any, text: str) -> str:
    return text.upper()


async def delete(datasette: Any, actor: Any, context: Any, table: str) -> str:
    sure = await context.ask_user(f"Delete {table}?")
    return "deleted" if sure else "kept"


def tool(function: Any, **parameters: str) -> AgentTool:
    schema = {"type": "object", "properties": {name: {"type": kind} for name, kind in parameters.items()}}
    return AgentTool(function.__name__, function.__name__, schema, function)


def agent_tools(datasette: Any) -> list[AgentTool]:
    return [tool(shout, text="string"), tool(delete, table="string")]


class Chat:
    """A conversation in datasette-agent's own pages."""

    def __init__(self, datasette: Datasette) -> None:
        self.datasette = datasette
        self.cookies = {"ds_actor": datasette.client.actor_cookie({"id": "root"})}
        self.url = ""

    async def post(self, url: str, data: Any) -> Any:
        return await self.datasette.client.post(url, json=data, cookies=self.cookies)

    async def begin(self) -> Chat:
        made = await self.post("/-/agent/api/conversations", {})
        self.url = "/-/agent/" + (made.json().get("conversation_id") or made.json()["id"])
        return self

    async def events(self, url: str, data: Any) -> list[tuple[str, Any]]:
        answer = await self.post(self.url + url, data)
        assert answer.status_code == 200, answer.text
        events = []
        for block in answer.text.strip().split("\n\n"):
            event, data = block.split("\n", 1)
            events.append((event.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return events

    async def roles(self) -> list[str]:
        database = self.datasette.get_internal_database()
        return [row["role"] for row in await database.execute("select role from agent_messages order by id")]


@asynccontextmanager
async def agent(model: ScriptedModel) -> AsyncIterator[tuple[Chat, Wrapped]]:
    wrapped = Wrapped()
    pm.register(datasette_agent)
    with (
        registered(model),
        hooked(
            register_agent_tools=agent_tools,
            llm_prompt_context=lambda purpose: wrapped.llm_prompt_context(purpose),
        ),
    ):
        datasette = Datasette(config={"plugins": {"datasette-llm": {"default_model": "fake"}}})
        datasette.root_enabled = True
        await datasette.invoke_startup()
        try:
            yield await Chat(datasette).begin(), wrapped
        finally:
            datasette.close()


async def test_a_chat_streams_texts_tool_calls_and_results() -> None:
    model = ScriptedModel(
        ["let me ", "see", llm.ToolCall("shout", {"text": "hi"}, "c1")], ["it is ", "HI"], ["bye"]
    )
    async with agent(model) as (chat, wrapped):
        events = await chat.events("/stream", {"message": "hello"})
        assert [name for name, _ in events] == [
            *["text_chunk"] * 2,
            "tool_call",
            "tool_result",
            *["text_chunk"] * 2,
            "done",
        ]
        assert events[3][1] == {"id": "id:c1", "name": "shout", "output": "HI"}
        assert await chat.roles() == ["user", "assistant", "tool", "assistant"]
        again = await chat.events("/stream", {"message": "and?"})
        assert again[0] == ("text_chunk", {"content": "bye"})
    assert wrapped.ended == ["complete", "complete"]
    assert model.roles[2][:4] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("answer", [True, False])
async def test_a_question_suspends_the_turn_and_its_answer_resumes_it(answer: bool) -> None:
    model = ScriptedModel(
        [llm.ToolCall("shout", {"text": "hi"}, "c1"), llm.ToolCall("delete", {"table": "t"}, "c2")], ["done"]
    )
    async with agent(model) as (chat, wrapped):
        events = dict(await chat.events("/stream", {"message": "delete it"}))
        assert events["done"] == {"question_pending": True}
        assert await chat.roles() == ["user", "assistant", "tool"]
        assert wrapped.ended == ["paused"]
        question = events["question"]["id"]
        resumed = await chat.events(f"/question/{question}", {"answer": answer})
        outputs = [data["output"] for name, data in resumed if name == "tool_result"]
        assert outputs == ["deleted" if answer else "kept"]
        assert resumed[-1] == ("done", {})
        assert await chat.roles() == ["user", "assistant", "tool", "tool", "assistant"]
    assert wrapped.ended == ["paused", "complete"]


async def test_a_failure_of_the_model_is_shown() -> None:
    class Broken(ScriptedModel):
        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
            yield "well"
            raise ZeroDivisionError("broken")

    async with agent(Broken()) as (chat, wrapped):
        events = await chat.events("/stream", {"message": "hello"})
    assert events == [("text_chunk", {"content": "well"}), ("error", {"message": "broken"})]
    assert wrapped.ended == ["ZeroDivisionError"]


async def test_a_background_agent_works_until_it_says_that_it_has_finished() -> None:
    from datasette_agent.api import get_background_agent_status, start_background_agent

    model = ScriptedModel(
        [llm.ToolCall("shout", {"text": "hi"}, "c1")],
        ["not yet"],
        [llm.ToolCall("mark_finished", {"final_message": "HI it is"}, "c2")],
        ["bye"],
    )
    async with agent(model) as (chat, wrapped):
        agent_id = await start_background_agent(chat.datasette, {"id": "root"}, "shout hi")
        status: Any = {}
        with anyio.fail_after(PATIENCE_SECONDS):
            while status.get("status") not in ("completed", "error"):
                await anyio.sleep(0.01)
                status = await get_background_agent_status(chat.datasette, agent_id)
    assert status["status"] == "completed", status
    assert status["final_message"] == "HI it is"
    assert wrapped.ended == ["complete", "complete"]

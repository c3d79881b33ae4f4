"""Chains mean what they mean in llm: each scenario runs with plain llm and here, and must go the same way.

Compared are what the reader gets, what the model is sent in each turn, what tools and hooks saw, and the
exception. Plain llm runs on asyncio, this package on both backends.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from anyio.lowlevel import checkpoint
from datasette.app import Datasette
from llm.parts import StreamEvent, TextPart, ToolCallPart, ToolResultPart

from datasette_llm import LLM

from .fakes import FakeModel, registered

if TYPE_CHECKING:
    from collections.abc import Callable

#: What a scripted turn is made of: chunks, events, tool calls and an exception to raise.
Turn = list[Any]


class ScriptedModel(FakeModel):
    """Answers with one scripted turn after the other, and keeps what it was sent."""

    supports_conversation = True

    def __init__(self, turns: list[Turn]) -> None:
        super().__init__()
        self.turns = list(turns)
        self.sent: list[str] = []

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
        self.sent.append(
            normal(
                prompt.prompt,
                prompt.system,
                prompt.messages,
                prompt.tool_results,
                [tool.name for tool in prompt.tools],
                prompt.options,
                prompt.attachments,
                prompt.hide_reasoning,
                prompt.schema,
                stream,
            )
        )
        for step in self.turns.pop(0):
            await checkpoint()
            if isinstance(step, llm.ToolCall):
                response.add_tool_call(step)
            elif isinstance(step, Exception):
                raise step
            else:
                yield step
        response.set_usage(input=1, output=2)


def normal(*values: Any) -> str:
    """Describe values so that two runs can be compared: without ids and addresses."""
    text = repr(values)
    text = re.sub(r"tc_[0-9a-z]{26}", "tc_ID", text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def call(name: str, id: str | None = None, **arguments: Any) -> llm.ToolCall:
    return llm.ToolCall(name, arguments, id)


@dataclass
class World:
    """The tools and hooks of one run, and what they noted."""

    notes: list[str] = field(default_factory=list)

    def note(self, *values: Any) -> None:
        self.notes.append(normal(*values))

    @property
    def double(self) -> Callable[..., Any]:
        def double(x: int) -> int:
            self.note("double", x)
            return 2 * x

        return double

    @property
    def slow(self) -> Callable[..., Any]:
        async def slow(x: str = "") -> str:
            self.note("slow", x)
            await checkpoint()
            return f"slowly {x}"

        return slow

    @property
    def fails(self) -> Callable[..., Any]:
        async def fails() -> str:
            raise LookupError("nothing here")

        return fails

    @property
    def fails_at_once(self) -> Callable[..., Any]:
        def fails_at_once() -> str:
            raise LookupError("nothing here")

        return fails_at_once

    @property
    def pauses(self) -> Callable[..., Any]:
        async def pauses(why: str) -> str:
            raise llm.PauseChain(why)

        return pauses

    @property
    def pauses_at_once(self) -> Callable[..., Any]:
        def pauses_at_once(why: str) -> str:
            self.note("pauses", why)
            raise llm.PauseChain(why)

        return pauses_at_once

    @property
    def knows_its_call(self) -> Callable[..., Any]:
        async def knows_its_call(x: int, llm_tool_call: llm.ToolCall) -> str:
            return f"{x} for {llm_tool_call.tool_call_id}"

        return knows_its_call

    @property
    def draws(self) -> Callable[..., Any]:
        async def draws() -> llm.ToolOutput:
            return llm.ToolOutput(
                output={"size": 3}, attachments=[llm.Attachment(type="image/png", content=b"png")]
            )

        return draws

    @property
    def later(self) -> Callable[..., Any]:
        def later(x: int) -> Any:
            async def value() -> list[int | None]:
                await checkpoint()
                return [x, None]

            return value()

        return later

    @property
    def box(self) -> llm.Toolbox:
        world = self

        class Box(llm.Toolbox):
            def __init__(self, start: int) -> None:
                self.value = start

            async def prepare_async(self) -> None:
                world.note("prepared")
                self.value += 100

            async def add(self, n: int) -> int:
                self.value += n
                return self.value

            def look(self) -> str:
                return f"value {self.value}"

        return Box(1)


Hook = Any


def sync_before(world: World) -> Hook:
    def before(tool: Any, tool_call: llm.ToolCall) -> None:
        world.note("before", getattr(tool, "name", None), tool_call)
        if tool_call.arguments.get("x") == 13:
            raise llm.CancelToolCall("unlucky")

    return before


def async_before(world: World) -> Hook:
    async def before(tool: Any, tool_call: llm.ToolCall) -> None:
        await checkpoint()
        sync_before(world)(tool, tool_call)

    return before


def failing_before(world: World) -> Hook:
    async def before(tool: Any, tool_call: llm.ToolCall) -> None:
        if tool_call.arguments.get("x") == 13:
            raise ArithmeticError("before")

    return before


def async_after(world: World) -> Hook:
    async def after(tool: Any, tool_call: llm.ToolCall, result: llm.ToolResult) -> None:
        await checkpoint()
        world.note("after", tool.name, tool_call, result.output, result.exception)
        result.output = result.output.upper()

    return after


def failing_after(world: World) -> Hook:
    def after(tool: Any, tool_call: llm.ToolCall, result: llm.ToolResult) -> None:
        if tool_call.arguments.get("x") == 13:
            raise ArithmeticError("after")

    return after


@dataclass
class Scenario:
    """What the model says, and how the chain is asked for."""

    turns: list[Turn]
    tools: str = ""
    before: Callable[[World], Hook] | None = None
    after: Callable[[World], Hook] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def keywords(self, world: World) -> dict[str, Any]:
        keywords = dict(self.arguments)
        if self.tools:
            keywords["tools"] = [getattr(world, name) for name in self.tools.split()]
        if self.before:
            keywords["before_call"] = self.before(world)
        if self.after:
            keywords["after_call"] = self.after(world)
        return keywords


def history(*parts: Any) -> list[llm.Message]:
    """A history that ends in two open tool calls, and what came after them."""
    return [
        llm.user("go"),
        llm.Message(
            role="assistant",
            parts=[
                TextPart(text="calling"),
                ToolCallPart(name="double", arguments={"x": 2}, tool_call_id="c1"),
                ToolCallPart(name="slow", arguments={"x": "b"}, tool_call_id="c2"),
            ],
        ),
        *parts,
    ]


def result_message(name: str, id: str | None) -> llm.Message:
    return llm.Message(role="tool", parts=[ToolResultPart(name=name, output="done", tool_call_id=id)])


NO_IDS = [
    llm.user("go"),
    llm.Message(
        role="assistant",
        parts=[ToolCallPart(name="double", arguments={"x": n}) for n in (1, 2)],
    ),
    llm.Message(role="tool", parts=[ToolResultPart(name="double", output="2")]),
]

END: Turn = ["the ", "end"]
SCENARIOS: dict[str, Scenario] = {
    "no tools": Scenario([END]),
    "nothing said": Scenario([[]]),
    "tools unused": Scenario([END], "double"),
    "sync tool": Scenario([["a", call("double", "c1", x=2)], END], "double"),
    "async tool": Scenario([["a", call("slow", "c1", x="b")], END], "slow"),
    "calls without ids": Scenario([[call("slow", x="b"), call("slow", x="c")], END], "slow"),
    "async and sync tools": Scenario(
        [[call("slow", "c1", x="1"), call("double", "c2", x=2), call("slow", "c3", x="3")], END],
        "slow double",
    ),
    "three turns": Scenario([[call("double", "c1", x=1)], [call("double", "c2", x=2)], END], "double"),
    "spaces": Scenario(
        [
            ["a ", call("double", "1", x=1)],
            ["b", call("double", "2", x=1)],
            ["", "c\n", call("double", "3", x=1)],
            ["d"],
        ],
        "double",
    ),
    "a space of its own": Scenario([["a", call("double", "1", x=1)], [" b"]], "double"),
    "reasoning": Scenario(
        [
            [
                StreamEvent(type="reasoning", chunk="hm"),
                "a",
                StreamEvent(type="tool_call_name", chunk="double", tool_call_id="c1"),
                StreamEvent(type="tool_call_args", chunk='{"x": 2}', tool_call_id="c1"),
                call("double", "c1", x=2),
            ],
            END,
        ],
        "double",
    ),
    "failing tools": Scenario(
        [[call("fails", "1"), call("fails_at_once", "2"), call("double", "3", x=1)], END],
        "fails fails_at_once double",
    ),
    "unknown tool": Scenario(
        [[call("nowhere", "1"), call("double", "2", x=1)], END], "double", sync_before, async_after
    ),
    "wrong arguments": Scenario([[call("slow", "1", y=1), call("double", "2", y=1)], END], "slow double"),
    "wrong tool": Scenario([END], arguments={"tools": [7]}),
    "call that knows itself": Scenario(
        [[call("knows_its_call", "c1", x=1), call("knows_its_call", "c2", x=2)], END], "knows_its_call"
    ),
    "attachments": Scenario([[call("draws", "1"), call("draws", "2")], END], "draws"),
    "awaitable of a sync tool": Scenario([[call("later", "1", x=1)], END], "later"),
    "toolbox": Scenario(
        [[call("Box_add", "1", n=1)], [call("Box_look", "2"), call("Box_add", "3", n=2)], END], "box"
    ),
    "toolbox twice a turn": Scenario([[call("Box_look", "1"), call("Box_look", "2")], END], "box"),
    "sync hook cancels": Scenario(
        [[call("double", "1", x=13), call("double", "2", x=2)], END], "double", sync_before
    ),
    "async hook cancels": Scenario(
        [[call("slow", "1", x=13), call("slow", "2", x=2)], END], "slow", async_before
    ),
    "hook cancels an unknown tool": Scenario([[call("nowhere", "1", x=13)], END], "slow", async_before),
    "hooks around": Scenario(
        [[call("slow", "1", x="a"), call("double", "2", x=2)], END], "slow double", async_before, async_after
    ),
    "failing before": Scenario(
        [[call("slow", "1", x=13), call("double", "2", x=2)], END], "slow double", failing_before
    ),
    "failing before, sync": Scenario(
        [[call("slow", "1", x=1), call("double", "2", x=13), call("double", "3", x=2)], END],
        "slow double",
        failing_before,
    ),
    "failing after": Scenario(
        [[call("slow", "1", x=13), call("double", "2", x=2)], END], "slow double", None, failing_after
    ),
    "failing after, sync": Scenario(
        [[call("double", "2", x=13), call("slow", "1", x=2)], END], "slow double", None, failing_after
    ),
    "failure beats pause": Scenario(
        [[call("pauses", "1", why="w"), call("slow", "2", x=13)], END], "pauses slow", failing_before
    ),
    "pause": Scenario([["wait", call("pauses", "c1", why="ask")], END], "pauses"),
    "pause with siblings": Scenario(
        [[call("slow", "1", x="s"), call("pauses", "2", why="ask"), call("double", "3", x=1)], END],
        "pauses slow double",
    ),
    "sync pause with siblings": Scenario(
        [
            [
                call("slow", "1", x="s"),
                call("double", "2", x=1),
                call("pauses_at_once", "3", why="ask"),
                call("double", "4", x=4),
                call("slow", "5", x="t"),
            ],
            END,
        ],
        "pauses_at_once slow double",
    ),
    "two pauses": Scenario(
        [[call("pauses", "1", why="first"), call("pauses", "2", why="second")], END], "pauses"
    ),
    "pause in the second turn": Scenario(
        [[call("double", "1", x=1)], [call("pauses", "2", why="ask")], END], "pauses double"
    ),
    "resume": Scenario([END], "double slow", arguments={"prompt": None, "messages": history()}),
    "resume half-way": Scenario(
        [END], "double slow", arguments={"prompt": None, "messages": history(result_message("double", "c1"))}
    ),
    "resume without ids": Scenario([END], "double", arguments={"prompt": None, "messages": NO_IDS}),
    "resume into more": Scenario(
        [[call("double", "c3", x=9)], END],
        "double slow",
        async_before,
        async_after,
        {"prompt": None, "messages": history()},
    ),
    "resume into a pause": Scenario(
        [END],
        "double pauses",
        arguments={
            "prompt": None,
            "messages": [
                llm.user("go"),
                llm.Message(
                    role="assistant",
                    parts=[
                        ToolCallPart(name="pauses", arguments={"why": "x"}, tool_call_id="c1"),
                        ToolCallPart(name="double", arguments={"x": 1}, tool_call_id="c2"),
                    ],
                ),
            ],
        },
    ),
    "a history that went on": Scenario(
        [END], "double slow", arguments={"prompt": None, "messages": history(llm.user("never mind"))}
    ),
    "history and prompt": Scenario(
        [END], "double slow", arguments={"prompt": "and now?", "messages": history()}
    ),
    "resume without tools": Scenario([END], arguments={"prompt": None, "messages": history()}),
    "limit reached": Scenario(
        [[call("double", "1", x=1)], [call("double", "2", x=1)], END], "double", arguments={"chain_limit": 2}
    ),
    "limit not reached": Scenario([[call("double", "1", x=1)], END], "double", arguments={"chain_limit": 3}),
    "limit at the last turn": Scenario(
        [[call("double", "1", x=1)], END], "double", arguments={"chain_limit": 2}
    ),
    "limit of one": Scenario([END], arguments={"chain_limit": 1}),
    "no limit": Scenario([*([[call("double", "1", x=1)]] * 14), END], "double"),
    "limit of nothing": Scenario([[call("double", "1", x=1)], END], "double", arguments={"chain_limit": 0}),
    "system and options": Scenario(
        [[call("draws", "1")], END],
        "draws",
        arguments={
            "system": "be brief",
            "system_fragments": ["more"],
            "fragments": ["text"],
            "options": {"temperature": 0.5},
            "hide_reasoning": True,
            "stream": False,
            "tool_results": [llm.ToolResult(name="earlier", output="7", tool_call_id="c0")],
        },
    ),
    "schema": Scenario([[call("double", "1", x=1)], END], "double", arguments={"schema": {"type": "object"}}),
    "unknown option": Scenario([END], arguments={"options": {"heat": 1}}),
    "unknown argument": Scenario([END], arguments={"heat": 1}),
    "model fails": Scenario([[ZeroDivisionError("at once")]]),
    "model fails half-way": Scenario([["a", "b", ZeroDivisionError("half-way")]]),
    "model fails in the second turn": Scenario(
        [["a", call("double", "1", x=1)], ["b", ZeroDivisionError("second")]], "double"
    ),
}


async def by_responses(chain: Any, got: list[Any]) -> None:
    async for response in chain.responses():
        text = await response.text()
        got.append([text, normal(await response.tool_calls(), await response.messages())])


async def by_iteration(chain: Any, got: list[Any]) -> None:
    async for text in chain:
        got.append(text)  # noqa: PERF401 - what came before an error counts


async def by_events(chain: Any, got: list[Any]) -> None:
    async for event in chain.astream_events():
        got.append(normal(event))  # noqa: PERF401 - what came before an error counts


async def by_text(chain: Any, got: list[Any]) -> None:
    got.append(await chain.text())


WAYS = [by_responses, by_iteration, by_events, by_text]


@dataclass
class Run:
    """How a scenario went."""

    got: list[Any]
    error: str | None
    sent: list[str]
    notes: list[str]


async def run(
    make: Callable[..., Any], model: ScriptedModel, scenario: Scenario, read: Any, world: World
) -> Run:
    got: list[Any] = []
    error = None
    try:
        keywords = scenario.keywords(world)
        chain = make(keywords.pop("prompt", "go"), **keywords)
        await read(chain, got)
    except Exception as problem:
        error = normal(type(problem), str(problem))
        if isinstance(problem, llm.PauseChain):
            error += normal(problem.tool_call, problem.tool_results)
    # Tools of one turn overlap; which is a step ahead of which is up to the backend.
    return Run(got, error, model.sent, sorted(world.notes))


async def with_llm(scenario: Scenario, read: Any) -> Run:
    model = ScriptedModel(scenario.turns)
    return await run(model.conversation().chain, model, scenario, read, World())


async def with_datasette_llm(scenario: Scenario, read: Any) -> Run:
    model = ScriptedModel(scenario.turns)
    with registered(model):
        wrapped = await LLM(Datasette()).model("fake")
        return await run(wrapped.chain, model, scenario, read, World())


async def with_a_conversation(scenario: Scenario, read: Any) -> Run:
    model = ScriptedModel(scenario.turns)
    with registered(model):
        conversation = (await LLM(Datasette()).model("fake")).conversation()
        return await run(conversation.chain, model, scenario, read, World())


@pytest.mark.parametrize("read", WAYS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_goes_as_with_llm(name: str, read: Any) -> None:
    scenario = SCENARIOS[name]
    expected = asyncio.run(with_llm(scenario, read))
    for backend in ("asyncio", "trio"):
        assert anyio.run(with_datasette_llm, scenario, read, backend=backend) == expected, backend
        assert anyio.run(with_a_conversation, scenario, read, backend=backend) == expected, backend


def test_the_scenarios_end_in_every_way() -> None:
    runs = [asyncio.run(with_llm(scenario, by_text)) for scenario in SCENARIOS.values()]
    errors = " ".join(run.error or "success" for run in runs)
    for ending in (
        "success",
        "PauseChain",
        "ValueError",
        "TypeError",
        "ZeroDivisionError",
        "ArithmeticError",
    ):
        assert ending in errors


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_conversation_of_chains_goes_as_with_llm(backend: str) -> None:
    turns: list[Turn] = [[call("double", "1", x=1)], ["one"], ["two"], [call("slow", "2", x="s")], ["three"]]

    async def converse(conversation: Any, model: ScriptedModel, *, wrapped: bool) -> Any:
        texts = [await conversation.chain("first", system="be brief").text()]
        response = conversation.prompt("second")
        texts.append(await (await response if wrapped else response).text())
        texts.append(await conversation.chain("third").text())
        said = [normal(r.prompt.messages, r._messages_now()) for r in conversation.responses]
        return texts, said, model.sent

    def settings(world: World) -> dict[str, Any]:
        return {
            "tools": [world.double, world.slow],
            "before_call": async_before(world),
            "after_call": async_after(world),
            "chain_limit": 3,
        }

    async def plain() -> Any:
        model, world = ScriptedModel(turns), World()
        return await converse(model.conversation(**settings(world)), model, wrapped=False), world.notes

    async def ours() -> Any:
        model, world = ScriptedModel(turns), World()
        with registered(model):
            conversation = (await LLM(Datasette()).model("fake")).conversation(**settings(world))
            return await converse(conversation, model, wrapped=True), world.notes

    assert anyio.run(ours, backend=backend) == asyncio.run(plain())

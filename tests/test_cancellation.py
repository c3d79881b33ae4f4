"""The matrix: a prompt at every point of its life, cancelled in every way there is.

Each case brings a prompt of a group to a point, where it stays for two seconds unless interrupted, and
then cancels. What must hold afterwards is the same for all of them (``check``).
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import anyio
import llm as llm_library
import pytest
from anyio import get_cancelled_exc_class

from datasette_llm import GroupClosed, PromptCancelled
from datasette_llm.backends.datasette_side import backend

from .fakes import FakeModel
from .spies import Spy, Visit, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from datasette_llm import LLM, GroupModel

POINTS = [
    "waiting for a slot", "entering the first wrapper", "entering the second wrapper",
    "entering the last wrapper", "waiting for the first prompt to enter", "before the first chunk",
    "in the middle of the stream", "between two attempts", "in a wrapper's callback",
    "in the caller's callback", "leaving the last wrapper", "leaving the first wrapper",
    "in the group's exit hook", "in the source of a map", "in to_prompt", "in a prompt of a map",
    "in a tool", "between two turns of a chain", "in a turn of a conversation", "waiting for a turn",
]  # fmt: skip
WAYS = ["body exception", "outer scope", "deadline", "response.cancel()", "model.cancel()", "Task.cancel()"]


class BodyError(Exception):
    pass


class Case:
    """One case under way: what its plugins, its model and its caller do."""

    def __init__(self, point: str, way: str) -> None:
        self.point, self.way = point, way
        self.reached = anyio.Event()
        self.began = anyio.Event()
        self.done = anyio.Event()
        self.scope = anyio.CancelScope()
        self.task: asyncio.Task[Any] | None = None
        self.spies = [
            Spy(name, entering=self.entering, leaving=self.leaving) for name in ("first", "second", "last")
        ]
        self.spies[1].answered = self.answered
        self.spies[1].exiting = self.exiting
        self.model = Model(self)
        self.group: GroupModel

    async def hold(self, point: str) -> None:
        """Stay at this point for a while, if it is the one this case is about."""
        if point == self.point:
            self.reached.set()
            await anyio.sleep(2)

    async def entering(self, visit: Visit) -> None:
        if visit.prompt == "slow to enter":
            self.reached.set()
            await anyio.sleep(2)
        elif visit.prompt == "subject":
            await self.hold(f"entering the {visit.plugin} wrapper")

    async def leaving(self, visit: Visit) -> None:
        if visit.prompt == "subject":
            await self.hold(f"leaving the {visit.plugin} wrapper")

    async def answered(self, response: Any) -> None:
        await self.hold("in a wrapper's callback")

    async def exiting(self, group: Any) -> None:
        await self.hold("in the group's exit hook")

    async def caller(self) -> None:
        """What the plugin under test does with its group."""
        try:
            await self.use(self.group)
        except (PromptCancelled, GroupClosed):
            pass
        finally:
            self.done.set()

    async def use(self, group: GroupModel) -> None:
        if "map" in self.point or self.point == "in to_prompt":
            async for _, response in group.map(self.source(), self.to_prompt):
                await response.text()
        elif self.point in ("in a tool", "between two turns of a chain"):
            async for response in group.chain("subject", tools=[self.tool]).responses():
                await response.text()
                await self.hold("between two turns of a chain")
        elif "turn" in self.point:
            conversation = group.conversation()
            await conversation.prompt("subject" if self.point.startswith("in") else "blocker")
            self.reached.set()
            await (await conversation.prompt("subject")).text()
        elif self.point == "waiting for a slot":
            await group.prompt("blocker")
            self.reached.set()
            await group.prompt("subject")
        elif self.point == "waiting for the first prompt to enter":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.ask_in_vain, "slow to enter")
                await self.reached.wait()
                tasks.start_soon(self.ask_in_vain, "subject")
        else:
            response = await group.prompt("subject")
            await response.on_done(lambda _: self.hold("in the caller's callback"))
            await response.text()

    async def ask_in_vain(self, prompt: str) -> None:
        try:
            await (await self.group.prompt(prompt)).text()
        except (PromptCancelled, GroupClosed):
            pass

    async def source(self) -> AsyncIterator[str]:
        yield "subject"
        await self.hold("in the source of a map")
        yield "subject"

    def to_prompt(self, item: str) -> str:
        if self.point == "in to_prompt":
            # Nothing can interrupt it; but it may well be what cancels.
            self.reached.set()
            self.cancel()
        return item

    async def tool(self) -> str:
        await self.hold("in a tool")
        return "done"

    async def body(self) -> None:
        if self.point == "in the group's exit hook":
            if self.way == "body exception":
                raise BodyError
        elif self.way == "body exception":
            await self.reached.wait()
            raise BodyError
        elif self.way in ("response.cancel()", "model.cancel()"):
            await self.done.wait()
        else:
            await anyio.sleep_forever()

    def cancel(self) -> None:
        if self.way == "outer scope":
            self.scope.cancel()
        elif self.way == "deadline":
            self.scope.deadline = anyio.current_time() + 0.5
        elif self.way == "response.cancel()":
            for response in self.group.group._responses:
                response.cancel()
        elif self.way == "model.cancel()":
            self.group.cancel()
        elif self.way == "Task.cancel()":
            assert self.task is not None
            self.task.cancel()

    async def block(self, llm: LLM) -> None:
        """The task that runs the group's block."""
        self.task = asyncio.current_task() if backend() == "asyncio" else None
        try:
            with self.scope:
                concurrency = 1 if self.point == "waiting for a slot" else 10
                async with llm.group(concurrency=concurrency) as self.group:
                    self.began.set()
                    await self.body()
        except BodyError:
            assert self.way == "body exception"
        except get_cancelled_exc_class():
            if self.way != "Task.cancel()":
                raise
            if sys.version_info >= (3, 11) and self.task is not None:
                self.task.uncancel()
        else:
            assert self.way != "body exception"
            if self.way in ("outer scope", "deadline"):
                # Exit hooks are shielded: nothing after them noticed the cancellation.
                assert self.scope.cancelled_caught or self.point == "in the group's exit hook"

    async def canceller(self) -> None:
        await self.reached.wait()
        if self.point != "in to_prompt":
            self.cancel()

    def check(self) -> None:
        for spy in self.spies:
            spy.check()
            assert len(spy.exits) == 1
        counts = self.model.counts
        assert counts["opened"] == counts["closed"]
        group = self.group.group
        assert group.closed
        slots = self.group._supervisor.slots
        assert slots.in_use == slots.lane.in_use == slots.lane.waiting == 0
        stats = group.stats
        assert (stats.waiting, stats.running) == (0, 0)
        assert not self.group._supervisor._live
        assert not self.group._supervisor._maps
        for response in group._responses:
            assert response.done
            assert not response._bells
            assert not response._waiters


class Model(FakeModel):
    """Stays where the case wants it; calls the tool once, if there is one."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[str, None]:
        case = self.case
        self.counts["opened"] += 1
        try:
            if prompt.prompt == "blocker":
                await anyio.sleep(3)
            await case.hold("before the first chunk")
            yield "chunk"
            if case.point == "between two attempts":
                case.reached.set()
                raise ConnectionError
            await case.hold("in the middle of the stream")
            await case.hold("in a prompt of a map")
            await case.hold("in a turn of a conversation")
            if prompt.tools and not prompt.tool_results:
                response.add_tool_call(llm_library.ToolCall(name="tool", arguments={}))
            yield "last"
        finally:
            self.counts["closed"] += 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("point", POINTS)
async def test_cancelled(point: str, way: str) -> None:
    if way == "Task.cancel()" and backend() == "trio":
        pytest.skip("trio has no such thing")
    case = Case(point, way)
    with watched(case.model, *case.spies) as llm:
        began = anyio.current_time()
        async with nothing_left(), anyio.create_task_group() as tasks:
            tasks.start_soon(case.block, llm)
            await case.began.wait()
            tasks.start_soon(case.caller)
            tasks.start_soon(case.canceller)
        assert case.reached.is_set(), "the case never got to its point"
        assert anyio.current_time() - began < 12
    case.check()

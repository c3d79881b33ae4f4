"""Whatever is cancelled, whenever: nothing is left open, and nobody is told twice or not at all.

Each example is a plan: a few groups, maps and standalone prompts side by side, what models and plugins
do in them, and when each is cancelled in which way. ``pytest --random-cancellations 10000`` tries so many
new plans per backend.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio import get_cancelled_exc_class
from datasette.app import Datasette
from hypothesis import given, settings
from hypothesis import strategies as st

from datasette_llm import GroupClosed, PromptCancelled, PromptResponse
from datasette_llm._compat import ExceptionGroup
from datasette_llm.backends.datasette_side import backend

from .fakes import FakeModel
from .spies import Spy, Visit, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from datasette_llm import LLM, GroupModel


class Broken(Exception):
    pass


class Odd(BaseException):
    pass


class BodyError(Exception):
    pass


FAILURES: dict[str, Any] = {
    "broken": Broken, "lost": ConnectionError, "odd": Odd,
}  # fmt: skip
if sys.version_info >= (3, 11):
    # Before, asyncio does not tell whether a task was really cancelled, so wrappers see this one bare.
    FAILURES["stray"] = asyncio.CancelledError
EXPECTED = (Broken, ConnectionError, RuntimeError, PromptCancelled, GroupClosed)

# Few different times, so that things happen at the same moment.
moments = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])


@dataclass(frozen=True)
class Prompt:
    """What happens to one prompt."""

    enter: tuple[float, float]
    refuse: bool
    think: float
    chunks: int
    fail: str
    stubborn: float
    callback: float
    settle: tuple[float, float]
    read: bool


@dataclass(frozen=True)
class Job:
    """Something that prompts: a group, a map in a group, or standalone prompts."""

    kind: str
    start: float
    concurrency: int
    on_error: Any
    prompts: tuple[Prompt, ...]
    way: str
    when: float


prompts = st.builds(
    Prompt,
    enter=st.tuples(moments, moments),
    refuse=st.sampled_from([False] * 9 + [True]),
    think=moments,
    chunks=st.integers(0, 2),
    fail=st.sampled_from(["", "", "", *FAILURES]),
    stubborn=st.sampled_from([0.0, 0.0, 0.0, 1.0, 7.0]),
    callback=moments,
    settle=st.tuples(moments, moments),
    read=st.booleans(),
)
jobs = st.builds(
    Job,
    kind=st.sampled_from(["group", "map", "alone"]),
    start=moments,
    concurrency=st.integers(1, 3),
    on_error=st.sampled_from(["collect", "collect", "cancel"]),
    prompts=st.lists(prompts, min_size=1, max_size=5).map(tuple),
    way=st.sampled_from(["", "body", "scope", "deadline", "response", "model", "task"]),
    when=st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0]),
)


class World:
    """Runs a plan and knows what must hold at its end."""

    def __init__(self, plan: list[Job], llm: LLM, model: Model, spies: list[Spy]) -> None:
        self.plan, self.llm, self.model, self.spies = plan, llm, model, spies
        self.groups: list[GroupModel] = []
        self.responses: list[PromptResponse] = []
        model.world = self
        for index, spy in enumerate(spies):
            spy.entering = self.entering(index)
            spy.leaving = self.leaving(index)
        if spies:
            spies[-1].answered = self.answered

    def prompt(self, name: str | None) -> Prompt:
        job, _, index = str(name).partition("/")
        return self.plan[int(job)].prompts[int(index)]

    def entering(self, index: int) -> Any:
        async def entering(visit: Visit) -> None:
            prompt = self.prompt(visit.prompt)
            await anyio.sleep(prompt.enter[index])
            if prompt.refuse and index == 1:
                raise Broken

        return entering

    def leaving(self, index: int) -> Any:
        async def leaving(visit: Visit) -> None:
            await anyio.sleep(self.prompt(visit.prompt).settle[index])

        return leaving

    async def answered(self, response: Any) -> None:
        await anyio.sleep(self.prompt(response.prompt.prompt).callback)

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for number, job in enumerate(self.plan):
                tasks.start_soon(Running(self, number, job).run)

    def check(self) -> None:
        for spy in self.spies:
            spy.check()
            assert sorted(map(id, spy.exits)) == sorted(id(model.group) for model in self.groups)
        counts = self.model.counts
        assert counts["opened"] == counts["closed"]
        for model in self.groups:
            group, stats = model.group, model.stats
            assert (stats.waiting, stats.running) == (0, 0)
            slots = model._supervisor.slots
            assert slots.in_use == slots.lane.in_use == slots.lane.waiting == 0
            assert not model._supervisor._live
            assert not model._supervisor._maps
            self.responses += group._responses
        for response in self.responses:
            assert response.done
            assert not response._bells
            assert not response._waiters


class Running:
    """One job under way."""

    def __init__(self, world: World, number: int, job: Job) -> None:
        self.world, self.job = world, job
        self.names = [f"{number}/{index}" for index in range(len(job.prompts))]
        self.scope = anyio.CancelScope()
        self.task: asyncio.Task[Any] | None = None
        self.group: GroupModel | None = None
        self.mine: list[PromptResponse] = []

    async def run(self) -> None:
        await anyio.sleep(self.job.start)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.canceller)
            await self.block()
            tasks.cancel_scope.cancel()

    async def block(self) -> None:
        self.task = asyncio.current_task() if backend() == "asyncio" else None
        try:
            with self.scope:
                await (self.alone() if self.job.kind == "alone" else self.in_group())
        except BodyError:
            assert self.job.way == "body"
        except (*EXPECTED, ExceptionGroup):
            assert self.job.on_error == "cancel" or self.job.kind == "alone"
        except get_cancelled_exc_class():
            if self.job.way != "task" or self.task is None:
                raise
            if sys.version_info >= (3, 11):
                self.task.uncancel()
        self.task = None

    async def alone(self) -> None:
        model = await self.world.llm.model()
        await self.prompt(model.prompt)

    async def in_group(self) -> None:
        job = self.job
        async with self.world.llm.group(concurrency=job.concurrency, on_error=job.on_error) as self.group:
            self.world.groups.append(self.group)
            if job.kind == "map":
                try:
                    async for _, response in self.group.map(self.source()):
                        assert response.done
                except PromptCancelled:
                    pass
            else:
                await self.prompt(self.group.prompt)
            if job.way == "body":
                raise BodyError

    async def source(self) -> AsyncIterator[str]:
        for name in self.names:
            await anyio.sleep(self.world.prompt(name).think)
            yield name

    async def prompt(self, send: Any) -> None:
        for name in self.names:
            try:
                response = await send(name)
                self.mine.append(response)
                self.world.responses.append(response)
                if self.world.prompt(name).read:
                    await response.text()
            except EXPECTED:
                pass

    async def canceller(self) -> None:
        await anyio.sleep(self.job.when)
        if self.job.way == "scope":
            self.scope.cancel()
        elif self.job.way == "deadline":
            self.scope.deadline = anyio.current_time() + 0.5
        elif self.job.way == "response":
            for response in self.mine or (self.group.group._responses if self.group else []):
                response.cancel()
        elif self.job.way == "model" and self.group is not None:
            self.group.cancel()
        elif self.job.way == "task" and self.task is not None:
            self.task.cancel()


class Model(FakeModel):
    """Does what the plan says."""

    world: World

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[str, None]:
        plan = self.world.prompt(prompt.prompt)
        self.counts["opened"] += 1
        try:
            await anyio.sleep(plan.think)
            for _ in range(plan.chunks):
                yield "chunk"
                await anyio.sleep(0.5)
            if plan.fail:
                raise FAILURES[plan.fail]
        finally:
            self.counts["closed"] += 1
            with anyio.CancelScope(shield=True):
                await anyio.sleep(plan.stubborn)


@cache
def datasette_of(backend: str) -> Datasette:
    """One for all plans: a Datasette object is never freed, and there may be ten thousand."""
    settings = {"default_model": "fake", "retries": {"attempts": 2, "timeout": 20}}
    return Datasette(config={"plugins": {"datasette-llm": settings}})


@pytest.mark.timeout(3600)
@settings(settings.get_profile("random cancellations"))
@given(plan=st.lists(jobs, min_size=1, max_size=4), wrapped=st.booleans())
async def test_whatever_is_cancelled_nothing_is_left(plan: list[Job], wrapped: bool) -> None:
    model, spies = Model(), [Spy("outer"), Spy("inner")] if wrapped else []
    with watched(model, *spies, datasette=datasette_of(backend())) as llm:
        world = World(plan, llm, model, spies)
        async with nothing_left():
            await world.run()
            # Standalone prompts go on by themselves, and those whose caller was cancelled settle.
            await anyio.sleep(60)
        world.check()

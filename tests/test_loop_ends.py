"""The event loop ends so many turns after a prompt was asked: it always ends, and nothing is left unsettled.

asyncio cancels every task then, and of one that has not had its first turn no line is ever run.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
import trio.testing
from anyio.lowlevel import checkpoint

from datasette_llm.backends.datasette_side import backend

from .conftest import AutojumpLoop
from .fakes import FakeModel
from .spies import Spy, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from datasette_llm import LLM, Group

TICKS = 20
BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"loop_factory": AutojumpLoop},
    "trio": {},
}


async def chunks(prompt: str) -> AsyncGenerator[str, None]:
    for _ in range(5):
        await checkpoint()
        yield "chunk"


async def alone(llm: LLM) -> None:
    model = await llm.model()
    await (await model.prompt("x")).text()


async def in_a_group(llm: LLM) -> None:
    async with llm.group(concurrency=2) as model:
        for _ in range(3):
            await model.prompt("x")


async def in_a_map(llm: LLM) -> None:
    async with llm.group() as model:
        async for _ in model.map("abc"):
            pass


async def in_a_chain(llm: LLM) -> None:
    await (await llm.model()).chain("x").text()


async def in_a_conversation(llm: LLM) -> None:
    conversation = (await llm.model()).conversation()
    await conversation.prompt("x")
    await (await conversation.prompt("y")).text()


def in_background(function: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> object:
    if backend() == "asyncio":
        return asyncio.get_running_loop().create_task(function(*args))
    return trio.lowlevel.spawn_system_task(function, *args)


async def ends_after(ticks: int, use: Callable[[LLM], Coroutine[Any, Any, None]], llm: LLM) -> None:
    task = in_background(use, llm)
    for _ in range(ticks):
        await checkpoint()
    del task


@pytest.mark.timeout(60)
@pytest.mark.parametrize("wrapped", [False, True], ids=["unwrapped", "wrapped"])
@pytest.mark.parametrize("use", [alone, in_a_group, in_a_map, in_a_chain, in_a_conversation])
@pytest.mark.parametrize("on", BACKENDS)
def test_the_loop_ends(
    on: str,
    use: Callable[[LLM], Coroutine[Any, Any, None]],
    wrapped: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for ticks in range(TICKS):
        model, spies = FakeModel(chunks), [Spy("outer"), Spy("inner")] if wrapped else []
        groups: list[Group] = []
        with watched(model, *spies) as llm:
            options = BACKENDS[on] or {"clock": trio.testing.MockClock(autojump_threshold=0)}
            anyio.run(ends_after, ticks, use, llm, backend=on, backend_options=options)
        for spy in spies:
            spy.check()
            groups += spy.exits
            for visit in spy.visits:
                group = visit.result.group
                assert group is None or group in spy.exits
        for group in groups:
            stats = group.stats
            assert (stats.waiting, stats.running, stats.failed) == (0, 0, 0)
            assert all(response.done for response in group._responses)
        assert model.counts["opened"] == model.counts["closed"]
    # None of this is anybody's failure.
    assert not caplog.records

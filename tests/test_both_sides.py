"""On trio, plugins run on the hosted asyncio loop: what belongs to one side can be used from the other.

Each test has its group or model on one side and uses it on the other. On asyncio there is only one side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import GroupClosed, PromptCancelled
from datasette_llm.backends import datasette_side
from datasette_llm.backends.signal import Signal

from .fakes import FakeModel
from .spies import Spy, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator

    from datasette_llm import GroupModel
    from datasette_llm.models import WrappedAsyncModel


async def three_chunks(prompt: str) -> AsyncGenerator[str, None]:
    for chunk in ("a", "b", "c"):
        await anyio.sleep(1)
        yield chunk


async def for_ever(prompt: str) -> AsyncGenerator[str, None]:
    yield "begun"
    await anyio.sleep_forever()


@pytest.fixture(params=["unwrapped", "wrapped"])
def spies(request: pytest.FixtureRequest) -> Iterator[list[Spy]]:
    found = [Spy("outer"), Spy("inner")] if request.param == "wrapped" else []
    yield found
    for spy in found:
        spy.check()


async def prompted(model: WrappedAsyncModel) -> None:
    response = await model.prompt("x")
    assert await response.text() == "abc"
    assert response.done
    assert response.error is None


async def streamed(model: WrappedAsyncModel) -> None:
    assert [chunk async for chunk in await model.prompt("x")] == ["a", "b", "c"]


async def chained(model: WrappedAsyncModel) -> None:
    chain = model.chain("x")
    assert [chunk async for chunk in chain] == ["a", "b", "c"]
    assert await model.chain("x").text() == "abc"
    assert [await response.text() async for response in model.chain("x").responses()] == ["abc"]
    assert [event.chunk async for event in model.chain("x").astream_events()] == ["a", "b", "c"]


async def chained_with_tools(model: WrappedAsyncModel) -> None:
    async def tool() -> str:
        return "done"

    assert await model.chain("x", tools=[tool]).text() == "abc"


async def conversed(model: WrappedAsyncModel) -> None:
    conversation = model.conversation()
    first = await conversation.prompt("x")
    second = await conversation.prompt("y")
    assert await second.text() == "abc"
    assert await conversation.chain("z").text() == "abc"
    assert first.done
    assert len(conversation.responses) == 3


async def replied(model: WrappedAsyncModel) -> None:
    response = await model.prompt("x")
    assert await (await response.reply("y")).text() == "abc"


async def cancelled(model: WrappedAsyncModel) -> None:
    response = await model.prompt("x")
    response.cancel()
    with pytest.raises(PromptCancelled):
        await response.text()
    chain = model.chain("x")
    async for _ in chain.responses():
        chain.cancel()
        break


async def timed_out(model: WrappedAsyncModel) -> None:
    with anyio.move_on_after(0.5):
        await (await model.prompt("x")).text()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await model.prompt("x")


async def mapped(model: GroupModel) -> None:
    async def source() -> AsyncIterator[str]:
        for item in "xyz":
            await anyio.sleep(0.1)
            yield item

    assert sorted([item async for item, _ in model.map("xyz")]) == ["x", "y", "z"]
    assert sorted([item async for item, response in model.map(source()) if await response.text()]) == [
        "x",
        "y",
        "z",
    ]
    async for _ in model.map(source()):
        break
    with pytest.raises(ZeroDivisionError):
        async for _ in model.map("xyz", lambda item: str(1 / 0)):
            pass


async def looked_at(model: GroupModel) -> None:
    await (await model.prompt("x")).text()
    stats = model.stats
    assert stats.succeeded == 1
    assert 0 < stats.elapsed < 100
    assert len(model.group._responses) == 1


async def cancelled_whole(model: GroupModel) -> None:
    response = await model.prompt("x")
    model.cancel()
    with pytest.raises(PromptCancelled):
        await response.text()
    with pytest.raises(PromptCancelled):
        await model.prompt("y")
    with pytest.raises(PromptCancelled):
        async for _ in model.map("xyz"):
            pass


EACH_MODEL: list[Any] = [
    prompted, streamed, chained, chained_with_tools, conversed, replied, cancelled, timed_out,
]  # fmt: skip
EACH_GROUP: list[Any] = [mapped, looked_at, cancelled_whole]


def named(function: Any) -> str:
    return str(function.__name__)


@pytest.mark.parametrize("use", [*EACH_MODEL, *EACH_GROUP], ids=named)
async def test_a_group_is_used_by_a_plugin(use: Callable[[Any], Awaitable[None]], spies: list[Spy]) -> None:
    with watched(FakeModel(three_chunks), *spies) as llm:
        async with nothing_left():
            async with llm.group() as model:
                await datasette_side.call(use, model)
            await anyio.sleep(10)
        with pytest.raises(GroupClosed):
            await datasette_side.call(model.prompt, "x")


@pytest.mark.parametrize("use", EACH_MODEL, ids=named)
async def test_a_model_is_used_by_a_plugin(use: Callable[[Any], Awaitable[None]], spies: list[Spy]) -> None:
    with watched(FakeModel(three_chunks), *spies) as llm:
        async with nothing_left():
            model = await llm.model()
            await use(model)
            await datasette_side.call(use, model)
            await use(model)
            await anyio.sleep(10)


@pytest.mark.parametrize("use", [*EACH_MODEL, *EACH_GROUP], ids=named)
async def test_a_plugin_opens_a_group(use: Callable[[Any], Awaitable[None]], spies: list[Spy]) -> None:
    with watched(FakeModel(three_chunks), *spies) as llm:

        async def plugin() -> None:
            async with llm.group() as model:
                await use(model)

        async with nothing_left():
            await datasette_side.call(plugin)
            await anyio.sleep(10)


@pytest.mark.parametrize("use", [*EACH_MODEL, *EACH_GROUP], ids=named)
async def test_a_plugins_group_is_used_by_the_program(
    use: Callable[[Any], Awaitable[None]], spies: list[Spy]
) -> None:
    """The other way round: what the plugin holds lives on the hosted loop."""
    opened, done = Signal(), Signal()
    found: list[GroupModel] = []
    with watched(FakeModel(three_chunks), *spies) as llm:

        async def plugin() -> None:
            async with llm.group() as model:
                found.append(model)
                opened.set()
                await done.wait()

        async with nothing_left():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(datasette_side.call, plugin)
                await opened.wait()
                await use(found[0])
                done.set()
            await anyio.sleep(10)


async def test_a_response_is_read_on_both_sides(spies: list[Spy]) -> None:
    with watched(FakeModel(three_chunks), *spies) as llm:
        read: list[str] = []

        async def reads(response: Any) -> None:
            read.append("".join([chunk async for chunk in response]))
            read.append(await response.text())

        async with llm.group() as model, anyio.create_task_group() as tasks:
            response = await model.prompt("x")
            for _ in range(2):
                tasks.start_soon(reads, response)
                tasks.start_soon(datasette_side.call, reads, response)
        assert read == ["abc"] * 8


async def test_a_callback_maps_its_own_group() -> None:
    """As it was seen: `on_done` of a prompt, a callback of a plugin."""
    answers: list[str] = []
    model: GroupModel

    async def answered(response: Any) -> None:
        if response.prompt.prompt == "x":
            async for _, each in model.map(["y", "z"]):
                answers.append(await each.text())
            answers.append(await (await model.conversation().prompt("v")).text())

    with watched(FakeModel(three_chunks), Spy(answered=answered)) as llm:
        async with llm.group() as model:
            assert await (await model.prompt("x")).text() == "abc"
    assert answers == ["abc"] * 3


async def test_a_plugin_leaves_prompts_that_hang(spies: list[Spy]) -> None:
    with watched(FakeModel(for_ever), *spies) as llm:
        async with nothing_left():
            async with llm.group() as model:

                async def plugin() -> None:
                    for _ in range(3):
                        await model.prompt("x")
                    model.cancel()

                await datasette_side.call(plugin)
            await anyio.sleep(10)

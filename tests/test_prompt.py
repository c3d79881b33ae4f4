"""One prompt outside of a group: its wrappers, its callbacks, its errors, its end."""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import PromptCancelled, PromptResponse
from datasette_llm.backends.datasette_side import backend

from .fakes import FakeModel
from .hooks import hooked
from .spies import Spy, Visit, nothing_left, running_tasks, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator


class Refused(Exception):
    pass


class Broken(Exception):
    pass


async def breaks_half_way(prompt: str) -> AsyncGenerator[str, None]:
    yield "a"
    raise Broken(prompt)


async def never_ends(prompt: str) -> AsyncGenerator[str, None]:
    yield "first"
    await anyio.sleep_forever()


async def test_wrappers_nest_around_the_whole_prompt() -> None:
    record: list[tuple[str, str, str | None]] = []

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        record.append(("call", "model", prompt))
        yield prompt

    outer, inner = Spy("outer", record), Spy("inner", record)
    with watched(FakeModel(script), outer, inner) as llm:
        response = await (await llm.model()).prompt("hi")
        assert await response.text() == "hi"
    assert record == [
        ("enter", "outer", "hi"), ("enter", "inner", "hi"), ("call", "model", "hi"),
        ("leave", "inner", "hi"), ("leave", "outer", "hi"),
    ]  # fmt: skip
    assert outer.visits[0].result.response is response._observed


async def test_a_wrapper_that_refuses_makes_prompt_raise_its_very_exception() -> None:
    refusal = Refused("no budget")

    async def refuse(visit: Visit) -> None:
        raise refusal

    outer, middle, inner = Spy("outer"), Spy("middle", entering=refuse), Spy("inner")
    model = FakeModel()
    with watched(model, outer, middle, inner) as llm:
        wrapped = await llm.model()
        async with nothing_left():
            with pytest.raises(Refused) as caught:
                await wrapped.prompt("hi")
    assert caught.value is refusal
    assert outer.visits[0].saw is refusal
    assert inner.visits == []
    assert model.counts["opened"] == 0
    outer.check()


async def test_a_failure_of_the_model_is_thrown_into_the_wrappers_and_raised_at_the_reader() -> None:
    spies = Spy("outer"), Spy("inner")
    with watched(FakeModel(breaks_half_way), *spies) as llm:
        response = await (await llm.model()).prompt("hi")
        for _ in range(3):
            with pytest.raises(Broken) as caught:
                await response.text()
            assert caught.value is response.error
    assert [spy.visits[0].saw for spy in spies] == [response.error] * 2


async def test_prompt_returns_while_the_model_still_answers() -> None:
    with watched(FakeModel(seconds=10), Spy()) as llm:
        began = anyio.current_time()
        response = await (await llm.model()).prompt("hi")
        assert anyio.current_time() - began < 10
        assert not response.done
        await response.text()
        assert response.done


async def test_a_response_that_nobody_reads_still_completes() -> None:
    done = anyio.Event()

    async def leaving(visit: Visit) -> None:
        visits.append(visit)

    visits: list[Visit] = []
    spy = Spy(leaving=leaving, answered=lambda response: done.set())
    model = FakeModel(seconds=1)
    with watched(model, spy) as llm:
        async with nothing_left():
            await (await llm.model()).prompt("hi")
            await anyio.sleep(2)
    assert done.is_set()
    assert visits
    assert visits[0].saw is None
    assert model.counts["closed"] == 1


async def test_cancel_closes_the_model_and_wrappers_see_an_ordinary_exception() -> None:
    spies = Spy("outer"), Spy("inner")
    model = FakeModel(never_ends)
    with watched(model, *spies) as llm:
        async with nothing_left():
            response = await (await llm.model()).prompt("hi")
            assert await response.__anext__() == "first"
            response.cancel()
            with pytest.raises(PromptCancelled):
                await response.text()
            assert response.done
            assert isinstance(response.error, PromptCancelled)
            response.cancel()
    for spy in spies:
        spy.check()
        assert isinstance(spy.visits[0].saw, PromptCancelled)
    assert model.counts == {"opened": 1, "closed": 1, "running": 0, "peak": 1}


async def test_cancelling_the_caller_while_prompt_waits_cancels_the_prompt() -> None:
    async def slow(visit: Visit) -> None:
        await anyio.sleep(3)

    spy, model = Spy(entering=slow), FakeModel()
    with watched(model, spy) as llm:
        wrapped = await llm.model()
        async with nothing_left():
            with anyio.move_on_after(1) as scope:
                await wrapped.prompt("hi")
            assert scope.cancelled_caught
            # It has stayed until they had settled: whatever ends after it cannot interrupt them.
            spy.check()
            assert spy.visits[0].left == 1
    # The plugin was not interrupted in the middle of entering.
    spy.check()
    assert isinstance(spy.visits[0].saw, PromptCancelled)
    assert model.counts["opened"] == 0


async def test_a_callback_registered_before_or_after_the_yield_ends_before_text_returns() -> None:
    done: list[str] = []

    def llm_prompt_context() -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            async def early(response: Any) -> None:
                await anyio.sleep(1)
                done.append("early:" + await response.text())

            def late(response: Any) -> None:
                done.append("late:" + response.text_or_raise())

            async def on_done(response: Any) -> None:
                await anyio.sleep(1)
                done.append("on_done:" + await response.text())

            await result.on_response_done(early)
            assert not result.responses
            yield
            await result.on_response_done(late)
            await result.response.on_done(on_done)

        return wrapper

    with watched(FakeModel()) as llm, hooked(llm_prompt_context=llm_prompt_context):
        response = await (await llm.model()).prompt("hi")
        assert await response.text() == "hi"
        assert done == ["early:hi", "late:hi", "on_done:hi"]


async def test_an_exception_of_a_callback_reaches_the_wrappers_and_the_reader() -> None:
    problem = Broken("bookkeeping")

    def fails(response: Any) -> None:
        raise problem

    outer, inner = Spy("outer"), Spy("inner", answered=fails)
    with watched(FakeModel(), outer, inner) as llm:
        response = await (await llm.model()).prompt("hi")
        with pytest.raises(Broken) as caught:
            await response.text()
    assert caught.value is problem
    assert outer.visits[0].saw is problem


async def test_on_done_of_the_response_ends_before_text_returns_and_its_error_is_raised() -> None:
    done: list[str] = []
    with watched(FakeModel(seconds=1)) as llm:
        model = await llm.model()
        response = await model.prompt("hi")

        async def note(finished: Any) -> None:
            await anyio.sleep(1)
            # Its own response: it must not wait for itself.
            done.append(await finished.text() + await response.text())

        await response.on_done(note)
        assert await response.text() == "hi"
        assert done == ["hihi"]
        await response.on_done(note)
        assert done == ["hihi", "hihi"]

        async def fails(finished: Any) -> None:
            raise Broken

        failing = await model.prompt("hi")
        await failing.on_done(fails)
        with pytest.raises(Broken):
            await failing.text()
        await failing.on_done(note)
        assert len(done) == 2


async def test_a_wrapper_that_leaves_may_read_the_response_it_wraps() -> None:
    texts: list[Any] = []
    responses: list[PromptResponse] = []

    async def leaving(visit: Visit) -> None:
        try:
            texts.append(await responses[-1].text())
        except Broken as error:
            texts.append(error)

    spy = Spy(leaving=leaving)
    with watched(FakeModel(seconds=1), spy) as llm:
        responses.append(await (await llm.model()).prompt("hi"))
        await responses[0].text()

    async def fails_late(prompt: str) -> AsyncGenerator[str, None]:
        await anyio.sleep(1)
        raise Broken
        yield

    with watched(FakeModel(fails_late), spy) as llm:
        responses.append(await (await llm.model()).prompt("hi"))
        with pytest.raises(Broken):
            await responses[1].text()
    assert texts == ["hi", responses[1].error]


variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_the_model_runs_in_the_context_of_its_wrappers_and_of_its_caller() -> None:
    seen: list[tuple[str, str]] = []
    caller: ContextVar[str] = ContextVar("caller")

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        seen.append((variable.get(), caller.get()))
        yield prompt

    def llm_prompt_context(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            token = variable.set(prompt)
            yield
            # Only possible in the very context in which it was set.
            variable.reset(token)

        return wrapper

    async def ask(name: str) -> None:
        caller.set(name)
        await (await model.prompt(name)).text()

    with watched(FakeModel(script)) as llm, hooked(llm_prompt_context=llm_prompt_context):
        model = await llm.model()
        async with anyio.create_task_group() as tasks:
            # All before the root supervisor has had its first turn.
            for name in "abc":
                tasks.start_soon(ask, name)
    # Under trio wrappers run on the hosted loop, where they have a context of their own.
    in_wrapper = backend() == "asyncio"
    assert sorted(seen) == [(name if in_wrapper else "unset", name) for name in "abc"]
    assert variable.get() == "unset"


def anyio_timeout(seconds: float) -> Any:
    return nullcontext_around(anyio.fail_after(seconds))


@asynccontextmanager
async def nullcontext_around(scope: Any) -> AsyncIterator[None]:
    with scope:
        yield


@pytest.mark.parametrize(
    "timeout",
    [
        anyio_timeout,
        pytest.param(
            lambda seconds: asyncio.timeout(seconds),
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout() is newer"),
        ),
    ],
)
async def test_a_timeout_of_a_wrapper_around_its_yield_fails_its_prompt_alone(timeout: Any) -> None:
    def llm_prompt_context(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            async with timeout(1 if prompt == "slow" else 100):
                yield

        return wrapper

    inside = Spy("inside")
    with watched(FakeModel(seconds=5), inside) as llm, hooked(llm_prompt_context=llm_prompt_context):
        # What is registered last is outermost.
        began = anyio.current_time()
        async with llm.group() as group:
            slow = await group.prompt("slow")
            other = await group.prompt("other")
            with pytest.raises(TimeoutError):
                await slow.text()
            assert anyio.current_time() - began < 2
            assert await other.text() == "other"
    assert [visit.left for visit in inside.visits] == [1, 1]


async def test_a_prompt_costs_one_task_and_its_supervisor() -> None:
    with watched(FakeModel(seconds=1)) as llm:
        before = running_tasks()
        response = await (await llm.model()).prompt("hi")
        # The root supervisor and the prompt, and nothing else.
        assert len(running_tasks() - before) == 2
        await response.text()

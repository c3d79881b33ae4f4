"""What bad models and bad plugins do: a clear error for the one prompt, and its siblings go on."""

from __future__ import annotations

import asyncio
import math
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio

from datasette_llm import PromptCancelled
from datasette_llm._compat import BaseExceptionGroup, ExceptionGroup
from datasette_llm.backends.datasette_side import backend

from .fakes import FakeModel
from .hooks import hooked
from .spies import Spy, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from datasette_llm import LLM, GroupModel


class Broken(Exception):
    pass


class Odd(BaseException):
    pass


async def misbehaves(prompt: str) -> AsyncGenerator[Any, None]:
    """What a prompt says is what the model does; any other prompt is echoed."""
    await anyio.sleep(1)
    if prompt == "raise at once":
        raise Broken(prompt)
    if prompt == "raise half-way":
        yield "half"
        raise Broken(prompt)
    if prompt == "raise at the end":
        yield "whole"
        raise Broken(prompt)
    if prompt == "yield None":
        yield None
    elif prompt == "yield a number":
        yield 42
    elif prompt == "yield bytes":
        yield b"text"
    elif prompt == "raise Odd":
        raise Odd(prompt)
    elif prompt == "raise GeneratorExit":
        raise GeneratorExit(prompt)
    elif prompt == "raise CancelledError":
        raise asyncio.CancelledError(prompt)
    elif prompt == "raise BaseExceptionGroup":
        raise BaseExceptionGroup("several", [Odd(prompt)])
    elif prompt == "never end":
        await anyio.sleep_forever()
    elif prompt != "yield nothing":
        yield prompt


async def check_siblings(llm: LLM, prompt: str, error: type[Exception], match: str, **kwargs: Any) -> None:
    """One bad prompt among good ones, alone and in a map: it alone fails, with this error."""
    async with nothing_left():
        async with llm.group() as group:
            before, bad, after = [await group.prompt(text, **kwargs) for text in ("a", prompt, "b")]
            with pytest.raises(error, match=match) as caught:
                await bad.text()
            assert caught.value is bad.error
            assert [await before.text(), await after.text()] == ["a", "b"]
            outcomes = {item: response async for item, response in group.map(["c", prompt, "d"], **kwargs)}
            assert isinstance(outcomes[prompt].error, error)
            assert [await outcomes[item].text() for item in "cd"] == ["c", "d"]
        assert (group.stats.succeeded, group.stats.failed, group.stats.cancelled) == (4, 2, 0)
        assert group._supervisor.slots.in_use == 0
        alone = await (await llm.model()).prompt(prompt, **kwargs)
        with pytest.raises(error, match=match):
            await alone.text()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        ("raise at once", Broken, "raise at once"),
        ("raise half-way", Broken, "raise half-way"),
        ("raise at the end", Broken, "raise at the end"),
        ("yield None", TypeError, "model fake yielded None"),
        ("yield a number", TypeError, "model fake yielded int"),
        ("yield bytes", TypeError, "model fake yielded bytes"),
        ("raise Odd", RuntimeError, "the model raised Odd"),
        ("raise GeneratorExit", RuntimeError, "the model raised GeneratorExit"),
        ("raise BaseExceptionGroup", RuntimeError, "the model raised BaseExceptionGroup"),
        ("raise CancelledError", RuntimeError, "raised CancelledError|cancelled the prompt's task"),
    ],
)
async def test_a_bad_model_fails_its_prompt_alone(
    prompt: str, error: type[Exception], match: str, wrapped: bool, stream: bool
) -> None:
    spy, model = Spy(), FakeModel(misbehaves)
    with watched(model, *([spy] if wrapped else [])) as llm:
        await check_siblings(llm, prompt, error, match, stream=stream)
    if sys.version_info >= (3, 11) or prompt != "raise CancelledError":
        # Before 3.11 asyncio does not tell whether a task was really cancelled, so the wrappers see it bare.
        spy.check()
    assert model.counts["opened"] == model.counts["closed"]


async def test_a_model_that_yields_nothing_gives_an_empty_answer() -> None:
    with watched(FakeModel(misbehaves), Spy()) as llm:
        response = await (await llm.model()).prompt("yield nothing")
        assert await response.text() == ""
        assert [chunk async for chunk in response] == []


async def test_a_model_that_never_ends_is_given_up_after_the_configured_timeout() -> None:
    model = FakeModel(misbehaves)
    config = {"timeout": 30, "retries": {"attempts": 1}}
    with watched(model, Spy(), config=config) as llm:
        await check_siblings(llm, "never end", TimeoutError, "did not answer within 30 seconds")
    assert model.counts["opened"] == model.counts["closed"]


async def test_a_timeout_is_retried_and_then_raised() -> None:
    model = FakeModel(misbehaves)
    with watched(model, config={"timeout": 5, "retries": {"attempts": 3, "timeout": 100}}) as llm:
        response = await (await llm.model()).prompt("never end")
        with pytest.raises(TimeoutError):
            await response.text()
    assert response.attempts == model.counts["closed"] == 3


@pytest.mark.parametrize("usage", [{"input": "three", "output": "4"}, {"input": None}, {"input": 3.5}])
async def test_a_model_that_reports_nonsense_as_usage_fails_nothing(usage: dict[str, Any]) -> None:
    class Model(FakeModel):
        async def execute(
            self, prompt: Any, stream: bool, response: Any, conversation: Any = None
        ) -> AsyncGenerator[str, None]:
            yield "answer"
            response.set_usage(**usage)

    with watched(Model()) as llm:
        async with llm.group() as group:
            response = await group.prompt("hi")
            assert await response.text() == "answer"
        assert group.stats.input_tokens == 0


@pytest.mark.parametrize("seconds", [3, 20])
async def test_a_model_that_ignores_its_cancellation_does_not_take_the_time_of_the_wrappers(
    seconds: float,
) -> None:
    settled: list[float] = []

    async def stubborn(prompt: str) -> AsyncGenerator[str, None]:
        yield "first"
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(seconds)

    async def leaving(visit: Any) -> None:
        await anyio.sleep(4)
        settled.append(anyio.current_time())

    spy = Spy(leaving=leaving)
    with watched(FakeModel(stubborn), spy) as llm:
        async with nothing_left():
            response = await (await llm.model()).prompt("hi")
            await anyio.sleep(1)
            began = anyio.current_time()
            response.cancel()
            with pytest.raises(PromptCancelled):
                await response.text()
    spy.check()
    assert settled == [pytest.approx(began + seconds + 4, abs=0.5)]


async def test_a_generator_that_hangs_when_it_is_closed_is_abandoned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hangs(prompt: str) -> AsyncGenerator[Any, None]:
        try:
            yield 42
        finally:
            await anyio.sleep(math.inf)

    with watched(FakeModel(hangs)) as llm:
        response = await (await llm.model()).prompt("hi")
        with pytest.raises(TypeError):
            await response.text()
    assert "Abandoned the generator of a model" in caplog.text


async def test_a_generator_that_goes_on_when_it_is_closed_keeps_its_first_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def goes_on(prompt: str) -> AsyncGenerator[Any, None]:
        try:
            yield 42
        finally:
            raise Broken("while closing")

    with watched(FakeModel(goes_on)) as llm:
        response = await (await llm.model()).prompt("hi")
        with pytest.raises(TypeError, match="yielded int"):
            await response.text()
    assert "Closing the generator of a model failed" in caplog.text


# Plugins


def does_not_yield(result: Any) -> Any:
    @asynccontextmanager
    async def wrapper() -> AsyncIterator[None]:
        if result is None:
            yield

    return wrapper()


def yields_twice(result: Any) -> Any:
    @asynccontextmanager
    async def wrapper() -> AsyncIterator[None]:
        yield
        yield

    return wrapper()


def raises_on_entry(result: Any) -> Any:
    @asynccontextmanager
    async def wrapper() -> AsyncIterator[None]:
        raise Broken("entry")
        yield

    return wrapper()


def raises_at_exit(result: Any) -> Any:
    @asynccontextmanager
    async def wrapper() -> AsyncIterator[None]:
        yield
        raise Broken("exit")

    return wrapper()


def raises_several_at_exit(result: Any) -> Any:
    @asynccontextmanager
    async def wrapper() -> AsyncIterator[None]:
        yield
        raise ExceptionGroup("of its own", [Broken("one"), Broken("two")])

    return wrapper()


def raises_odd_at_exit(result: Any) -> Any:
    @asynccontextmanager
    async def wrapper() -> AsyncIterator[None]:
        yield
        raise asyncio.CancelledError

    return wrapper()


def raises_itself(result: Any) -> Any:
    raise Broken("wrapper")


def is_not_async(result: Any) -> Any:
    @contextmanager
    def wrapper() -> Iterator[None]:
        yield

    return wrapper()


def is_a_coroutine(result: Any) -> Any:
    async def wrapper() -> None:
        pass

    return wrapper()


@pytest.mark.parametrize(
    ("wrapper", "error", "match"),
    [
        (does_not_yield, RuntimeError, "generator didn't yield"),
        (yields_twice, RuntimeError, "generator didn't stop"),
        (raises_on_entry, Broken, "entry"),
        (raises_at_exit, Broken, "exit"),
        (raises_several_at_exit, ExceptionGroup, "of its own"),
        (raises_itself, Broken, "wrapper"),
        (is_not_async, TypeError, "must return an async context manager"),
        (is_a_coroutine, TypeError, "must return an async context manager; a plugin's returned coroutine"),
        (raises_odd_at_exit, RuntimeError, "cancelled"),
        (42, TypeError, "llm_prompt_context must return a function"),
        ("text", TypeError, "llm_prompt_context must return a function"),
    ],
)
async def test_a_bad_wrapper_fails_its_prompt_alone(wrapper: Any, error: type[Exception], match: str) -> None:
    def llm_prompt_context(prompt: str) -> Any:
        return wrapper if prompt == "bad" else None

    async def ask(group: GroupModel, prompt: str) -> str:
        return await (await group.prompt(prompt)).text()

    spies = Spy("outside"), Spy("inside")
    with watched(FakeModel(), spies[1]) as llm, hooked(llm_prompt_context=llm_prompt_context):
        async with nothing_left(), llm.group() as group:
            assert await ask(group, "a") == "a"
            with pytest.raises(error, match=match):
                await ask(group, "bad")
            assert await ask(group, "b") == "b"
            # As the first prompt of its group it does not keep the gate shut.
        async with llm.group() as group:
            with pytest.raises(error, match=match):
                await ask(group, "bad")
            assert await ask(group, "b") == "b"
    if wrapper is not raises_odd_at_exit or backend() == "asyncio":
        spies[1].check()


@pytest.mark.parametrize("hook_error", [Broken("hook"), ValueError("junk")])
async def test_a_hook_that_raises_refuses_the_prompt(hook_error: Exception) -> None:
    def llm_prompt_context(prompt: str) -> Any:
        raise hook_error

    with watched(FakeModel(), Spy()) as llm, hooked(llm_prompt_context=llm_prompt_context):
        async with llm.group() as group:
            with pytest.raises(type(hook_error)) as caught:
                await group.prompt("hi")
            assert caught.value is hook_error


async def test_a_wrapper_that_swallows_the_models_exception_makes_no_answer_of_it() -> None:
    def llm_prompt_context(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            try:
                yield
            except Exception:
                pass

        return wrapper

    with watched(FakeModel(misbehaves)) as llm, hooked(llm_prompt_context=llm_prompt_context):
        async with llm.group() as group:
            failed = await group.prompt("raise half-way")
            with pytest.raises(Broken):
                await failed.text()
            cancelled = await group.prompt("never end")
            cancelled.cancel()
            with pytest.raises(PromptCancelled):
                await cancelled.text()
        assert (group.stats.failed, group.stats.cancelled) == (1, 1)


@pytest.mark.parametrize("where", ["entering", "leaving", "answered"])
async def test_plugin_code_that_hangs_is_abandoned_once_the_prompt_is_cancelled(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang(subject: Any) -> None:
        await anyio.sleep(math.inf)

    outside, inside = Spy("outside"), Spy("inside")
    setattr(inside, where, hang)
    with watched(FakeModel(), outside, inside) as llm:
        async with nothing_left():
            began = anyio.current_time()
            with anyio.move_on_after(10):
                async with llm.group() as group:
                    response = await group.prompt("hi")
                    await response.text()
            assert 10 <= anyio.current_time() - began < 16
    # The plugin outside of it settles as if nothing had happened.
    outside.check()
    assert isinstance(outside.visits[0].saw, PromptCancelled)
    assert caplog.text.count("Abandoned") == 1
    assert len(outside.exits) == 1


@pytest.mark.parametrize("answer", [42, "text", ["list"]])
async def test_exit_hooks_may_return_anything(answer: Any) -> None:
    spy = Spy()
    with watched(FakeModel(), spy) as llm, hooked(llm_group_exit=lambda: answer):
        async with llm.group() as group:
            await group.prompt("hi")
    assert len(spy.exits) == 1


async def connecting(prompt: str) -> AsyncGenerator[Any, None]:
    """Wait in tasks side by side, as a library does that connects to several addresses."""
    if backend() == "trio":
        async with trio.open_nursery() as tasks:
            tasks.start_soon(trio.sleep_forever)
            tasks.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        await anyio.sleep_forever()
    yield


async def test_a_timeout_while_a_library_connects_is_a_timeout() -> None:
    with watched(FakeModel(connecting), config={"timeout": 5, "retries": {"attempts": 2}}) as llm:
        response = await (await llm.model()).prompt("x")
        with pytest.raises(TimeoutError):
            await response.text()
    assert response.attempts == 2


@pytest.mark.parametrize("way", ["response", "scope"])
async def test_cancelled_while_a_library_connects(way: str) -> None:
    spy = Spy()
    with watched(FakeModel(connecting), spy) as llm:
        async with nothing_left():
            with anyio.CancelScope() as scope:
                async with llm.group() as group:
                    response = await group.prompt("x")
                    await anyio.sleep(1)
                    if way == "response":
                        response.cancel()
                    else:
                        scope.cancel()
        with pytest.raises(PromptCancelled):
            await response.text()
    spy.check()
    assert [type(visit.saw) for visit in spy.visits] == [PromptCancelled]

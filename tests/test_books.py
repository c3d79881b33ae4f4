"""A fault in our own books, or in somebody's tracing: every reader gets it, and nobody else is harmed."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import PromptCancelled
from datasette_llm._compat import ExceptionGroup
from datasette_llm.pace.slots import Slots
from datasette_llm.responses.outcome import used_tokens
from datasette_llm.responses.response import PromptResponse
from datasette_llm.tasks import prompt_task
from datasette_llm.tasks import task as task_module
from datasette_llm.tasks.conversation import Turn
from datasette_llm.tasks.group_supervisor import GroupSupervisor
from datasette_llm.tasks.hook_scope import PromptResult
from datasette_llm.tasks.prompt_task import PromptTask
from datasette_llm.tasks.supervisor import Counters, Supervisor
from datasette_llm.tasks.task import SupervisedTask

from .fakes import FakeModel
from .hooks import hooked
from .spies import Spy, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator

    from datasette_llm import LLM


class Fault(Exception):
    """What goes wrong in a book."""


def broken(*args: Any, **kwargs: Any) -> Any:
    raise Fault("llm does not have this any more")


@contextmanager
def broken_span(*args: Any) -> Iterator[None]:
    yield None
    raise Fault("an exporter of spans")


#: Each step at the end of a prompt, and whether readers of a prompt that succeeded get its fault.
STEPS: dict[str, tuple[Any, str, Any]] = {
    "tokens": (prompt_task, "used_tokens", broken),
    "token counters": (Counters, "count_tokens", broken),
    "span opened": (PromptTask, "open_span", broken),
    "span closed": (PromptTask, "open_span", broken_span),
    "span described": (PromptTask, "_close_span", broken),
    "phase": (SupervisedTask, "leave_phase", broken),
    "turn given up": (Turn, "give_up", broken),
    "turn undone": (Turn, "undo", broken),
    "begin": (PromptTask, "begin_running", broken),
    "wrapper's result": (PromptResult, "_attempt", broken),
    "callbacks": (PromptResponse, "_run_callbacks", broken),
    "answer": (PromptResponse, "_answer", broken),
    "published": (PromptResponse, "_publish_all", broken),
    "slot": (Slots, "release", broken),
    "wrappers": (task_module, "find_wrappers", broken),
    "failure told": (Supervisor, "prompt_failed", broken),
    "failure watched": (GroupSupervisor, "watch_failure", broken),
}
#: Where nobody needs to know: the answer is whole and accounted, or the step is not taken.
HARMLESS = {"span closed", "turn undone", "failure told", "failure watched"}


async def fails(prompt: str) -> AsyncGenerator[str, None]:
    yield "a"
    raise ValueError("the model's own")


async def asked(llm: LLM, way: str, name: str, *, counted: bool = True) -> list[Any]:
    """Return what each reader gets: an answer, or an exception."""
    found: list[Any] = []

    async def read(response: Any) -> None:
        try:
            found.append(await response.text())
        except Exception as error:
            found.append(error)

    async def send(prompt: Any) -> None:
        try:
            response = await prompt(name)
        except Exception as error:
            found.append(error)
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, response)
            tasks.start_soon(read, response)

    if way == "alone":
        await send((await llm.model()).prompt)
    elif way == "conversation":
        await send((await llm.model()).conversation().prompt)
    elif way == "group":
        async with llm.group() as model:
            await send(model.prompt)
            assert not counted or (model.stats.waiting, model.stats.running) == (0, 0)
    elif way == "map":
        async with llm.group() as model:
            async for _, response in model.map([name]):
                await read(response)
            assert not counted or (model.stats.waiting, model.stats.running) == (0, 0)
    else:
        async with llm.group() as model:
            try:
                found.append(await model.chain(name).text())
            except Exception as error:
                found.append(error)
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("script", [None, fails], ids=["answers", "fails"])
@pytest.mark.parametrize("step", STEPS)
async def test_a_fault_in_the_books_reaches_every_reader(
    step: str, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, fault = STEPS[step]
    for way in ("alone", "conversation", "group", "map", "chain"):
        for spies in ([], [Spy()]):
            with watched(FakeModel(script), *spies) as llm:
                async with nothing_left():
                    with monkeypatch.context() as patch, anyio.fail_after(60):
                        patch.setattr(place, name, fault)
                        found = await asked(llm, way, "x", counted=step != "phase")
                    assert found
                    for outcome in found:
                        if script is fails:
                            assert isinstance(outcome, (ValueError, Fault)), outcome
                        elif isinstance(outcome, Exception):
                            assert isinstance(outcome, Fault), outcome
                            assert step not in HARMLESS
                    # And what comes next is as if nothing had been.
                    with anyio.fail_after(60):
                        after = await asked(llm, way, "y")
                    assert all(
                        isinstance(each, ValueError) if script is fails else each == "y" for each in after
                    )
                for spy in spies:
                    spy.check()


@pytest.mark.timeout(20)
async def test_siblings_are_unharmed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = used_tokens

    def sometimes(response: Any) -> tuple[int, int]:
        if response.prompt.prompt == "x":
            raise Fault
        return real(response)

    monkeypatch.setattr(prompt_task, "used_tokens", sometimes)
    with watched(FakeModel(seconds=1)) as llm:
        async with llm.group(concurrency=2) as model:
            responses = [await model.prompt(prompt) for prompt in "axbxc"]
            found = []
            for response in responses:
                try:
                    found.append(await response.text())
                except Fault:
                    found.append("fault")
            assert found == ["a", "fault", "b", "fault", "c"]
            mapped = {item: response.error async for item, response in model.map("dxe")}
            assert {item: type(error) for item, error in mapped.items()} == {
                "d": type(None), "x": Fault, "e": type(None),
            }  # fmt: skip
            stats = model.stats
        assert (stats.succeeded, stats.failed, stats.running, stats.waiting) == (5, 3, 0, 0)
        assert stats.output_tokens == 5
        assert model.group._responses


# A wrapper that holds a task group around its yield.


@contextmanager
def grouping(*beside: Callable[[], Coroutine[Any, Any, Any]]) -> Iterator[None]:
    """A plugin whose wrapper holds a task group, with these functions in it, around its ``yield``."""

    @asynccontextmanager
    async def wrapper(result: PromptResult) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            for function in beside:
                tasks.start_soon(function)
            yield
            tasks.cancel_scope.cancel()

    def llm_prompt_context() -> Any:
        return wrapper

    with hooked(llm_prompt_context=llm_prompt_context):
        yield


async def hangs(prompt: str) -> AsyncGenerator[str, None]:
    yield "a"
    await anyio.sleep_forever()


@pytest.mark.parametrize("in_group", [False, True])
async def test_a_cancelled_prompt_is_cancelled_in_a_wrappers_task_group(in_group: bool) -> None:
    spy = Spy("outside of it")
    with grouping(anyio.sleep_forever), watched(FakeModel(hangs), spy) as llm:
        if in_group:
            async with llm.group() as model:
                response = await model.prompt("x")
                model.cancel()
            assert (model.stats.cancelled, model.stats.failed) == (1, 0)
        else:
            response = await (await llm.model()).prompt("x")
            response.cancel()
        with pytest.raises(PromptCancelled):
            await response.text()
    (visit,) = spy.visits
    assert isinstance(visit.saw, PromptCancelled)


async def test_a_failed_prompts_own_error_leaves_a_wrappers_task_group() -> None:
    with watched(FakeModel(fails)) as llm, grouping():
        response = await (await llm.model()).prompt("x")
        with pytest.raises(ValueError, match="the model's own"):
            await response.text()


async def test_what_else_fails_in_a_wrappers_task_group_shows() -> None:
    async def fails_at_the_end() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise Fault("in the plugin's books")

    with watched(FakeModel(hangs)) as llm, grouping(fails_at_the_end):
        response = await (await llm.model()).prompt("x")
        response.cancel()
        with pytest.raises(Fault):
            await response.text()
        async with llm.group() as model:
            await model.prompt("x")
            model.cancel()
        assert (model.stats.cancelled, model.stats.failed) == (0, 1)
    with watched(FakeModel(fails)) as llm, grouping(fails_at_the_end):
        response = await (await llm.model()).prompt("x")
        with pytest.raises(ExceptionGroup) as both:
            await response.text()
        assert {type(error) for error in both.value.exceptions} == {Fault, ValueError}


async def test_a_group_that_a_plugin_or_the_model_raises_stays_what_it_is() -> None:
    errors = ExceptionGroup("two addresses", [OSError("one"), OSError("other")])

    async def two(prompt: str) -> AsyncGenerator[str, None]:
        raise errors
        yield ""

    with watched(FakeModel(two), config={"retries": {"attempts": 1}}) as llm:
        with pytest.raises(ExceptionGroup) as caught:
            await (await (await llm.model()).prompt("x")).text()
        assert caught.value is errors


async def test_a_source_with_a_task_group_around_its_yield_is_left_cleanly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed: list[bool] = []

    async def source() -> AsyncIterator[int]:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(anyio.sleep_forever)
                for item in range(100):
                    yield item
        finally:
            closed.append(True)

    with watched(FakeModel(seconds=1)) as llm:
        async with nothing_left():
            async with llm.group(concurrency=3) as model:
                async for _ in model.map(source()):
                    break
                await model.prompt("more")
            async with llm.group(concurrency=3) as model:
                async for _ in model.map(source()):
                    model.cancel()
                    break
    assert closed == [True, True]
    assert not caplog.records


async def test_a_model_with_a_task_group_around_its_yield_is_closed_cleanly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield "a"
            await anyio.sleep_forever()

    with watched(FakeModel(script)) as llm:
        async with llm.group() as model:
            response = await model.prompt("x")
            await anext(response)
            response.cancel()
            with pytest.raises(PromptCancelled):
                await response.text()
        assert (model.stats.cancelled, model.stats.failed) == (1, 0)
    assert not caplog.records

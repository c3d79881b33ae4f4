"""A group: backpressure, how its block is left, its hooks, its slots, its statistics."""

from __future__ import annotations

import logging
import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from datasette_llm import GroupClosed, GroupModel, PromptCancelled, PromptResponse
from datasette_llm._compat import ExceptionGroup

from .fakes import FakeModel
from .spies import Spy, Visit, nothing_left, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from datasette_llm import Group


class Broken(Exception):
    pass


async def as_told(prompt: str) -> AsyncGenerator[str, None]:
    """``fail 3`` fails after 3 seconds, ``wait 3`` answers then."""
    verb, _, seconds = prompt.partition(" ")
    await anyio.sleep(float(seconds or 0))
    if verb == "fail":
        raise Broken(prompt)
    yield prompt


async def test_prompt_waits_when_as_many_as_allowed_are_in_flight() -> None:
    model = FakeModel(seconds=1)
    with watched(model) as llm:
        async with llm.group(concurrency=3) as group:
            began = anyio.current_time()
            times = []
            for number in range(7):
                await group.prompt(str(number))
                times.append(round(anyio.current_time() - began))
            assert times == [0, 0, 0, 1, 1, 1, 2]
    assert model.counts["peak"] == 3
    assert model.counts["closed"] == 7


async def test_leaving_the_block_waits_for_every_prompt_and_then_calls_the_exit_hooks() -> None:
    record: list[tuple[str, str, str | None]] = []

    async def exiting(group: Group) -> None:
        record.append(("exit", "spy", None))

    spy = Spy("spy", record, exiting=exiting)
    model = FakeModel(seconds=5)
    with watched(model, spy) as llm:
        async with nothing_left(), llm.group() as group:
            responses = [await group.prompt(name) for name in "abc"]
    assert record[-1] == ("exit", "spy", None)
    assert len(record) == 7
    assert [response.text_or_raise() for response in responses] == ["a", "b", "c"]
    assert spy.exits == [group.group]
    assert list(group.group._responses) == responses
    spy.check()


async def test_an_exception_in_the_body_cancels_what_runs_and_leaves_unwrapped() -> None:
    spy, model = Spy(), FakeModel(as_told)
    error = Broken("body")
    with watched(model, spy) as llm:
        async with nothing_left():
            with pytest.raises(Broken) as caught:  # noqa: PT012
                async with llm.group(concurrency=2) as group:
                    done = await group.prompt("wait 1")
                    await done.text()
                    running = [await group.prompt("wait 1000") for _ in range(2)]
                    raise error
    assert caught.value is error
    assert error.__cause__ is None
    assert [visit.saw for visit in spy.visits] == [None, *[response.error for response in running]]
    assert all(isinstance(response.error, PromptCancelled) for response in running)
    assert model.counts["opened"] == model.counts["closed"] == 3
    assert len(spy.exits) == 1
    spy.check()


@pytest.mark.parametrize("settle_seconds", [0, 3, math.inf])
async def test_cancellation_from_outside_lets_the_wrappers_settle_for_a_while(
    settle_seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    settled: list[str | None] = []

    async def leaving(visit: Visit) -> None:
        await anyio.sleep(settle_seconds)
        settled.append(visit.prompt)

    hanging, outside = Spy("hanging", leaving=leaving), Spy("outside")
    with watched(FakeModel(as_told), outside, hanging) as llm:
        async with nothing_left():
            began = anyio.current_time()
            with anyio.move_on_after(1) as scope:
                async with llm.group() as group:
                    await group.prompt("wait 1000")
                    await anyio.sleep_forever()
            assert scope.cancelled_caught
            assert anyio.current_time() - began <= 1 + min(settle_seconds, 5.1)
    outside.check()
    hanging.check()
    assert [type(visit.saw) for visit in outside.visits] == [PromptCancelled]
    assert len(outside.exits) == len(hanging.exits) == 1
    assert settled == ([] if settle_seconds == math.inf else ["wait 1000"])
    assert ("Abandoned a wrapper" in caplog.text) == (settle_seconds == math.inf)


async def test_a_group_in_time_is_not_disturbed_by_its_deadline() -> None:
    with watched(FakeModel(as_told)) as llm:
        with anyio.fail_after(10):
            async with llm.group() as group:
                response = await group.prompt("wait 9")
        assert await response.text() == "wait 9"
        with pytest.raises(TimeoutError):  # noqa: PT012
            with anyio.fail_after(10):
                async with llm.group() as group:
                    await group.prompt("wait 11")


async def test_on_error_cancel_leaves_the_block_as_the_first_failure() -> None:
    spy, model = Spy(), FakeModel(as_told)
    with watched(model, spy) as llm:
        async with nothing_left():
            with pytest.raises(Broken, match="fail 2") as caught:  # noqa: PT012
                async with llm.group(on_error="cancel") as group:
                    failing = await group.prompt("fail 2")
                    siblings = [await group.prompt("wait 1000") for _ in range(3)]
                    await siblings[0].text()
    assert caught.value is failing.error
    assert all(isinstance(sibling.error, PromptCancelled) for sibling in siblings)
    assert model.counts["running"] == 0
    assert (group.stats.failed, group.stats.cancelled) == (1, 3)
    assert len(spy.exits) == 1
    spy.check()


async def test_on_error_cancel_interrupts_a_body_that_waits_for_something_else() -> None:
    with watched(FakeModel(as_told)) as llm:
        began = anyio.current_time()
        with pytest.raises(Broken):  # noqa: PT012
            async with llm.group(on_error="cancel") as group:
                await group.prompt("fail 2")
                await anyio.sleep_forever()
        assert anyio.current_time() - began < 3
        with pytest.raises(Broken):
            async with llm.group(on_error="cancel") as group:
                await group.prompt("fail 2")


async def test_on_error_cancel_with_several_failures_raises_them_together() -> None:
    go = anyio.Event()

    async def fails_at_once(prompt: str) -> AsyncGenerator[str, None]:
        await go.wait()
        raise Broken(prompt)
        yield

    with watched(FakeModel(fails_at_once)) as llm:
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
            async with llm.group(on_error="cancel") as group:
                failing = [await group.prompt(name) for name in "ab"]
                go.set()
        assert set(caught.value.exceptions) == {response.error for response in failing}


async def test_on_error_cancel_keeps_the_cause_of_the_failure() -> None:
    async def wraps(prompt: str) -> AsyncGenerator[str, None]:
        raise Broken from ValueError("what the library said")
        yield

    with watched(FakeModel(wraps)) as llm, pytest.raises(Broken) as caught:  # noqa: PT012
        async with llm.group(on_error="cancel") as group:
            await group.prompt("x")
            await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, ValueError)


async def test_on_error_cancel_and_readers_in_a_task_group_of_the_body() -> None:
    async def read(response: PromptResponse) -> None:
        await response.text()

    with watched(FakeModel(as_told)) as llm, pytest.raises(Broken):  # noqa: PT012
        async with llm.group(on_error="cancel") as group, anyio.create_task_group() as tasks:
            for prompt in ("fail 1", "wait 5", "wait 6"):
                tasks.start_soon(read, await group.prompt(prompt))


async def test_on_error_cancel_does_not_hide_an_error_of_the_body() -> None:
    with watched(FakeModel(as_told)) as llm, pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with llm.group(on_error="cancel") as group:
            response = await group.prompt("fail 1")
            try:
                await response.wait()
            finally:
                raise ZeroDivisionError


async def test_exit_hooks_each_run_once_although_one_fails_and_one_hangs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hangs(group: Group) -> None:
        await anyio.sleep_forever()

    async def fails(group: Group) -> None:
        raise Broken("settlement")

    spies = Spy("first"), Spy("hanging", exiting=hangs), Spy("failing", exiting=fails), Spy("last")
    with watched(FakeModel(), *spies) as llm:
        began = anyio.current_time()
        with pytest.raises(Broken, match="settlement"):
            async with llm.group() as group:
                await group.prompt("x")
        assert anyio.current_time() - began < 6
    assert [spy.exits for spy in spies] == [[group.group]] * 4
    assert "hanging took more than 5 s" in caplog.text


async def test_a_failing_exit_hook_does_not_hide_the_exception_of_the_body() -> None:
    async def fails(group: Group) -> None:
        raise Broken

    with watched(FakeModel(), Spy(exiting=fails)) as llm, pytest.raises(ZeroDivisionError):
        async with llm.group():
            raise ZeroDivisionError


async def test_an_exit_hook_is_not_interrupted_by_a_cancellation() -> None:
    ended: list[bool] = []

    async def takes_its_time(group: Group) -> None:
        await anyio.sleep(3)
        ended.append(True)

    with watched(FakeModel(), Spy(exiting=takes_its_time)) as llm:
        with anyio.move_on_after(1):
            async with llm.group():
                await anyio.sleep_forever()
        with anyio.move_on_after(1):
            async with llm.group():
                pass
    assert ended == [True, True]


async def test_after_the_block_prompts_are_refused_and_responses_stay_readable() -> None:
    with watched(FakeModel(as_told)) as llm:
        async with llm.group() as group:
            good, bad = await group.prompt("wait 1"), await group.prompt("fail 1")
        with pytest.raises(GroupClosed):
            await group.prompt("late")
        with pytest.raises(GroupClosed):
            async for _ in group.map(["late"]):
                pass
        with pytest.raises(GroupClosed):
            await group.chain("late").text()
        with pytest.raises(GroupClosed):
            await group.conversation().prompt("late")
        assert await good.text() == "wait 1"
        assert [chunk async for chunk in good] == ["wait 1"]
        with pytest.raises(Broken):
            await bad.text()


async def test_failures_that_nobody_read_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with watched(FakeModel(as_told)) as llm:
        async with llm.group() as group:
            await group.prompt("fail 1")
            read = await group.prompt("fail 2")
            with pytest.raises(Broken):
                await read.text()
            looked_at = await group.prompt("fail 3")
            await looked_at.wait()
            assert looked_at.error
            (await group.prompt("wait 9")).cancel()
        assert (group.stats.failed, group.stats.cancelled) == (3, 1)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert messages == ["A prompt to fake failed and nobody read it: Broken: fail 1"]


async def test_many_unread_failures_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with watched(FakeModel(as_told)) as llm:
        async with llm.group() as group:
            for _ in range(100):
                await group.prompt("fail 0")
    assert len(caplog.records) == 11
    assert "90 more" in caplog.text


async def test_failures_that_somebody_read_make_room_for_those_that_nobody_did(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("datasette_llm.tasks.group_supervisor.FAILURES_KEPT", 2)
    with watched(FakeModel(as_told)) as llm:
        async with llm.group() as group:
            for _ in range(2):
                with pytest.raises(Broken):
                    await (await group.prompt("fail 1")).text()
            for name in ("fail 2", "fail 3", "fail 4"):
                await (await group.prompt(name)).wait()
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["fail 2", "fail 3"]


@pytest.mark.parametrize("refused", [0, 1, 3])
async def test_the_first_prompt_enters_alone_and_if_refused_the_next_one_is_first(refused: int) -> None:
    inside = peak_before_first = 0
    admitted = False
    refusals: list[str | None] = []

    async def entering(visit: Visit) -> None:
        nonlocal inside, peak_before_first, admitted
        inside += 1
        if not admitted:
            peak_before_first = max(peak_before_first, inside)
        await anyio.sleep(1)
        inside -= 1
        if len(refusals) < refused:
            refusals.append(visit.prompt)
            raise Broken
        admitted = True

    began = anyio.current_time()
    outcomes: list[str] = []

    async def ask(group: GroupModel, number: int) -> None:
        try:
            await group.prompt(str(number))
            outcomes.append("in")
        except Broken:
            outcomes.append("refused")

    with watched(FakeModel(), Spy(entering=entering)) as llm:
        began = anyio.current_time()
        async with llm.group() as group, anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(ask, group, number)
        elapsed = anyio.current_time() - began
    assert peak_before_first == 1
    assert outcomes == ["refused"] * refused + ["in"] * (8 - refused)
    # One after the other until one is in, then all at once.
    assert elapsed < refused + 2.5


async def test_a_first_prompt_that_is_cancelled_while_it_enters_lets_the_next_one_in() -> None:
    async def entering(visit: Visit) -> None:
        await anyio.sleep(2 if visit.prompt == "first" else 0)

    with watched(FakeModel(), Spy(entering=entering)) as llm:
        async with llm.group() as group:
            with anyio.move_on_after(1):
                await group.prompt("first")
            assert await (await group.prompt("second")).text() == "second"


@pytest.mark.parametrize("where", ["entering", "leaving", "answered", "on_done", "tool", "exit"])
async def test_plugins_callbacks_and_tools_may_prompt_the_same_group(where: str) -> None:
    """At concurrency 1 this would wait for itself, if any of them held the slot."""
    answers: list[str] = []
    group: GroupModel

    async def ask(*arguments: Any) -> str:
        subject = arguments[0] if arguments else None
        prompt = subject.prompt if isinstance(subject, Visit) else "outer"
        if prompt == "outer" and not answers:
            answers.append("asked")
            response = await group.prompt("inner")
            answers.append(await response.text())
        return "done"

    async def tool() -> str:
        return await ask()

    spy = Spy()
    if where in ("entering", "leaving"):
        setattr(spy, where, ask)
    elif where == "answered":
        spy.answered = ask

    async def refused(closed: Group) -> None:
        with pytest.raises(GroupClosed):
            await group.prompt("inner")
        answers.extend(["asked", "inner"])

    if where == "exit":
        spy.exiting = refused
    with watched(FakeModel(seconds=1), spy) as llm:
        with anyio.fail_after(60):
            async with nothing_left(), llm.group(concurrency=1) as group:
                if where == "tool":
                    import llm as llm_library

                    response = await group.prompt("outer", tools=[tool])
                    await response.execute_tool_calls(
                        tool_calls_list=[llm_library.ToolCall(name="tool", arguments={})]
                    )
                else:
                    response = await group.prompt("outer")
                    if where == "on_done":
                        await response.on_done(ask)
                assert await response.text() == "outer"
    assert answers == ["asked", "inner"]
    spy.check()


async def test_a_wrapper_under_another_flavour_and_the_body_read_the_same_response() -> None:
    """Under trio the wrapper waits on the hosted asyncio loop while the body waits on trio."""
    read: list[str] = []
    responses: list[PromptResponse] = []

    async def leaving(visit: Visit) -> None:
        if visit.prompt == "quick":
            read.append(await responses[0].text())
            read.append("".join([chunk async for chunk in responses[0]]))

    with watched(FakeModel(as_told), Spy(leaving=leaving)) as llm:
        async with llm.group() as group:
            responses.append(await group.prompt("wait 5"))
            await group.prompt("quick")
            await anyio.sleep(1)
            read.append(await responses[0].text())
    assert read == ["wait 5"] * 3


async def test_stats_at_each_stage() -> None:
    gate = anyio.Event()

    async def entering(visit: Visit) -> None:
        await anyio.sleep(1)

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        async for chunk in as_told(prompt):
            yield chunk

    with watched(FakeModel(script), Spy(entering=entering)) as llm:
        async with llm.group(concurrency=2) as group, anyio.create_task_group() as tasks:

            def numbers() -> tuple[int, int, int, int, int]:
                stats = group.stats
                return stats.waiting, stats.running, stats.succeeded, stats.failed, stats.cancelled

            assert numbers() == (0, 0, 0, 0, 0)
            for prompt in ("wait 2", "fail 4", "wait 6"):
                tasks.start_soon(group.prompt, prompt)
                await checkpoint()
            await anyio.sleep(0.5)
            assert numbers() == (3, 0, 0, 0, 0)
            await anyio.sleep(2)
            assert numbers() == (1, 2, 0, 0, 0)
            await anyio.sleep(2)
            assert numbers()[2:] == (1, 0, 0)
            await anyio.sleep(3)
            assert numbers() == (0, 1, 1, 1, 0)
            assert group.stats.concurrency == 2
            group.cancel()
            gate.set()
        stats = group.stats
    assert (stats.waiting, stats.running, stats.succeeded, stats.failed, stats.cancelled) == (0, 0, 1, 1, 1)
    assert (stats.input_tokens, stats.output_tokens) == (2, 1)
    assert stats.elapsed == pytest.approx(7.5, abs=0.2)
    assert stats.prompts_per_second == pytest.approx(3 / stats.elapsed)
    await anyio.sleep(10)
    assert group.stats == stats


async def test_cancel_of_the_model_cancels_and_refuses_but_the_body_goes_on() -> None:
    spy = Spy()
    with watched(FakeModel(as_told), spy) as llm:
        async with llm.group() as group:
            running = await group.prompt("wait 100")
            group.cancel()
            with pytest.raises(PromptCancelled):
                await running.text()
            with pytest.raises(PromptCancelled):
                await group.prompt("late")
    assert len(spy.exits) == 1
    assert len(spy.visits) == 1
    spy.check()


async def test_a_group_is_one_object_and_knows_who_it_is_for() -> None:
    spy = Spy()
    with watched(FakeModel(), spy) as llm:
        async with llm.group(purpose="testing", actor={"id": "ada"}) as model:
            await model.prompt("a")
            async for _ in model.map(["b", "c"]):
                pass
    group = model.group
    assert [visit.result.group for visit in spy.visits] == [group] * 3
    assert spy.exits == [group]
    assert (group.model_id, group.purpose, group.actor) == ("fake", "testing", {"id": "ada"})
    assert len(group._responses) == 3
    assert "testing" in repr(group)


mine: ContextVar[int] = ContextVar("mine")


async def test_fifty_groups_of_forty_prompts_do_not_get_in_each_others_way() -> None:
    """A third of them is cancelled half-way, a third has failing prompts."""
    seen: list[tuple[int, str]] = []

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        number, _, index = prompt.partition("/")
        seen.append((mine.get(), number))
        await anyio.sleep(int(index) % 7)
        if int(number) % 3 == 1 and int(index) % 4 == 0:
            raise Broken(prompt)
        yield prompt

    groups: dict[int, GroupModel] = {}
    answers: dict[int, list[str]] = {number: [] for number in range(50)}
    errors: dict[int, list[str]] = {number: [] for number in range(50)}

    async def use(number: int) -> None:
        mine.set(number)
        with anyio.move_on_after(9 if number % 3 == 2 else math.inf):
            async with llm.group(concurrency=1 + number % 9, actor={"id": str(number)}) as group:
                groups[number] = group
                responses = [await group.prompt(f"{number}/{index}") for index in range(40)]
                for response in responses:
                    try:
                        answers[number].append(await response.text())
                    except Broken as error:
                        errors[number].append(str(error))

    spy, model = Spy(), FakeModel(script)
    with watched(model, spy) as llm:
        async with nothing_left(), anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(use, number)
    spy.check()
    assert all(str(number) == asked for number, asked in seen)
    assert model.counts["opened"] == model.counts["closed"]
    assert len(spy.exits) == 50
    for number, group in groups.items():
        stats = group.stats
        assert (stats.waiting, stats.running) == (0, 0)
        assert group._supervisor.slots.in_use == 0
        visits = [visit for visit in spy.visits if visit.result.group is group.group]
        assert all(str(visit.prompt).startswith(f"{number}/") for visit in visits)
        # What waited for its turn when the group was cancelled never got to its wrapper.
        assert len(visits) <= stats.succeeded + stats.failed + stats.cancelled <= 40
        if number % 3 == 0:
            assert answers[number] == [f"{number}/{index}" for index in range(40)]
            assert stats.succeeded == 40
        elif number % 3 == 1:
            assert errors[number] == [f"{number}/{index}" for index in range(0, 40, 4)]
            assert (stats.succeeded, stats.failed) == (30, 10)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"concurrency": 0}, ValueError),
        ({"concurrency": True}, TypeError),
        ({"concurrency": "5"}, TypeError),
        ({"on_error": "ignore"}, ValueError),
    ],
)
async def test_arguments_that_make_no_sense_are_refused(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    with watched(FakeModel()) as llm, pytest.raises(error):
        async with llm.group(**arguments):
            raise AssertionError

"""An attempt that never comes back is given up and made again; on virtual time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import LLM
from datasette_llm.pace.attempt_limit import AttemptLimit
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@pytest.mark.parametrize(("seconds", "given_up_after"), [(1.0, 120.0), (30.0, 300.0)])
async def test_one_that_is_never_answered_is_asked_again(seconds: float, given_up_after: float) -> None:
    asked: list[float] = []
    given_up: list[float] = []

    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        if prompt == "3":
            asked.append(anyio.current_time())
            if len(asked) == 1:
                try:
                    await anyio.sleep_forever()
                finally:
                    given_up.append(anyio.current_time())
        await anyio.sleep(seconds)
        yield prompt

    with registered(FakeModel(answer)):
        async with LLM(datasette_with()).group("fake", concurrency=10) as model:
            errors = [response.error async for _, response in model.map(range(200), str)]
    assert errors == [None] * 200
    assert given_up[0] - asked[0] == pytest.approx(given_up_after, abs=2)
    # Others were asked meanwhile, so that it waits for one of them to be answered.
    assert asked[1] - given_up[0] <= seconds + 1


async def test_one_that_is_never_answered_fails_in_the_end() -> None:
    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        if prompt == "3":
            await anyio.sleep_forever()
        await anyio.sleep(1)
        yield prompt

    datasette = datasette_with({"retries": {"attempts": 3, "timeout": 3600}})
    with registered(FakeModel(answer)):
        async with LLM(datasette).group("fake", concurrency=10) as model:
            errors = [response.error async for _, response in model.map(range(200), str)]
    failed = [error for error in errors if error is not None]
    assert [type(error) for error in failed] == [TimeoutError]
    assert "far longer than the model usually takes" in str(failed[0])


async def test_chunks_of_an_answer_move_its_deadline_now_and_then_only() -> None:
    limit, scope = AttemptLimit(), anyio.CancelScope()
    limit.watch(scope, 0.0)
    assert scope.deadline == math.inf
    for _ in range(20):
        limit.answered(1.0)
    assert scope.deadline == limit.seconds == 120
    deadlines = []
    for chunk in range(6000):
        now = chunk / 100
        limit.watch(scope, now)
        assert now + 120 <= scope.deadline <= now + 1.06 * 120
        deadlines.append(scope.deadline)
    assert len(set(deadlines)) <= 12


async def test_a_streamed_answer_is_given_up_for_its_silence_and_not_for_its_length() -> None:
    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        for number in range(100 if prompt == "3" else 1):
            await anyio.sleep(5)
            yield f"{number} "

    with registered(FakeModel(answer)):
        async with LLM(datasette_with()).group("fake", concurrency=10) as model:
            errors = [response.error async for _, response in model.map(range(100), str, stream=True)]
    assert errors == [None] * 100

"""One answer from a model: what is tried again, and what readers get when nothing helps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import LLM
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class RefusedError(Exception):
    """What a provider's SDK raises for an HTTP answer."""

    def __init__(self, status_code: int) -> None:
        super().__init__(f"refused with {status_code}")
        self.status_code = status_code


async def always_refusing(prompt: str) -> AsyncGenerator[Any, None]:
    raise RefusedError(429)
    yield


@pytest.mark.parametrize("attempts", [1, 3, 50])
async def test_refused_forever_every_reader_gets_the_providers_own_error(attempts: int) -> None:
    datasette = datasette_with({"retries": {"attempts": attempts, "timeout": 1.5}})
    with registered(FakeModel(always_refusing)):
        async with LLM(datasette).group("fake", concurrency=2) as model:
            errors = [response.error async for _, response in model.map(range(5))]
    assert [type(error) for error in errors] == [RefusedError] * 5


async def test_a_transient_failure_is_tried_again_and_counts_as_one_prompt() -> None:
    calls = 0

    async def failing_twice(prompt: str) -> AsyncGenerator[Any, None]:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise ConnectionError("gone")
        yield "answer"

    with registered(FakeModel(failing_twice)):
        async with LLM(datasette_with()).group("fake") as model:
            response = await model.prompt("x", stream=False)
            assert await response.text() == "answer"
            assert response.attempts == 3
        assert (model.stats.succeeded, model.stats.failed, model.stats.retries) == (1, 0, 2)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_what_cannot_get_better_is_not_tried_again(status: int) -> None:
    async def refusing(prompt: str) -> AsyncGenerator[Any, None]:
        raise RefusedError(status)
        yield

    fake = FakeModel(refusing)
    with registered(fake):
        model = await LLM(datasette_with()).model("fake")
        response = await model.prompt("x")
        with pytest.raises(RefusedError):
            await response.text()
    assert response.attempts == 1
    assert fake.counts["opened"] == fake.counts["closed"] == 1


async def test_a_streamed_answer_that_breaks_is_not_begun_again_for_its_reader() -> None:
    async def breaking(prompt: str) -> AsyncGenerator[Any, None]:
        yield "half "
        await anyio.sleep(1)
        raise ConnectionError("gone")

    with registered(FakeModel(breaking)):
        model = await LLM(datasette_with()).model("fake")
        response = await model.prompt("x")
        reader = aiter(response)
        assert await anext(reader) == "half "
        with pytest.raises(ConnectionError, match="gone"):
            await anext(reader)
    assert response.attempts == 1


async def test_a_refused_key_is_not_tried_for_every_row(caplog: pytest.LogCaptureFixture) -> None:
    async def refusing(prompt: str) -> AsyncGenerator[Any, None]:
        await anyio.sleep(0.1)
        raise RefusedError(401)
        yield

    fake = FakeModel(refusing)
    with registered(fake):
        async with LLM(datasette_with()).group("fake", concurrency=5) as model:
            outcomes = [
                (str(response.error), response.attempts) async for _, response in model.map(range(1_000))
            ]
    assert outcomes == [("refused with 401", 1)] * 5 + [("refused with 401", 0)] * 995
    assert fake.counts["opened"] == 5
    assert [record.message for record in caplog.records] == [
        "No more prompts are sent to fake: the provider refuses them all (key)"
    ]


async def test_a_key_that_has_worked_is_tried_again() -> None:
    async def refusing_some(prompt: str) -> AsyncGenerator[Any, None]:
        if prompt == "1":
            raise RefusedError(401)
        yield prompt

    with registered(FakeModel(refusing_some)):
        async with LLM(datasette_with()).group("fake", concurrency=1) as model:
            outcomes = {item: response.error async for item, response in model.map(range(4))}
    assert [item for item, error in outcomes.items() if error is not None] == [1]


async def test_a_fixed_concurrency_bounds_standalone_prompts_together() -> None:
    fake = FakeModel(seconds=1)
    with registered(fake):
        llm = LLM(datasette_with({"concurrency": 3}))
        async with anyio.create_task_group() as tasks:
            for number in range(10):
                model = await llm.model("fake")
                tasks.start_soon(model.prompt, str(number))
        await (await model.prompt("last")).text()
    assert fake.counts["opened"] == 11
    assert fake.counts["peak"] == 3

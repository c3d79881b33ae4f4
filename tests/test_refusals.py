"""Failures that no other prompt of a model and key can escape: how they are known, that they are final."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import llm
import openai
import pytest

from datasette_llm import LLM
from datasette_llm.calls.failures import classify, refusal_of
from datasette_llm.calls.refusals import wait_in_words

from .fakes import FakeModel, registered
from .hooks import datasette_with
from .provider_errors import HOPELESS, OTHERS, error, openai_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

BUDGET_SECONDS = 120.0


@pytest.mark.parametrize("name", HOPELESS)
def test_what_nobody_can_escape_is_known_by_what_providers_say(name: str) -> None:
    exception, reason = HOPELESS[name]
    failure = classify(exception).within(BUDGET_SECONDS)
    assert (failure.kind, failure.reason) == ("hopeless", reason)
    wrapped = llm.ModelError("it failed")
    wrapped.__cause__ = exception
    assert classify(wrapped).within(BUDGET_SECONDS).reason == reason


@pytest.mark.parametrize("name", OTHERS)
def test_what_others_may_escape_is_nobody_elses(name: str) -> None:
    exception, kind = OTHERS[name]
    assert classify(exception).within(BUDGET_SECONDS).kind == kind


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Please retry in 51234.5s.", 51234.5),
        ("please try again in 8m38.4s", 518.4),
        ("Try again in 1 hour 5 minutes", 3900),
        ("Please try again in 250ms.", 0.25),
        ("Please retry after 60 seconds.", 60),
        ("try again in 2 days", 172_800),
        ("You will regain access on 2001-01-01 at 00:00 UTC.", 0),
        ("try again later", None),
        ("", None),
    ],
)
def test_how_long_to_wait_is_read_from_words(text: str, seconds: float | None) -> None:
    assert wait_in_words(text) == (None if seconds is None else pytest.approx(seconds))


def test_a_refusal_is_something_that_a_provider_said_about_more_than_one_request() -> None:
    assert refusal_of(openai_error(400, error("Unknown parameter"))) is not None
    assert refusal_of(llm.ModelError("no")) is not None
    assert refusal_of(OTHERS["content"][0]) is None
    assert refusal_of(OTHERS["length"][0]) is None
    assert refusal_of(RuntimeError("a bug")) is None
    assert refusal_of(ConnectionError("nobody there")) is None


class Provider:
    """Answers until told otherwise; counts the requests."""

    def __init__(self, *failing: Exception | None, seconds: float = 1.0) -> None:
        self.requests = 0
        self.failing = list(failing)
        self.failure: Exception | None = None
        self.seconds = seconds
        self.until = 0.0

    async def __call__(self, prompt: str) -> AsyncGenerator[str, None]:
        self.requests += 1
        failing = self.failing.pop(0) if self.failing else None
        await anyio.sleep(self.seconds)
        failure = failing or self.failure
        if failure is not None and (not self.until or anyio.current_time() < self.until):
            raise failure
        yield prompt


@pytest.mark.parametrize(
    "name", ["openai key", "openrouter money", "ollama model", "gemini day", "litellm model"]
)
async def test_the_rest_of_a_group_fails_unsent_with_the_providers_error(name: str) -> None:
    provider = Provider()
    provider.failure = HOPELESS[name][0]
    with registered(FakeModel(provider)):
        async with LLM(datasette_with()).group("fake", concurrency=5) as model:
            errors = [response.error async for _, response in model.map(range(300))]
            late = await model.prompt("asked later")
            with pytest.raises(type(provider.failure)) as caught:
                await late.text()
    assert provider.requests == 5
    assert {id(error) for error in errors} == {id(provider.failure)} == {id(caught.value)}
    assert (model.stats.failed, model.stats.succeeded, model.stats.retries) == (301, 0, 0)


@pytest.mark.parametrize("name", ["openrouter money", "openai money", "gemini day"])
async def test_money_and_quota_may_run_out_in_the_middle(name: str) -> None:
    provider = Provider()
    with registered(FakeModel(provider)):
        async with LLM(datasette_with()).group("fake", concurrency=5) as model:
            async for item, _ in model.map(range(300)):
                if item == 100:
                    provider.failure = HOPELESS[name][0]
    assert model.stats.succeeded + model.stats.failed == 300
    assert model.stats.succeeded >= 100
    assert provider.requests <= model.stats.succeeded + 5


async def test_one_refusal_of_a_key_that_works_is_a_bad_moment_and_three_in_a_row_are_none() -> None:
    provider = Provider(None, HOPELESS["openai key"][0])
    with registered(FakeModel(provider)):
        async with LLM(datasette_with()).group("fake", concurrency=1) as model:
            outcomes = [response.error is None async for _, response in model.map(range(6))]
            assert outcomes == [True, False, True, True, True, True]
            provider.failure = HOPELESS["openai key"][0]
            before = provider.requests
            failed = [response.error async for _, response in model.map(range(50))]
    assert len(failed) == 50
    assert None not in failed
    assert provider.requests - before == 3


async def test_a_key_of_ones_own_is_not_the_groups() -> None:
    class KeyModel(FakeModel):
        needs_key = "fake"

        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
            if response._key == "wrong":
                raise HOPELESS["openai key"][0]
            yield "fine"

    with registered(KeyModel()):
        async with LLM(datasette_with()).group("fake", concurrency=2) as model:
            with pytest.raises(openai.AuthenticationError):
                await (await model.prompt("x", key="wrong")).text()
            assert await (await model.prompt("x")).text() == "fine"


async def test_a_quota_is_sat_out_once_for_all_and_uses_nobodys_attempts() -> None:
    provider = Provider()
    provider.failure, provider.until = HOPELESS["gemini day"][0], anyio.current_time() + 51_234.5
    group = LLM(datasette_with()).group("fake", concurrency=5, wait_for_quota=15 * 3600)
    seen = []
    with registered(FakeModel(provider)):
        async with group as model, anyio.create_task_group() as tasks:

            async def look() -> None:
                await anyio.sleep(100)
                seen.append(model.stats.quota_seconds)

            tasks.start_soon(look)
            began = anyio.current_time()
            errors = [response.error async for _, response in model.map(range(100))]
    assert errors == [None] * 100
    assert seen == [pytest.approx(51_234.5 - 98, abs=2)]
    assert provider.requests == 105
    assert model.stats.retries == 0
    assert model.stats.quota_seconds is None
    assert 51_234 < anyio.current_time() - began < 51_300


async def test_a_quota_beyond_the_patience_ends_it_at_once() -> None:
    provider = Provider()
    provider.failure = HOPELESS["gemini day"][0]
    began = anyio.current_time()
    with registered(FakeModel(provider)):
        async with LLM(datasette_with()).group("fake", concurrency=5, wait_for_quota=3600) as model:
            errors = [response.error async for _, response in model.map(range(100))]
    assert set(errors) == {provider.failure}
    assert provider.requests == 5
    assert anyio.current_time() - began < 10


async def test_a_quota_that_does_not_say_when_it_comes_back_is_tried_now_and_then() -> None:
    provider = Provider()
    provider.failure, provider.until = HOPELESS["openrouter free"][0], anyio.current_time() + 3_000
    with registered(FakeModel(provider)):
        async with LLM(datasette_with()).group("fake", concurrency=5, wait_for_quota=7200) as model:
            errors = [response.error async for _, response in model.map(range(20))]
    assert errors == [None] * 20
    assert provider.requests == 20 + 4 * 5
    began = anyio.current_time()
    provider.failure, provider.until = HOPELESS["openrouter free"][0], began + 99_999
    with registered(FakeModel(provider)):
        async with LLM(datasette_with()).group("fake", concurrency=5, wait_for_quota=7200) as model:
            errors = [response.error async for _, response in model.map(range(20))]
    assert set(errors) == {provider.failure}
    assert anyio.current_time() - began == pytest.approx(7200, abs=30)


async def test_a_group_that_sits_out_a_quota_can_be_left() -> None:
    provider = Provider()
    provider.failure = HOPELESS["gemini day"][0]
    with registered(FakeModel(provider)):
        with anyio.move_on_after(500):
            async with LLM(datasette_with()).group("fake", concurrency=5, wait_for_quota=1e6) as model:
                async for _ in model.map(range(100)):
                    pass
    assert model.stats.succeeded == model.stats.failed == 0
    assert model._supervisor.slots.in_use == 0

"""A minute's limit that is used up, and nobody says until when: a job's rows wait for it; on virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm import LLM
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class TooMany(Exception):
    """What a proxy says without a word on when to come again."""

    status_code = 429


class Proxy:
    """Lets through so many requests in a minute of its clock, and refuses the others.

    Args:
        per_minute: how many.
        never: prompts that it always refuses.
        seconds: what an answer takes.
    """

    def __init__(self, per_minute: int, *, never: tuple[str, ...] = (), seconds: float = 0.2) -> None:
        self.per_minute = per_minute
        self.never = never
        self.seconds = seconds
        self.minute = -1
        self.taken = 0
        self.refused: list[str] = []

    async def answer(self, prompt: str) -> AsyncGenerator[Any, None]:
        minute = int(anyio.current_time() // 60)
        if minute != self.minute:
            self.minute, self.taken = minute, 0
        if self.taken >= self.per_minute or prompt in self.never:
            self.refused.append(prompt)
            raise TooMany("rate limit exceeded")
        self.taken += 1
        await anyio.sleep(self.seconds)
        yield prompt


async def run(
    proxy: Proxy,
    prompts: int,
    *,
    attempts: int = 6,
    concurrency: int | None = None,
    outage_timeout: float | None = 1800,
) -> tuple[dict[str, Exception | None], float]:
    """Return each prompt's error, and how many seconds all took."""
    config = {"retries": {"attempts": attempts}}
    with registered(FakeModel(proxy.answer)):
        started = anyio.current_time()
        async with LLM(datasette_with(config)).group(
            "fake", concurrency=concurrency, outage_timeout=outage_timeout
        ) as model:
            errors = {
                item: response.error async for item, response in model.map(map(str, range(prompts)), str)
            }
        return errors, anyio.current_time() - started


async def test_a_jobs_rows_wait_for_the_next_minute() -> None:
    proxy = Proxy(per_minute=60)
    errors, seconds = await run(proxy, 300)
    assert errors == dict.fromkeys(map(str, range(300)))
    assert seconds < 7 * 60
    # Not one of them asked again and again meanwhile.
    assert len(proxy.refused) < 150


async def test_a_job_that_begins_when_the_minute_is_used_up_waits_as_well() -> None:
    proxy = Proxy(per_minute=60)
    await run(proxy, 60)
    errors, _ = await run(proxy, 30, attempts=2)
    assert errors == dict.fromkeys(map(str, range(30)))


async def test_a_prompt_that_is_always_refused_holds_nobody() -> None:
    proxy = Proxy(per_minute=10_000, never=("3", "70"), seconds=8)
    errors, seconds = await run(proxy, 100)
    assert [item for item, error in errors.items() if error is not None] == ["3", "70"]
    assert seconds < 120
    assert proxy.refused.count("70") <= 6


async def test_the_last_one_there_is_not_waited_for_as_long_as_everybody() -> None:
    proxy = Proxy(per_minute=10_000, never=("0",))
    errors, seconds = await run(proxy, 1)
    assert isinstance(errors["0"], TooMany)
    assert seconds < 600
    assert len(proxy.refused) < 30


async def test_a_provider_that_never_serves_anybody_ends_the_prompts() -> None:
    proxy = Proxy(per_minute=0)
    errors, seconds = await run(proxy, 50)
    assert all(isinstance(error, TooMany) for error in errors.values())
    assert seconds < 20 * 60


async def test_whoever_waits_for_the_answer_is_told_within_the_attempts() -> None:
    proxy = Proxy(per_minute=0)
    errors, seconds = await run(proxy, 1, attempts=2, outage_timeout=None)
    assert isinstance(errors["0"], TooMany)
    assert seconds < 5
    assert len(proxy.refused) == 2


async def test_one_at_a_time_the_others_are_asked_before_it_is_again() -> None:
    proxy = Proxy(per_minute=10_000, never=("1",))
    errors, seconds = await run(proxy, 40, concurrency=1)
    assert [item for item, error in errors.items() if error is not None] == ["1"]
    assert seconds < 600


async def test_when_all_have_been_refused_for_long_none_is_asked_any_more() -> None:
    proxy = Proxy(per_minute=0)
    errors, seconds = await run(proxy, 500, attempts=100)
    assert all(isinstance(error, TooMany) for error in errors.values())
    assert seconds < 400
    assert len(set(proxy.refused)) < 60


async def test_an_hour_that_is_used_up_is_waited_for_while_the_jobs_patience_lasts() -> None:
    proxy = Proxy(per_minute=60)
    await run(proxy, 1)
    proxy.per_minute = 0
    opened = anyio.current_time() + 1500

    async def open_again() -> None:
        await anyio.sleep_until(opened)
        proxy.per_minute = 10_000

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_again)
        errors, _ = await run(proxy, 100)
    assert errors == dict.fromkeys(map(str, range(100)))
    assert anyio.current_time() - opened < 60

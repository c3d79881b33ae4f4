"""Whose turn it is: people before jobs, jobs side by side; on virtual time."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import LLM
from datasette_llm.pace.outcome import Outcome, Trouble
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings, RateLimit
from datasette_llm.pace.throttle import Throttle
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with
from tests.simulated_provider import SimulatedProvider, send_all

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from datasette_llm.pace.slots import Slots

OK = Outcome("ok")
TROUBLE = Trouble("the connection is refused", ConnectionRefusedError())


async def send(slots: Slots, prompts: int, seconds: float, tasks: int = 600) -> float:
    """Send so many prompts, as many tasks as there may be; return how long it took."""
    began = anyio.current_time()
    left = prompts

    async def work() -> None:
        nonlocal left
        while left:
            left -= 1
            await slots.acquire(1)
            await anyio.sleep(seconds)
            slots.release(OK, slots.now() - seconds)

    async with anyio.create_task_group() as group:
        for _ in range(min(tasks, prompts)):
            group.start_soon(work)
    return anyio.current_time() - began


async def time_beside(throttle: Throttle, slots: Slots | None = None, seconds: float = 0.1) -> float:
    """Return how long one prompt takes in the middle of a job, by default as one of the job's."""
    took = 0.0
    async with anyio.create_task_group() as group:
        job = throttle.slots(ConcurrencyBounds(start=20, max=20))
        group.start_soon(send, job, 5000, seconds)
        await anyio.sleep(3.03)
        took = await send(slots or job, 1, seconds)
        group.cancel_scope.cancel()
    return took


async def test_a_prompt_that_somebody_waits_for_goes_ahead_of_a_job() -> None:
    throttle = Throttle("m", PromptSettings())
    bounds = ConcurrencyBounds(start=20, max=20)
    assert await time_beside(throttle, throttle.slots(bounds, urgent=True)) <= 1.5 * 0.1
    assert await time_beside(Throttle("m", PromptSettings())) > 1.5 * 0.1


async def test_also_where_the_rate_is_limited() -> None:
    throttle = Throttle("m", PromptSettings(rate_limit=RateLimit(requests_per_minute=600)))
    bounds = ConcurrencyBounds(start=20, max=20)
    assert await time_beside(throttle, throttle.slots(bounds, urgent=True)) <= 0.1 + 0.11


@pytest.mark.parametrize(("workers", "sigma"), [(8, 0.5), (20, 0.0), (20, 0.5)])
async def test_people_find_no_line_at_a_server_that_queues_once_they_have_asked(
    workers: int, sigma: float
) -> None:
    provider = SimulatedProvider(workers=workers, sigma=sigma, latency=1.0)
    throttle = Throttle("m", PromptSettings())
    person = throttle.slots(ConcurrencyBounds(), urgent=True)
    prompts = 60 * workers
    took: list[float] = []

    async def people() -> None:
        await anyio.sleep(20)
        for _ in range(9):
            began = anyio.current_time()
            await person.acquire()
            sent = person.acquired_at
            await provider.answer(prompts)
            person.release(OK, sent)
            took.append(anyio.current_time() - began)
            await anyio.sleep(3)

    async with anyio.create_task_group() as group:
        group.start_soon(people)
        report = await send_all(provider, prompts, throttle=throttle)
    # Without this, 2.3 to 3.6 seconds.
    assert statistics.median(took[1:]) <= 2.0
    alone = math.exp(sigma**2 / 2)
    assert report.seconds <= 1.2 * prompts * alone / workers


async def test_people_among_themselves_are_not_held_back() -> None:
    provider = SimulatedProvider(workers=20, latency=1.0)
    slots = Throttle("m", PromptSettings()).slots(ConcurrencyBounds(), urgent=True)
    limits: list[int] = []

    async def ask(number: int) -> None:
        await slots.acquire()
        sent = slots.acquired_at
        await provider.answer(number)
        limits.append(slots.limit)
        slots.release(OK, sent)

    async with anyio.create_task_group() as group:
        for number in range(600):
            group.start_soon(ask, number)
    # Beside a job 20 or 21, as many as are worked on.
    assert statistics.median(limits) >= 27
    assert max(limits) >= 60


async def test_and_when_a_provider_comes_back() -> None:
    throttle = Throttle("m", PromptSettings())
    job, person = throttle.slots(20), throttle.slots(ConcurrencyBounds(), urgent=True)
    for _ in range(20):
        assert job.acquire_nowait()
    for _ in range(20):
        job.release(Outcome("transient", trouble=TROUBLE))
    order: list[str] = []

    async def call(name: str, slots: Slots) -> None:
        await slots.acquire()
        order.append(name)
        slots.release(OK)

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(call, f"row {number}", job)
        await anyio.sleep(0.1)
        group.start_soon(call, "person", person)
    assert order[0] == "person"


async def test_a_small_job_beside_a_large_one_gets_half_of_the_lane() -> None:
    throttle = Throttle("m", PromptSettings())
    bounds = ConcurrencyBounds(start=10, max=10)
    alone = await send(throttle.slots(bounds), 100, 1.0)
    async with anyio.create_task_group() as group:
        group.start_soon(send, throttle.slots(bounds), 100_000, 1.0)
        await anyio.sleep(5.5)
        beside = await send(throttle.slots(bounds), 100, 1.0)
        group.cancel_scope.cancel()
    assert beside <= 2.2 * alone


@pytest.mark.parametrize(
    "settings", [PromptSettings(), PromptSettings(rate_limit=RateLimit(120))], ids=["", "rate"]
)
@pytest.mark.parametrize("limit", [1, 8])
async def test_ten_jobs_none_starves(limit: int, settings: PromptSettings) -> None:
    throttle = Throttle("m", settings)
    bounds = ConcurrencyBounds(start=limit, max=limit)
    views = [throttle.slots(bounds, urgent=number == 0) for number in range(10)]
    done = [0] * 10

    async def job(number: int, tasks: int) -> None:
        async def work() -> None:
            while True:
                await views[number].acquire(1)
                try:
                    await anyio.sleep(0.5)
                    done[number] += 1
                finally:
                    views[number].release(OK)

        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(work)

    with anyio.move_on_after(200):
        async with anyio.create_task_group() as group:
            for number in range(1, 10):
                group.start_soon(job, number, 5 * number)
            for _ in range(18):
                # Somebody asks now and then.
                await anyio.sleep(9)
                await send(views[0], 1, 0.5)
                done[0] += 1
            await anyio.sleep_forever()
    assert done[0] == 18
    assert min(done[1:]) >= 0.7 * max(done[1:])


async def test_standalone_prompts_are_urgent_and_those_of_a_group_are_if_configured() -> None:
    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        yield prompt

    config = {"purposes": {"chat": {"interactive": True}, "night": {"interactive": False}}}
    with registered(FakeModel(answer)):
        llm = LLM(datasette_with(config))
        async with llm.group("fake") as job, llm.group("fake", purpose="chat") as chat:
            assert not job._supervisor.slots.urgent
            assert chat._supervisor.slots.urgent
        assert (await llm.model("fake"))._owner()[1].urgent
        assert not (await llm.model("fake", purpose="night"))._owner()[1].urgent

"""What can be seen of a lane while it works: how things stand, and what the last hour brought."""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import LLM
from datasette_llm.pace.outcome import Outcome, Trouble
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings, RateLimit
from datasette_llm.pace.registry import throttles_everywhere, throttles_here
from datasette_llm.pace.state import state_of
from datasette_llm.pace.tally import MINUTES, LastHour, Tally
from datasette_llm.pace.throttle import Throttle
from datasette_llm.tasks.live import live_groups
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Refused(Exception):
    status_code = 429


def test_an_hour_is_kept_by_the_minute_and_no_longer() -> None:
    time = 30.0
    hour = LastHour(lambda: time)
    hour.ended("ok")
    time = 95.0
    hour.ended("throttled")
    hour.used(10, 2, 0.5)
    hour.used(10, 2, None)
    minutes = hour.minutes()
    assert {ago: (minute.answered, minute.refused) for ago, minute in minutes.items()} == {
        1: (1, 0),
        0: (0, 1),
    }
    total = hour.total()
    assert (total.requests, total.input_tokens, total.cost) == (2, 20, 0.5)
    assert (total.priced, total.unpriced) == (1, 1)
    time = 30.0 + 60 * MINUTES
    assert (hour.total().answered, hour.total().refused) == (0, 1)
    for _ in range(10 * MINUTES):
        time += 60
        hour.ended("failed")
    assert len(hour._minutes) == MINUTES
    assert hour.total().failed == MINUTES


def test_all_that_is_counted_adds_up() -> None:
    names = [field.name for field in fields(Tally)]
    total = Tally(*range(len(names)))
    total.add(Tally(*range(len(names))))
    assert [getattr(total, name) for name in names] == [2 * number for number in range(len(names))]


async def test_conditions_of_a_lane() -> None:
    throttle = Throttle("m", PromptSettings(rate_limit=RateLimit(requests_per_minute=600)), "secret X")
    slots = throttle.slots(ConcurrencyBounds(start=7))
    assert slots.acquire_nowait()
    state = state_of(throttle)
    assert (state.condition, state.limit, state.in_flight, state.waiting) == ("open", 7, 1, 0)
    assert state.rates == {"configured": 10.0}
    slots.release(Outcome("throttled", retry_after=3.0))
    assert state_of(throttle).condition == "cooling down"
    assert state_of(throttle).cooldown_seconds == pytest.approx(3.0)
    await anyio.sleep(3.1)
    assert state_of(throttle).condition == "open"


async def test_conditions_of_a_lane_whose_provider_is_away() -> None:
    throttle = Throttle("m", PromptSettings())
    slots = throttle.slots(ConcurrencyBounds(start=7))
    for _ in range(8):
        await slots.acquire()
        trouble = Trouble("connection refused", OSError(), "127.0.0.1:1")
        slots.release(Outcome("transient", trouble=trouble, answered=False))
        if throttle.away:
            break
        await anyio.sleep(1)
    state = state_of(throttle)
    assert state.condition == "away"
    assert state.away is not None
    assert state.away.address == "127.0.0.1:1"
    await slots.acquire()
    slots.release(Outcome("ok"))
    assert state_of(throttle).condition == "returning"


async def test_the_limit_is_that_of_the_lanes_in_use() -> None:
    throttle = Throttle("m", PromptSettings())
    first, second = throttle.slots(3), throttle.slots(4)
    assert first.acquire_nowait()
    assert second.acquire_nowait()
    assert state_of(throttle).limit == 7
    second.release(Outcome("ok"))
    del second
    assert state_of(throttle).limit == 3
    first.release(Outcome("ok"))


async def test_what_prompts_do_is_counted_where_they_wait() -> None:
    refusals = 2

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise Refused("slow down")
        if prompt == "bad":
            raise ValueError("no")
        yield "answer"

    datasette = datasette_with({"prices": {"fake": {"input": 1_000_000, "output": 0}}})
    with registered(FakeModel(script)):
        async with LLM(datasette).group("fake", purpose="testing", concurrency=2) as model:
            (live,) = live_groups()
            assert live.group is model.group
            async for _, _response in model.map(["one two", "bad", "three"]):
                pass
            await model.chain("four").text()
        assert live_groups() == []
        (throttle,) = throttles_here()
    total = throttle.hour.total()
    assert (total.answered, total.refused, total.failed, total.retries) == (3, 2, 1, 2)
    assert (total.input_tokens, total.output_tokens, total.cost) == (4, 3, 4.0)
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(throttle in throttles_everywhere()))
    thread.start()
    thread.join()
    assert seen == [True]
    assert state_of(throttle).in_flight == 0

"""Limits so low that few are in flight: a provider's number and its rate look the same from here.

On virtual time, against a provider that works on a few at a time, and against one that lets in a few a
second; nothing is announced and nothing tuned.
"""

from __future__ import annotations

import anyio
import pytest

from datasette_llm.pace.policy import PromptSettings
from datasette_llm.pace.throttle import Throttle

from .simulated_provider import SimulatedProvider, send_all


@pytest.mark.parametrize("retry_after", [None, "ceiling"])
@pytest.mark.parametrize("latency", [0.1, 0.3, 0.4, 0.5, 0.8, 1.0, 1.5])
async def test_a_rate_that_allows_nothing_at_once_is_not_taken_for_a_number(
    latency: float, retry_after: str | None
) -> None:
    provider = SimulatedProvider(
        rate=4, burst=1, latency=latency, sigma=0.05, client_delay=0.01, retry_after=retry_after
    )
    report = await send_all(provider, 1000)
    assert report.lost == 0
    assert report.seconds <= 1.2 * 250
    assert report.refused <= 0.02 * 1000


@pytest.mark.parametrize("latency", [0.3, 1.0])
@pytest.mark.parametrize("in_flight", [2, 3, 4])
async def test_a_cap_of_few_is_used_up(in_flight: int, latency: float) -> None:
    provider = SimulatedProvider(in_flight=in_flight, latency=latency, retry_after=None)
    report = await send_all(provider, 100 * in_flight)
    assert report.lost == 0
    assert report.seconds <= 1.1 * 100 * latency
    assert report.refused <= 10


@pytest.mark.parametrize("in_flight", [2, 4, 7])
async def test_a_cap_of_few_is_used_up_also_where_answers_are_slow(in_flight: int) -> None:
    provider = SimulatedProvider(in_flight=in_flight, latency=60.0, retry_after=None, round_trip=0.05)
    report = await send_all(provider, 100 * in_flight)
    assert report.lost == 0
    assert report.seconds <= 1.05 * 100 * 60


@pytest.mark.parametrize("retry_after", [None, "exact"])
@pytest.mark.parametrize("in_flight", [1, 2, 4])
async def test_a_cap_is_no_rate_because_answers_cross_requests(
    in_flight: int, retry_after: str | None
) -> None:
    provider = SimulatedProvider(
        in_flight=in_flight, latency=0.3, sigma=0.3, round_trip=0.06, retry_after=retry_after
    )
    report = await send_all(provider, 100 * in_flight)
    assert report.lost == 0
    # While an answer and the next request are on their way, the provider has nothing to do.
    assert report.seconds <= 1.35 * 100 * 0.36


@pytest.mark.parametrize(("retry_after", "in_flight"), [(None, 20), ("exact", 20), ("exact", 50)])
async def test_after_a_bad_minute_as_many_as_before_are_in_flight_again(
    retry_after: str | None, in_flight: int
) -> None:
    provider = SimulatedProvider(in_flight=in_flight, latency=1.0, sigma=0.2, retry_after=retry_after)
    throttle = Throttle("simulated", PromptSettings())

    async def a_bad_minute() -> None:
        await anyio.sleep(30)
        provider.in_flight = 2
        await anyio.sleep(60)
        provider.in_flight = in_flight

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a_bad_minute)
        report = await send_all(provider, 240 * in_flight, throttle=throttle, attempts=60)
    assert report.lost == 0
    assert report.refused <= 150
    # The minute itself, one and a half until it is noticed that it is over, and 240 s of work.
    assert report.seconds <= 60 + 90 + 1.06 * 240

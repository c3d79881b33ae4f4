"""Bulk jobs against simulated providers: how long they take and how much is refused, on virtual time.

The figures are the package's promises: nothing tuned, 1,500 prompts, a limit that needs 4, 20 or 150
requests in flight; at most 1 % refused where limits are announced and 3 % where not.
"""

from __future__ import annotations

import math

import anyio
import pytest

from datasette_llm.pace.adaptive import AdaptiveLimit
from datasette_llm.pace.announced import seconds_until
from datasette_llm.pace.outcome import Outcome
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings
from datasette_llm.pace.throttle import Throttle

from .simulated_provider import SimulatedProvider, send_all

#: Seconds an answer takes: with 100 requests a second, 4, 20 and 150 of them are in flight.
LATENCIES = [0.04, 0.2, 1.5]


def shortest(latency: float) -> float:
    """Return the seconds in which 1,500 prompts can be answered at 100 a second.

    At most 40 are in flight before the first answer, since a server that queues must not be flooded. Where
    an answer takes longer than these are sent in, the bucket stands full meanwhile: that time is lost.
    """
    unproven, rate, burst = 2 * ConcurrencyBounds().start, 100, 100
    if unproven / latency >= rate:
        return 1500 / rate
    return latency + (1500 - unproven - burst) / rate + latency


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("headers", ["per minute", "capacity"])
async def test_an_announced_limit(latency: float, headers: str) -> None:
    provider = SimulatedProvider(rate=100, burst=100, latency=latency, headers=headers)
    report = await send_all(provider, 1500)
    assert report.lost == 0
    assert report.seconds <= (1.05 if latency < 1 else 1.025) * shortest(latency)
    assert report.refused <= 0.005 * 1500


@pytest.mark.parametrize("latency", LATENCIES)
@pytest.mark.parametrize("retry_after", [None, "ceiling"])
async def test_a_limit_that_nobody_announced(latency: float, retry_after: str | None) -> None:
    provider = SimulatedProvider(rate=100, burst=100, latency=latency, retry_after=retry_after)
    report = await send_all(provider, 1500)
    assert report.lost == 0
    assert report.seconds <= (1.10 if latency < 1 else 1.05) * shortest(latency)
    assert report.refused <= 0.03 * 1500
    assert report.throttled_seconds > 0


@pytest.mark.parametrize("retry_after", [None, "ceiling"])
async def test_a_limit_that_allows_nothing_at_once(retry_after: str | None) -> None:
    provider = SimulatedProvider(rate=10, burst=1, latency=0.05, retry_after=retry_after)
    report = await send_all(provider, 400)
    assert report.lost == 0
    assert report.seconds <= 1.25 * 40
    assert report.refused <= 0.02 * 400


@pytest.mark.parametrize("latency", [0.2, 1.5])
@pytest.mark.parametrize("burst", [1, 4, 20])
async def test_a_low_limit_that_nobody_announced(burst: int, latency: float) -> None:
    provider = SimulatedProvider(rate=4, burst=burst, latency=latency, retry_after="ceiling")
    report = await send_all(provider, 1000)
    assert report.lost == 0
    assert report.refused <= 0.012 * 1000
    assert report.seconds <= 1.15 * (1000 - burst) / 4


async def test_a_low_limit_is_kept_where_requests_leave_a_little_late() -> None:
    provider = SimulatedProvider(
        rate=4, burst=4, latency=0.5, sigma=0.02, retry_after=None, client_delay=0.01, seed=2
    )
    report = await send_all(provider, 1000)
    assert report.lost == 0
    assert report.refused <= 0.02 * 1000


async def test_the_first_requests_are_spread_and_soon_the_limit_is_reached() -> None:
    throttle = Throttle("simulated", PromptSettings())
    slots = throttle.slots(ConcurrencyBounds(start=20))
    began = anyio.current_time()
    assert slots.limit == 20
    sent = []
    for _ in range(20):
        await slots.acquire()
        sent.append(anyio.current_time() - began)
    # Whoever asks for one or two hardly waits.
    assert sent[0] == 0
    assert sent[1] <= 0.011
    assert sent[10] >= 0.06
    assert 0.12 <= sent[-1] <= 0.21


@pytest.mark.parametrize(("before", "after", "latency"), [(50, 15, 1.0), (100, 40, 0.5), (20, 10, 3.0)])
async def test_where_fewer_are_taken_than_before_that_number_is_found(
    before: int, after: int, latency: float
) -> None:
    provider = SimulatedProvider(in_flight=before, latency=latency, retry_after=None, round_trip=0.02)
    throttle = Throttle("simulated", PromptSettings())
    await send_all(provider, 1500, throttle=throttle, attempts=100)
    provider.in_flight = after
    report = await send_all(provider, 1000, throttle=throttle, attempts=100)
    assert report.lost == 0
    assert report.refused <= 0.1 * 1000
    assert report.seconds <= 1.2 * 1000 * latency / after


async def test_refusals_while_nothing_else_is_in_flight_are_not_for_the_number() -> None:
    limit = AdaptiveLimit(ConcurrencyBounds(start=2), 0.0)
    for at in range(6):
        limit.refused_alone(float(at), 0)
    limit.press(6.0)
    for at in range(61, 80):
        limit.press(at / 10)
    assert limit.limit == 4


async def test_an_announced_limit_with_scattered_answers() -> None:
    provider = SimulatedProvider(rate=100, burst=20, latency=0.5, sigma=0.5, headers="per minute")
    report = await send_all(provider, 1500)
    assert report.refused <= 0.01 * 1500
    assert report.seconds <= 1.15 * 15


async def test_a_window_whose_end_nobody_tells_is_noticed_when_it_has_come() -> None:
    """As litellm's proxy does with ``rpm``: what remains is told, and of refusals nothing."""
    provider = SimulatedProvider(rate=2, latency=0.1, headers="window", retry_after=None, tells_reset=False)
    report = await send_all(provider, 400, attempts=1000)
    assert report.lost == 0
    # Three windows of a minute have to go by.
    assert report.seconds <= 1.25 * 180
    assert report.refused <= 0.05 * 400


async def test_an_announced_window_is_used_up_and_waited_for() -> None:
    provider = SimulatedProvider(rate=10, headers="window")
    report = await send_all(provider, 1500)
    # 600 in each minute: two windows full, and half of the third.
    assert 120 <= report.seconds <= 125
    assert report.refused <= 0.02 * 1500


@pytest.mark.parametrize(("in_flight", "latency"), [(10, 1.5), (30, 0.2), (30, 1.0)])
async def test_a_cap_on_requests_in_flight_is_found(in_flight: int, latency: float) -> None:
    provider = SimulatedProvider(in_flight=in_flight, latency=latency, retry_after="exact")
    report = await send_all(provider, 1500)
    assert report.lost == 0
    assert report.refused <= 0.03 * 1500
    assert report.seconds <= 1.4 * 1500 * latency / in_flight
    assert abs(report.limits[-1] - in_flight) <= 0.15 * in_flight


@pytest.mark.parametrize(("workers", "latency"), [(30, 0.2), (100, 0.5)])
async def test_a_server_that_queues_is_kept_busy_and_not_flooded(workers: int, latency: float) -> None:
    provider = SimulatedProvider(workers=workers, latency=latency)
    report = await send_all(provider, 3000)
    assert report.seconds <= 1.2 * 3000 * latency / workers
    assert report.limits[-1] <= 2 * workers


async def test_a_slow_server_is_given_no_flood_before_its_first_answer() -> None:
    provider = SimulatedProvider(workers=4, latency=10.0)
    report = await send_all(provider, 200)
    assert report.peak <= 2 * ConcurrencyBounds().start


@pytest.mark.parametrize("seconds", [0.5, 12.0, 60.0])
@pytest.mark.parametrize("workers", [1, 2, 8, 64])
async def test_a_server_that_queues_is_sent_few_more_than_it_works_on(workers: int, seconds: float) -> None:
    prompts = 40 * workers + 80
    provider = SimulatedProvider(workers=workers, latency=seconds, sigma=0.4)
    report = await send_all(provider, prompts)
    assert report.lost == 0
    # Before the first answers nobody can know. Then what was sent has to be answered.
    assert report.peak <= max(40, 6 * workers)
    assert max(report.limits[len(report.limits) // 2 :]) <= 3 * workers + 8
    mean = seconds * math.exp(0.4**2 / 2)
    assert report.seconds <= 1.05 * prompts * mean / workers + 3 * mean


async def test_more_room_than_it_looked_like_is_found() -> None:
    provider = SimulatedProvider(workers=2, latency=1.0, sigma=0.4)
    throttle = Throttle("simulated", PromptSettings())
    await send_all(provider, 150, throttle=throttle)
    wider = SimulatedProvider(workers=100, latency=1.0, sigma=0.4)
    report = await send_all(wider, 2000, throttle=throttle)
    assert report.peak >= 60


async def test_a_server_without_limits_gets_as_much_as_it_takes() -> None:
    provider = SimulatedProvider(latency=2.0)
    report = await send_all(provider, 5000)
    assert report.peak == ConcurrencyBounds().max
    assert report.seconds <= 1.25 * 5000 * 2.0 / 500


async def test_refusals_at_random_do_not_stop_everybody() -> None:
    provider = SimulatedProvider(latency=0.2, random_refusals=0.02, random_wait=0.1, retry_after="exact")
    report = await send_all(provider, 2000, concurrency=100)
    assert report.lost == 0
    assert report.seconds <= 1.15 * 2000 * 0.2 / 100


async def test_a_provider_that_takes_fewer_from_one_moment_on_is_not_hammered() -> None:
    provider = SimulatedProvider(in_flight=50, latency=1.0, retry_after=None, round_trip=0.02)
    throttle = Throttle("simulated", PromptSettings())
    await send_all(provider, 1500, throttle=throttle, attempts=100)
    provider.in_flight = 15
    report = await send_all(provider, 1000, throttle=throttle, attempts=100)
    assert report.lost == 0
    assert report.refused <= 0.1 * 1000


async def test_a_pace_that_was_found_is_good_for_more_than_a_day() -> None:
    provider = SimulatedProvider(rate=20, burst=20, latency=0.2)
    throttle = Throttle("simulated", PromptSettings())
    await send_all(provider, 300, throttle=throttle)
    await anyio.sleep(30 * 86_400)
    report = await send_all(provider, 300, throttle=throttle)
    assert report.lost == 0
    assert report.refused <= 0.05 * 300


@pytest.mark.parametrize("in_flight", [20, 50])
async def test_a_cap_that_people_use_too_is_not_taken_for_a_rate(in_flight: int) -> None:
    provider = SimulatedProvider(in_flight=in_flight, latency=0.3, sigma=0.1, retry_after=None)
    throttle = Throttle("simulated", PromptSettings())
    people = throttle.slots(ConcurrencyBounds(), urgent=True)

    async def person() -> None:
        while True:
            await people.acquire()
            sent = people.acquired_at
            status, _, _ = await provider.answer(1_000_000)
            people.release(Outcome("ok" if status == 200 else "throttled"), sent)
            await anyio.sleep(1)

    for _ in range(10):
        await send_all(provider, 1, throttle=throttle, tasks=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(person)
        report = await send_all(provider, 30 * in_flight, throttle=throttle)
        tasks.cancel_scope.cancel()
    assert report.lost == 0
    assert report.seconds <= 1.7 * 30 * 0.3


@pytest.mark.parametrize(("refusals", "seconds"), [(2, 60), (20, 120)])
def test_what_was_learnt_in_a_bad_minute_is_soon_outdated(refusals: int, seconds: float) -> None:
    limit, now = AdaptiveLimit(ConcurrencyBounds(), 0.0), 0.0

    def use(seconds: float) -> None:
        nonlocal now
        until = now + seconds
        while now < until:
            limit.press(now)
            now += 0.02
            for _ in range(max(1, limit.limit // 50)):
                limit.answered(now, 1.0, limit.limit)

    use(20)
    assert limit.limit == 500
    for _ in range(refusals):
        limit.refused(now, 2)
        now += 1
    assert limit.limit <= 2
    limit.relax(now)
    now += 86_400
    use(seconds)
    assert limit.limit >= 160


def test_a_limit_that_was_confirmed_often_does_not_make_a_lower_one_last() -> None:
    limit, now = AdaptiveLimit(ConcurrencyBounds(), 0.0), 100.0
    for _ in range(20):
        limit.refused(now, 90)
        now += 60
    for _ in range(2):
        limit.refused(now, 2)
        now += 1
    limit.press(now)
    assert limit.limit <= 2
    # It is tried with one more within seconds, not within the minute that the higher one had come to.
    now += 6
    limit.press(now)
    assert limit.limit > 1
    limit.press(now + 30)
    assert limit.limit > 2


async def test_a_fixed_number_in_flight_is_paced_like_any_other() -> None:
    provider = SimulatedProvider(rate=50, burst=50, latency=0.2, retry_after=None)
    report = await send_all(provider, 1000, concurrency=100)
    assert report.lost == 0
    assert report.seconds <= 1.10 * 1000 / 50
    assert report.limits == [100] * len(report.limits)


async def test_several_refused_of_those_sent_in_the_same_moment_are_no_chance() -> None:
    # The bucket has filled to half of what waits for the end of the first pause.
    provider = SimulatedProvider(rate=50, burst=50, latency=0.2, retry_after=None)
    await send_all(provider, 1000, concurrency=100)
    again = provider.refused_at[50]
    assert again > 0.4
    at_once = [at for at in provider.refused_at if again <= at < again + 0.1]
    # 75 of the 100 find it empty; a fifth refused of what was sent is what it takes to tell.
    assert len(at_once) <= 75 + 25


async def test_nothing_is_sent_during_a_cooldown() -> None:
    provider = SimulatedProvider(rate=20, burst=20, latency=0.2, retry_after="ceiling")
    await send_all(provider, 300)
    first = provider.refused_at[0]
    after = [at for at in provider.received_at if first + provider.round_trip < at < first + 1]
    assert after == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("0.25", 0.25),
        ("1m30.5s", 90.5),
        ("1h0m1s", 3601.0),
        ("2d", 172800.0),
        ("", None),
        ("soon", None),
        ("1x", None),
        ("2000-01-01T00:00:00Z", 0.0),
        ("2000-01-01T00:00:00", 0.0),
        ("1000000000.5", 0.0),
        ("-1", None),
        ("nan", None),
    ],
)
def test_reset_headers(text: str, seconds: float | None) -> None:
    assert seconds_until(text) == seconds

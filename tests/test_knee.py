"""How many calls a server works on at once, found from its answers, however they scatter; on virtual time."""

from __future__ import annotations

import random

import anyio
import pytest

from datasette_llm.pace.outcome import Outcome
from datasette_llm.pace.overtaking import WINDOW, Overtaking
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings
from datasette_llm.pace.throttle import Throttle

from .simulated_provider import SimulatedProvider, send_all

UNPROVEN = 40


async def test_a_server_is_given_no_flood_before_its_first_answer() -> None:
    provider = SimulatedProvider(workers=4, latency=600.0)
    with anyio.move_on_after(590):
        await send_all(provider, 200)
    assert provider.peak == UNPROVEN


async def test_its_first_few_answers_are_no_word_for_many_more() -> None:
    throttle = Throttle("m", PromptSettings())
    slots = throttle.slots(ConcurrencyBounds())
    sent: list[float] = []
    with anyio.move_on_after(30):
        while True:
            await slots.acquire()
            sent.append(slots.acquired_at)
    assert slots.in_use == UNPROVEN
    for started in sent[:5]:
        slots.release(Outcome("ok"), started)
    with anyio.move_on_after(30):
        while True:
            await slots.acquire()
    assert slots.in_use == UNPROVEN


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.05])
async def test_a_server_that_answers_while_the_first_are_still_being_sent_has_no_queue(
    seconds: float,
) -> None:
    report = await send_all(SimulatedProvider(latency=seconds, sigma=0.2), 1000)
    assert report.limits[60] >= 20
    assert report.seconds <= 1.2


@pytest.mark.parametrize(("workers", "seconds"), [(1, 60.0), (8, 12.0), (64, 0.5)])
async def test_answers_that_scatter_are_no_queue_and_hide_none(workers: int, seconds: float) -> None:
    prompts = 60 + 12 * workers
    provider = SimulatedProvider(workers=workers, latency=seconds, sigma=1.0, seed=workers)
    report = await send_all(provider, prompts)
    fixed = SimulatedProvider(workers=workers, latency=seconds, sigma=1.0, seed=workers)
    best = await send_all(fixed, prompts, concurrency=3 * workers)
    assert report.lost == 0
    assert report.seconds <= 1.1 * best.seconds
    assert report.peak <= max(1.25 * UNPROVEN, 4 * workers)
    assert max(report.limits[len(report.limits) // 2 :]) <= 3 * workers + 8


async def ask_one_after_the_other(provider: SimulatedProvider, throttle: Throttle, prompts: int) -> None:
    await send_all(provider, prompts, throttle=throttle, tasks=1)


@pytest.mark.parametrize("people_seconds", [0.0, 5.0])
async def test_who_asks_one_after_the_other_does_not_show_how_many_are_worked_on(
    people_seconds: float,
) -> None:
    provider = SimulatedProvider(latency=1.0)
    throttle = Throttle("m", PromptSettings())
    for _ in range(20):
        await ask_one_after_the_other(provider, throttle, 1)
        await anyio.sleep(people_seconds)
    report = await send_all(provider, 600, throttle=throttle)
    fresh = await send_all(SimulatedProvider(latency=1.0), 600)
    assert report.seconds <= fresh.seconds + 1


async def test_who_asks_now_and_then_does_not_make_a_known_knee_lower() -> None:
    provider = SimulatedProvider(workers=20, latency=1.0, sigma=0.3)
    throttle = Throttle("m", PromptSettings())
    first = await send_all(provider, 600, throttle=throttle)
    for _ in range(100):
        await ask_one_after_the_other(provider, throttle, 1)
        await anyio.sleep(60)
    again = await send_all(provider, 600, throttle=throttle)
    assert again.seconds <= 1.05 * first.seconds


async def test_answers_that_scatter_do_not_make_room_look_narrow() -> None:
    provider = SimulatedProvider(latency=2.0, sigma=1.0, seed=2)
    report = await send_all(provider, 1500)
    assert report.peak == ConcurrencyBounds().max
    assert min(report.limits[len(report.limits) // 2 :]) >= 400


def test_who_overtakes_others_shows_how_many_are_worked_on() -> None:
    calls = Overtaking()
    for number in range(10):
        calls.sent(float(number))
    # In their order: it may work on one at a time.
    assert calls.ended(0.0, answered=True) == 1
    assert calls.shown == 0
    # Past three that were sent before it.
    assert calls.ended(4.0, answered=True) == 5
    assert calls.shown == 4
    # What was cancelled was overtaken by nobody, and has overtaken nobody.
    assert calls.ended(9.0, answered=False) == 10
    assert calls.shown == 4
    # Sent at about the same moment, they may have arrived in any order.
    for number in range(5):
        calls.sent(20.0 + number / 1000)
    calls.ended(20.004, answered=True)
    assert calls.shown == 7 + 1


def test_what_was_shown_is_forgotten_when_it_does_not_show_again() -> None:
    calls = Overtaking()
    for number in range(10):
        calls.sent(float(number))
    calls.ended(9.0, answered=True)
    assert calls.shown == 10
    for number in range(9):
        calls.ended(float(number), answered=True)
    for number in range(2 * WINDOW):
        calls.sent(100.0 + number)
        calls.ended(100.0 + number, answered=True)
    assert calls.shown == 0


def test_calls_that_nobody_remembers_leave_the_others_alone() -> None:
    calls = Overtaking()
    assert calls.ended(1.0, answered=True) == 1
    order = [float(number) for number in range(50)]
    for at in order:
        calls.sent(at)
    random.Random(1).shuffle(order)
    for at in order:
        calls.ended(at + 0.001, answered=True)
    assert calls.ended(7.0, answered=True) == 1

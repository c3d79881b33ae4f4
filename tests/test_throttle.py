"""Slots, fairness, cancellation, cooldown and configured limits, on virtual time."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from datasette_llm.pace.outcome import Outcome
from datasette_llm.pace.pacing import Bucket
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings, RateLimit, RetryPolicy
from datasette_llm.pace.registry import get_throttle
from datasette_llm.pace.throttle import Throttle

if TYPE_CHECKING:
    from datasette_llm.pace.slots import Slots

OK = Outcome("ok", seconds=0.1)


def refusal(retry_after: float | None = None, seconds: float = 0.0) -> Outcome:
    return Outcome("throttled", retry_after=retry_after, seconds=seconds)


def a_throttle(**limits: int) -> Throttle:
    return Throttle("m", PromptSettings(rate_limit=RateLimit(**limits) if limits else None))


async def test_a_fixed_number_in_flight() -> None:
    slots = a_throttle().slots(2)
    assert slots.acquire_nowait()
    assert slots.acquire_nowait()
    assert not slots.acquire_nowait()
    assert (slots.in_use, slots.limit) == (2, 2)
    slots.release(OK)
    assert slots.acquire_nowait()


async def test_first_come_first_served() -> None:
    slots = a_throttle().slots(1)
    order: list[int] = []

    async def call(number: int) -> None:
        await slots.acquire()
        order.append(number)
        await anyio.sleep(1)
        slots.release(OK)

    async with anyio.create_task_group() as group:
        for number in range(10):
            group.start_soon(call, number)
            await checkpoint()
    assert order == list(range(10))
    assert slots.in_use == 0


async def test_a_retry_goes_first() -> None:
    slots = a_throttle().slots(1)
    assert slots.acquire_nowait()
    order: list[str] = []

    async def call(name: str, first: bool) -> None:
        await slots.acquire(first=first)
        order.append(name)
        slots.release(OK)

    async with anyio.create_task_group() as group:
        group.start_soon(call, "new", False)
        await anyio.sleep(1)
        group.start_soon(call, "again", True)
        await anyio.sleep(1)
        slots.release(OK)
    assert order == ["again", "new"]


async def test_nobody_overtakes_those_who_wait() -> None:
    slots = a_throttle().slots(1)
    assert slots.acquire_nowait()
    async with anyio.create_task_group() as group:
        group.start_soon(slots.acquire)
        await anyio.sleep(1)
        slots.release(OK)
        # The waiter owns the slot already, though it has not run yet.
        assert not slots.acquire_nowait()
    slots.release(OK)


@pytest.mark.parametrize("checkpoints", range(6))
async def test_cancelled_at_any_moment_nothing_leaks(checkpoints: int) -> None:
    slots = a_throttle().slots(1)
    assert slots.acquire_nowait()
    holding = 0

    async def call() -> None:
        nonlocal holding
        await slots.acquire()
        holding += 1
        try:
            await anyio.sleep_forever()
        finally:
            holding -= 1
            slots.release(Outcome("cancelled"))

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        group.start_soon(call)
        await anyio.sleep(1)
        slots.release(OK)
        for _ in range(checkpoints):
            await checkpoint()
        group.cancel_scope.cancel()
    assert (slots.in_use, holding) == (0, 0)
    assert slots.acquire_nowait()


async def test_cancelled_in_a_cooldown_the_others_go_on() -> None:
    throttle = a_throttle()
    slots = throttle.slots(10)
    assert slots.acquire_nowait()
    slots.release(refusal(5))
    began = anyio.current_time()
    done: list[float] = []

    async def call() -> None:
        await slots.acquire()
        done.append(anyio.current_time() - began)
        slots.release(OK)

    async with anyio.create_task_group() as group, anyio.create_task_group() as impatient:
        for _ in range(3):
            impatient.start_soon(call)
            group.start_soon(call)
            await anyio.sleep(0.1)
        impatient.cancel_scope.cancel()
    assert len(done) == 3
    assert min(done) == pytest.approx(5)
    assert slots.in_use == 0


@pytest.mark.parametrize("repetition", range(8))
async def test_cancelling_those_who_watch_the_clock_together_leaves_nobody_waiting_forever(
    repetition: int,
) -> None:
    # The order in which trio runs tasks is random: whoever is told to watch may be cancelled itself.
    slots = a_throttle().slots(10)
    assert slots.acquire_nowait()
    slots.release(refusal(5))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group, anyio.create_task_group() as impatient:
            for number in range(9):
                (impatient if number % 3 != 1 else group).start_soon(slots.acquire)
                await anyio.sleep(0.1)
            impatient.cancel_scope.cancel()
    assert slots.in_use == 3


async def test_one_cooldown_for_everybody() -> None:
    throttle = a_throttle()
    one, other = throttle.slots(5), throttle.slots(ConcurrencyBounds())
    assert one.acquire_nowait()
    assert other.acquire_nowait()
    one.release(refusal(3))
    assert not one.acquire_nowait()
    assert not other.acquire_nowait()
    began = anyio.current_time()
    await other.acquire()
    assert anyio.current_time() - began == pytest.approx(3)
    # At first it had also waited until there was room for a second one.
    assert other.throttled_seconds == pytest.approx(3, abs=0.05)
    assert one.throttled_seconds == 0
    assert throttle.throttled_seconds == other.throttled_seconds


async def answered_often(throttle: Throttle, slots: Slots) -> None:
    """Have so many calls answered that one refusal may be chance."""
    for _ in range(30):
        await slots.acquire()
        await anyio.sleep(0.05)
        slots.release(Outcome("ok", seconds=0.05))


async def test_one_refusal_among_many_answers_is_no_cooldown_and_several_are() -> None:
    throttle = a_throttle()
    slots = throttle.slots(10)
    await answered_often(throttle, slots)
    for number in range(4):
        assert throttle.cooldown_seconds() == 0, number
        await slots.acquire()
        await anyio.sleep(0.001)
        slots.release(refusal(0.5, 0.001))
    assert throttle.cooldown_seconds() == pytest.approx(0.5)


async def test_one_refusal_that_asks_for_a_long_wait_is_a_cooldown() -> None:
    throttle = a_throttle()
    slots = throttle.slots(10)
    await answered_often(throttle, slots)
    await slots.acquire()
    slots.release(refusal(20))
    assert throttle.cooldown_seconds() == 20


async def test_a_longer_retry_after_of_the_same_episode_extends_the_cooldown() -> None:
    slots = a_throttle().slots(3)
    assert slots.acquire_nowait()
    assert slots.acquire_nowait()
    slots.release(refusal(1))
    await anyio.sleep(0.5)
    slots.release(refusal(4, seconds=0.6))
    began = anyio.current_time()
    await slots.acquire()
    assert anyio.current_time() - began == pytest.approx(4)


async def test_a_cooldown_is_no_longer_than_a_prompt_may_take() -> None:
    slots = Throttle("m", PromptSettings(retries=RetryPolicy(timeout=20))).slots(3)
    assert slots.acquire_nowait()
    slots.release(refusal(3600))
    began = anyio.current_time()
    await slots.acquire()
    assert anyio.current_time() - began == pytest.approx(20)


async def test_a_provider_that_refuses_everything_is_tried_less_and_less() -> None:
    throttle = a_throttle()
    slots = throttle.slots(20)
    requests: list[float] = []
    began = anyio.current_time()

    async def call() -> None:
        while True:
            await slots.acquire()
            requests.append(anyio.current_time() - began)
            await anyio.sleep(0.01)
            slots.release(refusal(None, seconds=0.01))

    with anyio.move_on_after(100):
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(call)
    assert len(requests) < 60
    # The first wave, and then one or two at a time.
    assert sum(1 for at in requests if at > 0.5) < 40
    assert all(later - sooner > 10 for sooner, later in zip(requests[-4:-2], requests[-2:], strict=True))


async def test_two_log_lines_for_a_cooldown_and_no_key_in_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="datasette_llm")
    slots = get_throttle("sk-secret", "gpt-x", PromptSettings()).slots(30)
    for _ in range(30):
        assert slots.acquire_nowait()
    for _ in range(30):
        slots.release(refusal(2))
    async with anyio.create_task_group() as group:
        for _ in range(10):
            group.start_soon(slots.acquire)
    lines = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert all("gpt-x" in line for line in lines)
    assert "2.0 seconds" in lines[0]
    assert "sk-secret" not in caplog.text


async def test_a_cooldown_ends_early_when_later_requests_are_answered() -> None:
    slots = a_throttle().slots(30)
    for _ in range(30):
        assert slots.acquire_nowait()
    await anyio.sleep(0.2)
    slots.release(refusal(5, seconds=0.2))
    assert not slots.acquire_nowait()
    for _ in range(20):
        slots.release(Outcome("ok", seconds=0.2))
    assert slots.acquire_nowait()


async def test_configured_requests_per_minute_are_spread_evenly() -> None:
    slots = a_throttle(requests_per_minute=120).slots(100)
    began = anyio.current_time()
    for _ in range(21):
        await slots.acquire()
        slots.release(OK)
    # Two at once, then one each half second.
    assert anyio.current_time() - began == pytest.approx(9.5)


async def test_configured_tokens_per_minute_are_corrected_by_what_was_used() -> None:
    # 10 tokens a second, 60 at once.
    slots = a_throttle(tokens_per_minute=600).slots(100)
    await slots.acquire(10)
    slots.release(Outcome("ok", seconds=0.1, tokens=100))
    began = anyio.current_time()
    await slots.acquire(20)
    assert anyio.current_time() - began == pytest.approx(6)
    slots.release(Outcome("ok", seconds=0.1, tokens=5))
    began = anyio.current_time()
    await slots.acquire(15)
    assert anyio.current_time() - began == pytest.approx(0)


async def test_a_prompt_longer_than_the_token_limit_is_let_through() -> None:
    slots = a_throttle(tokens_per_minute=60).slots(2)
    await slots.acquire(1000)
    slots.release(Outcome("ok", tokens=1000))
    began = anyio.current_time()
    await slots.acquire(1)
    assert anyio.current_time() - began == pytest.approx(995, rel=0.01)


async def test_lanes_of_one_throttle_share_the_pace_in_the_order_they_came() -> None:
    throttle = a_throttle(requests_per_minute=60)
    order: list[str] = []

    async def call(name: str, slots: Slots) -> None:
        await slots.acquire()
        order.append(name)
        slots.release(OK)

    one, other = throttle.slots(1), throttle.slots(ConcurrencyBounds())
    async with anyio.create_task_group() as group:
        for number in range(6):
            group.start_soon(call, f"{number}", one if number % 2 else other)
            await anyio.sleep(0.01)
    assert order == ["0", "1", "2", "3", "4", "5"]


async def test_one_throttle_per_key_and_model() -> None:
    settings_ = PromptSettings()
    throttle = get_throttle("k", "m", settings_)
    assert get_throttle("k", "m", settings_) is throttle
    assert get_throttle("k2", "m", settings_) is not throttle
    assert get_throttle("k", "m2", settings_) is not throttle
    assert get_throttle(None, "m", settings_) is not throttle


async def test_throttles_that_nobody_uses_are_forgotten() -> None:
    busy = get_throttle("busy", "m", PromptSettings())
    slots = busy.slots(1)
    assert slots.acquire_nowait()
    idle = get_throttle("idle", "m", PromptSettings())
    for number in range(300):
        get_throttle(f"key-{number}", "m", PromptSettings())
    assert get_throttle("busy", "m", PromptSettings()) is busy
    assert get_throttle("idle", "m", PromptSettings()) is not idle


async def test_adaptive_slots_share_their_limit_and_grow_while_somebody_waits() -> None:
    throttle = a_throttle()
    one, other = throttle.slots(ConcurrencyBounds(start=4)), throttle.slots(ConcurrencyBounds(start=4))
    for slots in (one, other, one, other):
        await slots.acquire()
    assert one.limit == other.limit == 4
    assert not one.acquire_nowait()
    assert one.wanted == one.limit + 1
    await other.acquire()
    assert one.limit == other.limit == 5
    assert (one.in_use, other.in_use) == (2, 3)


async def test_an_adaptive_limit_stays_within_its_bounds() -> None:
    slots = a_throttle().slots(ConcurrencyBounds(start=2, min=2, max=3))
    for _ in range(3):
        await slots.acquire()
    assert slots.wanted == slots.limit
    with anyio.move_on_after(60) as scope:
        await slots.acquire()
    assert scope.cancelled_caught
    for _ in range(3):
        slots.release(refusal(1))
    await slots.acquire()
    assert slots.limit == 2


@settings(max_examples=200, deadline=None)
@given(
    rate=st.floats(0.01, 1000),
    capacity=st.floats(1, 1000),
    amounts=st.lists(st.floats(0, 100), min_size=1, max_size=50),
)
def test_a_bucket_never_lets_through_more_than_its_rate_and_capacity(
    rate: float, capacity: float, amounts: list[float]
) -> None:
    bucket = Bucket(rate, capacity, capacity, 0.0)
    now = taken = 0.0
    for amount in amounts:
        now = bucket.opening(now, amount)
        assert math.isfinite(now)
        # Before this one is taken; the last may be larger than what the bucket holds.
        assert taken <= capacity + rate * now + max(0.0, *amounts) + 1e-3
        bucket.take(now, amount)
        taken += amount

"""A provider on virtual time: what it accepts, refuses and announces, and how long it takes.

``send_all()`` is a bulk job against it through a throttle: the same steps as a prompt's model call, and
no HTTP. A real server's timing cannot be asserted in a test; this one's can, to the millisecond.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from datasette_llm.calls.retry import WAIT_REFUSED
from datasette_llm.pace.outcome import Outcome
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings
from datasette_llm.pace.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class SimulatedProvider:
    """A token bucket, a cap on requests in flight, or a server that gets slower.

    Args:
        rate: requests a second that the bucket is filled with; 0 is no limit.
        burst: what the bucket holds.
        in_flight: most requests at a time.
        workers: requests it works on at a time, while it queues the others; 0 is all of them.
        latency: seconds an answer takes; log-normal with ``sigma``.
        round_trip: seconds the network takes for a request and its answer together.
        headers: announces the bucket, ``"per minute"`` or by ``"capacity"``, ``"anthropic"`` or ``"window"``.
        retry_after: ``"exact"``, ``"ceiling"`` (whole seconds) or ``None``.
        client_delay: seconds a busy client takes, at most, from the throttle's word to the network.
        random_refusals: share of the requests that get a 429 for no reason.
        random_wait: the seconds these are told to wait.
        tells_reset: whether headers say when the bucket is full again.
    """

    rate: float = 0.0
    burst: float = 1.0
    in_flight: int = 0
    workers: int = 0
    latency: float = 0.2
    sigma: float = 0.0
    round_trip: float = 0.005
    headers: str | None = None
    retry_after: str | None = "ceiling"
    client_delay: float = 0.0
    random_refusals: float = 0.0
    random_wait: float = 1.0
    tells_reset: bool = True
    seed: int = 1
    running: int = 0
    peak: int = 0
    requests: int = 0
    refused: int = 0
    answered: Counter[int] = field(default_factory=Counter)
    received_at: list[float] = field(default_factory=list)
    refused_at: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._level = self.burst
        self._at: float | None = None
        self._desk = anyio.Semaphore(self.workers) if self.workers else None

    async def delay(self) -> None:
        """What the client itself takes before a request is on its way."""
        if self.client_delay:
            await anyio.sleep(self.client_delay * self._random.random())

    async def answer(self, prompt: int) -> tuple[int, dict[str, str], float | None]:
        """Answer one request: status, headers, retry-after."""
        await anyio.sleep(self.round_trip * (0.25 + 0.5 * self._random.random()))
        self.requests += 1
        self.received_at.append(anyio.current_time())
        wait = self._take()
        headers = self._announce() if self.headers else {}
        if wait is None and self.in_flight and self.running >= self.in_flight:
            wait = self.latency
        if wait is None and self._random.random() < self.random_refusals:
            wait = self.random_wait
        if wait is not None:
            self.refused += 1
            self.refused_at.append(anyio.current_time())
            await anyio.sleep(self.round_trip / 2)
            if self.retry_after is None:
                return 429, headers, None
            return 429, headers, float(math.ceil(wait)) if self.retry_after == "ceiling" else wait
        self.running += 1
        self.peak = max(self.peak, self.running)
        # By the prompt, so that another order of the requests is no other work.
        seconds = self.latency * math.exp(self.sigma * random.Random(f"{self.seed} {prompt}").gauss(0, 1))
        try:
            if self._desk is None:
                await anyio.sleep(seconds)
            else:
                async with self._desk:
                    await anyio.sleep(seconds)
        finally:
            self.running -= 1
        await anyio.sleep(self.round_trip / 2)
        self.answered[prompt] += 1
        return 200, headers, None

    def _take(self) -> float | None:
        if not self.rate:
            return None
        now = anyio.current_time()
        if self.headers == "window":
            # A fixed window of 60 seconds: all of it may be used at once.
            if self._at is None or now >= self._at + 60:
                self._at, self._level = now if self._at is None else self._at + 60, self.rate * 60
            if self._level < 1:
                return self._at + 60 - now
            self._level -= 1
            return None
        if self._at is not None:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        if self._level < 1:
            return (1 - self._level) / self.rate
        self._level -= 1
        return None

    def _announce(self) -> dict[str, str]:
        full = (self.burst - self._level) / self.rate
        if self.headers == "window":
            assert self._at is not None
            limit, full = self.rate * 60, self._at + 60 - anyio.current_time()
        else:
            limit = self.burst if self.headers == "capacity" else self.rate * 60
        headers = {
            "x-ratelimit-limit-requests": f"{limit:.0f}",
            "x-ratelimit-remaining-requests": f"{int(self._level)}",
        }
        if self.tells_reset:
            headers["x-ratelimit-reset-requests"] = f"{full * 1000:.0f}ms"
        return headers


@dataclass
class Report:
    """What ``send_all()`` saw."""

    seconds: float
    lost: int
    requests: int
    refused: int
    peak: int
    limits: list[int]
    throttled_seconds: float

    def refused_share(self, prompts: int) -> float:
        return self.refused / prompts


async def send_all(
    provider: SimulatedProvider,
    prompts: int,
    *,
    settings: PromptSettings | None = None,
    concurrency: int | ConcurrencyBounds | None = None,
    throttle: Throttle | None = None,
    tasks: int = 520,
    attempts: int = 6,
) -> Report:
    """Send so many prompts through a throttle, each until it is answered or refused too often."""
    settings = settings or PromptSettings()
    throttle = throttle or Throttle("simulated", settings)
    slots = throttle.slots(concurrency if concurrency is not None else settings.concurrency)
    numbers: Iterator[int] = iter(range(prompts))
    chance = random.Random(provider.seed)
    lost = 0
    limits: list[int] = []
    requests, refused = provider.requests, provider.refused

    async def one(prompt: int) -> bool:
        for attempt in range(attempts):
            if not slots.acquire_nowait(1):
                await slots.acquire(1, first=attempt > 0)
            granted = slots.acquired_at
            stir()
            await provider.delay()
            began = anyio.current_time()
            status, headers, retry_after = await provider.answer(prompt)
            if provider.headers:
                throttle.observe(status, headers, anyio.current_time() - began)
            limits.append(slots.limit)
            seconds = anyio.current_time() - granted
            if status == 200:
                slots.release(Outcome("ok"), granted)
                return True
            slots.release(Outcome("throttled", retry_after=retry_after, seconds=seconds))
            await anyio.sleep(retry_after or (chance.uniform(*WAIT_REFUSED) if attempt else 0))
        return False

    running = 0

    def stir() -> None:
        # As map() does it: one prompt more than there are slots, so that an adaptive limit can grow.
        nonlocal running
        while running < min(tasks, slots.wanted):
            prompt = next(numbers, None)
            if prompt is None:
                break
            running += 1
            group.start_soon(work, prompt)

    async def work(prompt: int) -> None:
        nonlocal lost, running
        if not await one(prompt):
            lost += 1
        running -= 1
        stir()

    began = anyio.current_time()
    async with anyio.create_task_group() as group:
        stir()
    seconds = anyio.current_time() - began
    assert slots.in_use == 0
    return Report(
        seconds,
        lost,
        provider.requests - requests,
        provider.refused - refused,
        provider.peak,
        limits,
        slots.throttled_seconds,
    )

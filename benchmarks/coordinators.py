"""``python -m benchmarks.coordinators``: a hundred coordinators share a provider's limit, on a virtual clock.

Beyond what one process that has the rows can do, each part of a table has a coordinator of its own, and they
know nothing of each other. Each runs the throttle's own code; the provider and the network are simulated,
time jumps. Compared are the ways to share the limit. Told is the time as a multiple of the ideal one (all
prompts, at the provider's rate, and one answer), the share of the requests that were refused, and how many
prompts were given up.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import anyio

from datasette_llm.pace.policy import PromptSettings, RateLimit
from datasette_llm.pace.throttle import Throttle
from tests.simulated_provider import SimulatedProvider, send_all

if TYPE_CHECKING:
    from collections.abc import Iterator

LATENCY = 1.0
#: Of the limit; the rest is for clocks that differ.
SHARED = 0.98
#: Parts for each coordinator, where they are taken from a queue.
PARTS = 10


@dataclass(frozen=True)
class Way:
    """How coordinators share a limit.

    Args:
        title: what it is called.
        split: whether each is configured with its part of the limit.
        uneven: how much the parts of the table differ in size: 0.75 is from a quarter to seven quarters.
        parts: of the table, for each coordinator; with more than one they take the next part when they are
            done with one.
    """

    title: str
    split: bool = True
    uneven: float = 0.0
    parts: int = 1


WAYS = (
    Way("a part of the limit each"),
    Way("the same, parts of a quarter to seven quarters", uneven=0.75),
    Way(f"the same, {PARTS} such parts each, from a queue", uneven=0.75, parts=PARTS),
    Way("nothing configured: each finds out", split=False),
)


@dataclass(frozen=True)
class Shared:
    """What came of one way."""

    seconds: float
    ideal: float
    refused: float
    lost: int


def parts_of(prompts: int, count: int, uneven: float) -> list[int]:
    """Return so many sizes that add up to all prompts."""
    random = Random(1)
    weights = [1 + uneven * random.uniform(-1, 1) for _ in range(count)]
    ends = [round(prompts * sum(weights[: n + 1]) / sum(weights)) for n in range(count)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


async def share(way: Way, coordinators: int, prompts: int, rate: float) -> Shared:
    """Run all coordinators against one provider.

    Args:
        way: how they share its limit.
        coordinators: how many there are.
        prompts: of all of them.
        rate: requests a second that the provider allows.
    """
    provider = SimulatedProvider(rate=rate, burst=rate, latency=LATENCY, sigma=0.3)
    limit = RateLimit(requests_per_minute=int(rate * 60 * SHARED / coordinators)) if way.split else None
    parts: Iterator[int] = iter(parts_of(prompts, coordinators * way.parts, way.uneven))
    lost = 0

    async def coordinate(throttle: Throttle) -> None:
        nonlocal lost
        for size in parts:
            report = await send_all(provider, size, settings=settings, throttle=throttle)
            lost += report.lost
            if way.parts == 1:
                return

    settings = PromptSettings(rate_limit=limit)
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        for _ in range(coordinators):
            throttle = Throttle("simulated", settings)
            # One begins the next part while the last answers of another are still under way.
            for _ in range(min(way.parts, 2)):
                tasks.start_soon(coordinate, throttle)
    return Shared(
        anyio.current_time() - began,
        prompts / rate + LATENCY,
        provider.refused / provider.requests,
        lost,
    )


def main() -> None:
    """Simulate each way, and print a table."""
    import trio.testing

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinators", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=30_000)
    parser.add_argument("--rate", type=float, default=1000.0)
    options = parser.parse_args()
    print("how the limit is shared | time / ideal | refused | given up | computed in s")
    for way in WAYS:
        began = time.perf_counter()
        told = trio.run(
            partial(share, way, options.coordinators, options.prompts, options.rate),
            clock=trio.testing.MockClock(autojump_threshold=0),
        )
        print(
            f"{way.title} | {told.seconds / told.ideal:.2f} | {told.refused:.2%} | {told.lost} | "
            f"{time.perf_counter() - began:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

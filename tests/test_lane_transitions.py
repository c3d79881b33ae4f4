"""Every transition between the states of a lane that docs/operations.md lists, and no other; virtual time."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

from datasette_llm.pace.outcome import Outcome, Trouble
from datasette_llm.pace.policy import ConcurrencyBounds, Patience, PromptSettings
from datasette_llm.pace.state import state_of
from datasette_llm.pace.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ANSWERED = Outcome("ok")
NOBODY = Outcome(
    "transient", trouble=Trouble("the connection is refused", ConnectionRefusedError()), answered=False
)
PAGE = Path(__file__).parent.parent / "docs" / "operations.md"


def refused(seconds: float) -> Outcome:
    return Outcome("throttled", retry_after=seconds)


def listed() -> list[tuple[str, str]]:
    """Return the transitions of the page's table, in its order."""
    rows = PAGE.read_text(encoding="utf-8").partition("| From, to |")[2].splitlines()[2:]
    pairs = []
    for row in rows:
        if not row.startswith("|"):
            break
        before, after = row.split("|")[1].strip().split(", ")
        pairs += [(each, after) for each in before.split(" or ")]
    return pairs


class Calls:
    """Calls through a throttle, and the states that its lane was in."""

    def __init__(self, limit: int = 4) -> None:
        self.throttle = Throttle("m", PromptSettings())
        self.slots = self.throttle.slots(
            ConcurrencyBounds(start=limit, max=limit), patience=Patience(3600, together=True)
        )
        self.out: list[float] = []
        self.states: list[str] = []
        self.look()

    def look(self) -> None:
        state = state_of(self.throttle).condition
        if not self.states or self.states[-1] != state:
            self.states.append(state)

    async def send(self, number: int = 1) -> None:
        for _ in range(number):
            await self.slots.acquire()
            self.out.append(self.slots.acquired_at)
            self.look()

    def end(self, outcome: Outcome, number: int = 1) -> None:
        for _ in range(number):
            self.slots.release(outcome, self.out.pop(0), object())
            self.look()

    async def call(self, outcome: Outcome, number: int = 1) -> None:
        for _ in range(number):
            await self.send()
            await anyio.sleep(0.5)
            self.end(outcome)


async def cools_down(calls: Calls) -> None:
    await calls.call(refused(3))


async def cools_down_and_goes_on(calls: Calls) -> None:
    await calls.call(refused(3))
    await calls.call(ANSWERED)


async def goes_away(calls: Calls) -> None:
    await calls.call(NOBODY, 4)


async def goes_away_while_it_cools_down(calls: Calls) -> None:
    await calls.send(4)
    await anyio.sleep(1)
    calls.end(refused(30))
    calls.end(NOBODY, 2)
    await anyio.sleep(2)
    calls.end(NOBODY)


async def comes_back(calls: Calls) -> None:
    await goes_away(calls)
    await calls.call(ANSWERED)


async def is_open_again(calls: Calls) -> None:
    await comes_back(calls)
    await calls.call(ANSWERED)


async def refuses_when_it_is_back(calls: Calls) -> None:
    await comes_back(calls)
    await calls.call(refused(5))


async def goes_away_again(calls: Calls) -> None:
    await comes_back(calls)
    await calls.call(NOBODY, 2)


#: What leads to a transition.
REACHED: dict[tuple[str, str], Callable[[Calls], Awaitable[None]]] = {
    ("open", "cooling down"): cools_down,
    ("cooling down", "open"): cools_down_and_goes_on,
    ("open", "away"): goes_away,
    ("cooling down", "away"): goes_away_while_it_cools_down,
    ("away", "returning"): comes_back,
    ("returning", "open"): is_open_again,
    ("returning", "cooling down"): refuses_when_it_is_back,
    ("returning", "away"): goes_away_again,
}


@pytest.mark.parametrize("transition", REACHED, ids=" -> ".join)
async def test_a_transition_is_reached(transition: tuple[str, str]) -> None:
    calls = Calls()
    await REACHED[transition](calls)
    assert tuple(calls.states[-2:]) == transition


def test_the_page_lists_each_transition_once() -> None:
    assert sorted(listed()) == sorted(REACHED)


@pytest.mark.parametrize("limit", [1, 2, 12])
async def test_whatever_happens_no_other_transition_is_seen(limit: int) -> None:
    chance = random.Random(limit)
    calls = Calls(limit)
    outcomes = [ANSWERED, NOBODY, refused(0.0), refused(4.0), Outcome("failed"), Outcome("cancelled")]
    for _ in range(150):
        # Weather stays for a while.
        outcome = chance.choice(outcomes)
        for _ in range(chance.randrange(1, 15)):
            calls.look()
            if len(calls.out) < limit and chance.random() < 0.6:
                with anyio.move_on_after(chance.choice([0.1, 40.0])):
                    await calls.send()
            elif calls.out:
                calls.end(outcome)
            await anyio.sleep(chance.choice([0.0, 0.1, 2.0]))
    assert len(calls.states) > 30
    assert set(pairwise(calls.states)) <= set(REACHED)

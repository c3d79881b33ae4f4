"""How things stand for one provider key and model, at one moment: for whoever shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .outage import Away
    from .throttle import Throttle

Condition = Literal["open", "cooling down", "away", "returning"]


@dataclass(frozen=True, slots=True)
class LaneState:
    """All prompts of one key and model on one event loop, at one moment.

    Attributes:
        condition: as docs/operations.md describes them.
        limit: how many calls may be in flight now.
        in_flight: how many are.
        waiting: how many wait for their turn.
        cooldown_seconds: how long the provider's last refusal still keeps everybody waiting.
        rates: requests a second that are let through, by where that is known from: ``configured``,
            ``announced`` by the provider, ``found`` from its refusals.
        away: since when the provider cannot be reached, if it cannot.
    """

    condition: Condition
    limit: int
    in_flight: int
    waiting: int
    cooldown_seconds: float
    rates: dict[str, float]
    away: Away | None


def state_of(throttle: Throttle) -> LaneState:
    """Return how things stand. Changes nothing, so any thread may ask."""
    cooldown = throttle.cooldown_seconds()
    outage = throttle.outage
    condition: Condition = "open"
    if outage.active:
        condition = "away"
    elif outage.room < math.inf:
        condition = "returning"
    elif cooldown > 0:
        condition = "cooling down"
    lanes = throttle.lanes
    busy = [lane for lane in lanes if lane.in_use or lane.waiting] or lanes[-1:]
    return LaneState(
        condition=condition,
        limit=sum(lane.limit for lane in busy),
        in_flight=throttle.in_use,
        waiting=throttle.waiting,
        cooldown_seconds=cooldown,
        rates=throttle.rates(),
        away=throttle.away_now(),
    )

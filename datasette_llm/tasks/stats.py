"""What a group tells about itself while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..calls.remote.fleet import Figures
    from ..pace.outage import Away


@dataclass(frozen=True, slots=True)
class GroupStats:
    """A group at one moment.

    Attributes:
        waiting: prompts asked for whose model call does not run yet.
        running: prompts whose model call runs, or that still settle.
        succeeded: prompts that ended with an answer.
        failed: prompts that ended with an error.
        cancelled: prompts that were cancelled.
        retries: model calls made again after a transient failure.
        throttled_seconds: how long prompts waited because of the provider's limits, all added up.
        input_tokens: tokens sent by the prompts that succeeded, as their models count them.
        output_tokens: tokens received, likewise.
        cooldown_seconds: how long the provider's last refusal still keeps everybody waiting.
        cost: what they cost in dollars; ``None`` if the price of none of them is known.
        unpriced: how many of them are not in ``cost``, since their price is not known.
        elapsed: seconds since the group began, up to its end.
        prompts_per_second: prompts that ended, per second of ``elapsed``.
        concurrency: how many model calls may run at once now.
        away: since when the provider cannot be reached, why, and when it is tried again; ``None`` if it can.
        workers: who makes the model calls, if not this process: how many each has in flight, how many it has
            made, how many workers were lost.
        quota_seconds: how long a quota that is used up is still sat out, or ``None``.
    """

    waiting: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    retries: int
    throttled_seconds: float
    input_tokens: int
    output_tokens: int
    elapsed: float
    prompts_per_second: float
    concurrency: int
    away: Away | None = None
    quota_seconds: float | None = None
    cost: float | None = None
    unpriced: int = 0
    cooldown_seconds: float = 0.0
    workers: Figures | None = None

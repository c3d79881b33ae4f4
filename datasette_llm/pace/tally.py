"""What happened in the last hour, by the minute: sixty small records, whatever happens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: How many minutes are kept.
MINUTES = 60


@dataclass(slots=True)
class Tally:
    """What was counted in some time.

    Attributes:
        answered: model calls that were answered.
        refused: those that the provider refused for its rate limit.
        failed: those that ended with any other error.
        cancelled: those that somebody here cancelled.
        retries: calls made again for the same answer.
        input_tokens: tokens sent by prompts that succeeded.
        output_tokens: tokens received, likewise.
        cost: what they cost in dollars, as far as their price is known.
        priced: how many prompts are in ``cost``.
        unpriced: how many are not, since nobody knows their price.
    """

    answered: int = 0
    refused: int = 0
    failed: int = 0
    cancelled: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    priced: int = 0
    unpriced: int = 0

    @property
    def requests(self) -> int:
        """How many model calls have ended."""
        return self.answered + self.refused + self.failed + self.cancelled

    def add(self, other: Tally) -> None:
        """Add what was counted in another time or place."""
        self.answered += other.answered
        self.refused += other.refused
        self.failed += other.failed
        self.cancelled += other.cancelled
        self.retries += other.retries
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cost += other.cost
        self.priced += other.priced
        self.unpriced += other.unpriced


class LastHour:
    """Counts what happens now, and forgets what happened more than an hour ago.

    Args:
        clock: the time in seconds, from wherever.
    """

    __slots__ = ("_clock", "_minutes")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        #: The minutes in which anything happened, the latest last.
        self._minutes: deque[tuple[int, Tally]] = deque(maxlen=MINUTES)

    def now(self) -> Tally:
        """Return the record of this minute, to be counted up."""
        minute = int(self._clock() // 60)
        minutes = self._minutes
        if not minutes or minutes[-1][0] != minute:
            minutes.append((minute, Tally()))
        return minutes[-1][1]

    def ended(self, kind: str) -> None:
        """Count a model call that ended in a way that ``Outcome.kind`` names."""
        tally = self.now()
        if kind == "ok":
            tally.answered += 1
        elif kind == "throttled":
            tally.refused += 1
        elif kind == "cancelled":
            tally.cancelled += 1
        else:
            tally.failed += 1

    def used(self, sent: int, received: int, cost: float | None) -> None:
        """Count what a prompt that succeeded has used: tokens, and dollars if they are known."""
        tally = self.now()
        tally.input_tokens += sent
        tally.output_tokens += received
        if cost is None:
            tally.unpriced += 1
        else:
            tally.priced += 1
            tally.cost += cost

    def minutes(self) -> dict[int, Tally]:
        """Return the records of the last sixty minutes, by how many minutes ago; not of quiet ones."""
        now = int(self._clock() // 60)
        return {now - minute: tally for minute, tally in list(self._minutes) if now - minute < MINUTES}

    def total(self) -> Tally:
        """Return what happened in all of them together."""
        total = Tally()
        for tally in self.minutes().values():
            total.add(tally)
        return total

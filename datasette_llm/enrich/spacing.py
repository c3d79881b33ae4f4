"""Spreads the rows of a job over the time that their answers take.

A hundred prompts that are sent together are answered together, by a provider that takes as long for
each. Whoever wants a page of Datasette at that moment waits until a hundred answers are taken in and
the next hundred prompts are sent. Sent one after the other they come back one after the other.

The gap between two is three quarters of what keeps the number in flight just full (Little's law: in
flight = rate x seconds per answer), so it costs next to no throughput and evens out again what a pause
of the event loop or of the provider has pushed together.
"""

from __future__ import annotations

SHARE_OF_EVEN_GAP = 0.75
# Between two prompts before the first answer, when nobody knows how long one takes.
FIRST_GAP_SECONDS = 0.004
# No timer is worth setting for less.
LEAST_SECONDS = 0.001
# Share of the newest answer in the average.
SMOOTHING = 0.1


class Spacing:
    """When the next prompt of a job is to be sent; times are in seconds on any one clock."""

    def __init__(self) -> None:
        self._answer_seconds: float | None = None
        self._next = 0.0

    def answered(self, seconds: float) -> None:
        """Take note of how long an answer took."""
        if self._answer_seconds is None:
            self._answer_seconds = seconds
        else:
            self._answer_seconds += SMOOTHING * (seconds - self._answer_seconds)

    def wait(self, now: float, limit: int) -> float:
        """Return how long to wait with the next prompt, which counts as sent then.

        Args:
            limit: how many prompts may be in flight.
        """
        if self._answer_seconds is None:
            gap = FIRST_GAP_SECONDS
        else:
            gap = SHARE_OF_EVEN_GAP * self._answer_seconds / limit
        # What was missed is not made up for: that would be the next burst.
        at = max(self._next, now)
        self._next = at + gap
        return at - now if at - now >= LEAST_SECONDS else 0.0

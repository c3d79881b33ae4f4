"""Spreads the rows of a job over the time that their answers take.

A hundred prompts that are sent together are answered together, by a provider that takes as long for
each. Whoever wants a page of Datasette at that moment waits until a hundred answers are taken in and
the next hundred prompts are sent. Sent one after the other they come back one after the other.

The gap between two is nine tenths of what keeps the number in flight just full (Little's law: in flight =
rate x seconds per answer), so it costs next to no throughput and evens out again what a pause of the
event loop or of the provider has pushed together. While that number is still being found out the gap is
half as long: an adaptive limit grows when more is wanted than it allows.
"""

from __future__ import annotations

SHARE_OF_EVEN_GAP = 0.9
SHARE_WHILE_GROWING = 0.5
# A limit that has not grown for so many answer times is taken for found.
GROWING_ANSWERS = 2.0
# Between two prompts before the first answer, when nobody knows how long one takes: of the first few more, so
# that a provider that takes four a second has refused one or two, and not sixteen, before the others wait.
FEW_PROMPTS, FEW_GAP_SECONDS, FIRST_GAP_SECONDS = 20, 0.012, 0.004
# One prompt in so many is no burst; and however slow the answers were, a provider that has become fast again
# is soon asked faster, even by a job with few prompts in flight.
MOST_SECONDS = 0.02
# No timer is worth setting for less.
LEAST_SECONDS = 0.001
# Share of the newest answer in the average: of answers that differ by half of their mean it is off by 7 %.
SMOOTHING = 0.03


class Spacing:
    """When the next prompt of a job is to be sent; times are in seconds on any one clock."""

    def __init__(self) -> None:
        self._answer_seconds: float | None = None
        self._next = 0.0
        self._sent = 0
        self._limit: int | None = None
        self._growing_until = 0.0

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
            self._sent += 1
            gap = FEW_GAP_SECONDS if self._sent < FEW_PROMPTS else FIRST_GAP_SECONDS
        else:
            if self._limit is not None and limit > self._limit:
                self._growing_until = now + GROWING_ANSWERS * self._answer_seconds
            share = SHARE_WHILE_GROWING if now < self._growing_until else SHARE_OF_EVEN_GAP
            gap = min(MOST_SECONDS, share * self._answer_seconds / limit)
        self._limit = limit
        # What was missed is not made up for: that would be the next burst.
        at = max(self._next, now)
        self._next = at + gap
        return at - now if at - now >= LEAST_SECONDS else 0.0

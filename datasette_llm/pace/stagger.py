"""A few requests in flight, let in one after the other: is it their number that is refused?

A provider that works on a few at a time, and one that lets in a few a second, both refuse who is sent beside
others. They differ in what they do with one that comes late, when the others are nearly answered: the former
refuses it as well. So after a refusal of few, each further one is sent that late.
"""

from __future__ import annotations

import math

#: So few in flight are the same number easily.
FEW_IN_FLIGHT = 8
#: How late a further one is sent, as a share of the time from one answer to the next.
LATE_SHARE = 0.9
#: The same in seconds, at most: a rate below one in that time is not told from a number. Where answers are
#: slow, letting them in one by one would cost more than that.
LATE_SECONDS = 2.0
#: Weight of an answer in the mean of what they take.
SMOOTHING = 0.2


class Stagger:
    """How many of a few may be in flight now.

    Attributes:
        let_in: that number.
        answer_seconds: what an answer takes, of late; 0 before the first.
    """

    __slots__ = ("_least", "_refused_at", "_sent_at", "_taken", "answer_seconds", "let_in")

    def __init__(self, least: int) -> None:
        self.let_in = self._least = least
        self.answer_seconds = 0.0
        self._sent_at = self._refused_at = -math.inf
        # The most that were in flight when one was sent that was answered, since the last refusal.
        self._taken = 0

    def sent(self, now: float) -> None:
        """A request is sent now."""
        self._sent_at = now

    def answered(self, now: float, seconds: float, beside: int) -> None:
        """A request was answered that had taken so many seconds, and was one of so many when it was sent."""
        weight = SMOOTHING if self.answer_seconds else 1.0
        self.answer_seconds += weight * (seconds - self.answer_seconds)
        if beside > self._taken and now - seconds >= self._refused_at:
            self._taken = beside

    def refused(self, now: float) -> None:
        """Everybody was refused for a while: begin with the least."""
        self.let_in = self._least
        self._taken, self._refused_at = 0, now

    def takes_more_than(self, number: float) -> bool:
        """Whether so few are not what was refused: more were taken together since the last refusal."""
        return number < FEW_IN_FLIGHT and self._taken > number

    def press(self, now: float) -> bool:
        """Somebody waits; return whether one more is let in."""
        if now < self.opens_at:
            return False
        self.let_in += 1
        return True

    @property
    def opens_at(self) -> float:
        """When one more is let in, if none is sent until then."""
        late = LATE_SHARE * self.answer_seconds / max(1, self.let_in)
        return self._sent_at + min(late, LATE_SECONDS)

    def room(self, limit: int, suspect: float | None) -> int:
        """Return how many may be in flight.

        Args:
            limit: how many may be at most.
            suspect: how many there were when one was refused; ``None`` if that is not the question.
        """
        few = suspect is not None and suspect < FEW_IN_FLIGHT
        self.let_in = min(self.let_in, limit) if few else limit
        return self.let_in

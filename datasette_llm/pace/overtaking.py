"""How many calls a server is seen to work on at once: who is answered before those that were sent earlier.

A server that queues takes its calls in the order they came. Whatever it has not begun yet cannot be answered
before what it has, so a call that overtakes five others shows that it works on six. Where answers scatter by
their length this tells it within a few of them, when their times tell nothing yet. Where all take equally
long nobody is overtaken; then times tell it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right

from .stagger import FEW_IN_FLIGHT

#: Calls that were sent within so many seconds of each other may arrive in another order.
SAME_MOMENT_SECONDS = 0.02
#: How many answers, at least, are looked back at.
WINDOW = 32


class Overtaking:
    """The calls of one lane that are out, in the order they were sent, and how many of them were overtaken.

    Attributes:
        shown: how many calls the server was seen to work on at once, of late.
    """

    __slots__ = ("_answers", "_before", "_beside", "_most", "_out", "shown")

    def __init__(self) -> None:
        self.shown = 0
        self._out: list[float] = []
        # How many were out when each was sent, itself included.
        self._beside: list[int] = []
        self._most = self._before = 0
        self._answers = 0

    def sent(self, now: float) -> None:
        """A call is sent now."""
        self._out.append(now)
        self._beside.append(len(self._out))

    def ended(self, sent: float, *, answered: bool, crossed_since: float = math.inf) -> int:
        """A call has ended that was sent at that moment; return how many were out then.

        Args:
            answered: whether it was worked on to the end.
            crossed_since: those that were sent later crossed its answer on their way.
        """
        out = self._out
        place = bisect_left(out, sent)
        if place == len(out) or out[place] != sent:
            # Nobody knows which one it was.
            if not out:
                return 1
            place = max(0, place - 1)
        del out[place]
        beside = self._beside.pop(place)
        if not answered:
            # It was never worked on, or not to the end: the others were not beside it.
            for later in range(place, len(out)):
                self._beside[later] -= 1
            return beside
        if len(out) < FEW_IN_FLIGHT:
            # Of many, one more or less tells nothing.
            for later in range(bisect_right(out, crossed_since), len(out)):
                self._beside[later] -= 1
        overtaken = bisect_left(out, sent - SAME_MOMENT_SECONDS, hi=place)
        self._answers += 1
        self._most = max(self._most, overtaken + 1 if overtaken else 0)
        self.shown = max(self._before, self._most)
        if self._answers >= max(WINDOW, self.shown):
            self._before, self._most, self._answers = self._most, 0, 0
        return beside

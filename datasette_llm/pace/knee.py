"""How many calls keep a server busy that queues what it cannot work on.

Such a server refuses nothing: with more in flight than it works on, each only waits longer. By Little's law
it works on as many as it answers in a second, times the seconds an answer takes without a queue. That is
the knee, and the number in flight is held a little above it, as TCP's BBR does.

Two signs of a queue:

* *from the beginning*: the first answers come one by one, as far apart as the first one took (or half, a
  third, a quarter of it): whatever is in flight, so few are worked on;
* *while growing*: twice as many in flight do not give more answers a second, each only takes longer.

A knee that was found may be none, or no longer: answers scatter, and change with the prompts. So a few more
are let in now and then, which costs nothing, and if they are answered in the same time the number rises.
"""

from __future__ import annotations

import math
from collections import deque

#: In flight per call that is worked on, and besides: for so few that the latter counts most, and for more.
FEW, MORE = (2.0, 4.0), (1.25, 2.0)
#: Fewer worked on than these are seen from the beginning.
SEEN_AT_ONCE = 5.0
#: Answers that tell it, at least and at most.
FIRST, FIRST_MOST = 2, 12
#: Answers may come in waves, so it takes so many times more to take that back; and with the last of them.
SURELY = (1.5, 1.15)
#: Answers that a rate is measured from, at least and at most.
WINDOW, MOST_RECENT = 32, 512
#: After so many windows more are let in, at first and at most, so many more; and how much higher the rate
#: must be then. If it is, twice as many may be in flight; if not, fewer again.
HOLD, HOLD_MOST = 1, 16
PROBE, WORTHWHILE, WIDER, BACK = 1.4, 1.2, 2.0, 0.8
#: A call that was given up had waited in line, if an answer meanwhile took such a share of its time.
CROWDED = 0.3
#: From then on no more are in flight than are answered in this share of the time that calls are waited for.
IN_TIME = 0.75
#: Answers that take so much longer than the first few did are a warning.
SOME, SLOWER = 8, 1.5


class Knee:
    """Follow the knee of a server that queues.

    Attributes:
        cap: how many may be in flight because of it; ``inf`` while no queue is seen.
    """

    def __init__(self) -> None:
        self.cap = math.inf
        self._answers = 0
        self._first_at = self._first_seconds = 0.0
        self._some_seconds = 0.0
        # What an answer takes without a queue, and what it took when that was seen first.
        self._alone = self._least = 0.0
        self._gain = FEW
        self._recent: deque[tuple[float, float]] = deque(maxlen=MOST_RECENT)
        self._since = 0
        self._hold = HOLD
        # After how long a call was given up that had waited in line.
        self._patience = math.inf
        # The rate before more were let in, while they are.
        self._before: float | None = None

    @property
    def slower(self) -> bool:
        """Whether answers take longer than they did at first."""
        if self._answers <= SOME:
            return False
        return sum(self._recent[-number][1] for number in range(1, SOME + 1)) > SLOWER * self._some_seconds

    def is_crowded(self, now: float, seconds: float) -> bool:
        """Whether a call that was given up after so many seconds had waited in line, as others had."""
        for answered, took in reversed(self._recent):
            if answered <= now - seconds:
                break
            if took > CROWDED * seconds:
                return True
        return False

    def given_up(self, seconds: float, limit: float) -> None:
        """A call was given up that had waited in line.

        Args:
            seconds: how long.
            limit: how many may be in flight from now on, for a while.
        """
        self._patience = seconds
        if not self._alone:
            self._alone = self._least = min(took for _, took in self._recent)
        self.cap = min(self.cap, limit)

    def answered(self, now: float, seconds: float) -> None:
        """A call was answered that had taken so many seconds."""
        self._answers += 1
        self._since += 1
        self._recent.append((now, seconds))
        if self._answers <= SOME:
            self._some_seconds += seconds
        if self._answers == 1:
            self._first_at, self._first_seconds = now, seconds
        elif FIRST <= self._answers <= FIRST_MOST:
            self._look_at_first(now)
        elif self.cap < math.inf:
            self._follow(now)

    def found(self, seconds: float, limit: float) -> None:
        """More in flight did not give more answers a second.

        Args:
            seconds: what an answer took with fewer in flight.
            limit: how many may be in flight for that.
        """
        self._alone = self._least = seconds
        self._gain = MORE
        self._begin_hold(HOLD)
        self.cap = limit

    def _look_at_first(self, now: float) -> None:
        gap = (now - self._first_at) / (self._answers - 1)
        few = SEEN_AT_ONCE if self._answers > FIRST else 0.5 * SEEN_AT_ONCE
        if gap * few > self._first_seconds:
            self._alone = self._least = self._first_seconds
            self._gain = FEW
            self._begin_hold(HOLD)
            self._follow(now)
        elif self.cap < math.inf and gap * few * SURELY[self._answers == FIRST_MOST] < self._first_seconds:
            # They were only the quickest of many.
            self.cap = math.inf

    def _begin_hold(self, windows: int) -> None:
        self._hold = windows
        self._since = 0
        self._before = None

    def _follow(self, now: float) -> None:
        # Twice as many as are in flight: they may come in waves.
        window = int(min(max(WINDOW, 2 * self.cap), MOST_RECENT))
        number = min(len(self._recent), window)
        seconds = now - self._recent[-number][0]
        if seconds <= 0 or (number < window and self._gain is MORE):
            return
        rate = (number - 1) / seconds
        times, besides = self._gain
        if self._before is None:
            self.cap = times * rate * self._alone + besides
            if self._since >= self._hold * window:
                self._before, self._since = rate, 0
                self.cap *= PROBE
        elif self._since >= self.cap + window:
            if rate > WORTHWHILE * self._before:
                self._alone = max(self._alone, (WIDER * self.cap - besides) / (times * rate))
                self._begin_hold(1)
            else:
                self._alone = max(self._least, BACK * self._alone)
                self._begin_hold(min(2 * self._hold, HOLD_MOST))
        self.cap = min(self.cap, max(1.0, IN_TIME * self._patience * rate))

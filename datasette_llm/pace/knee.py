"""How many calls keep a server busy that queues what it cannot work on.

Such a server refuses nothing: with more in flight than it works on, each only waits longer. By Little's law
it works on as many as it answers in a second, times the seconds an answer takes without a queue. That is
the knee, and the number in flight is held a little above it, as TCP's BBR does.

Signs of a queue:

* *from the beginning*: the first answers come one by one, as far apart as the first one took (or half, a
  third, a quarter of it): whatever is in flight, so few are worked on;
* *soon after*: answers take longer than the first few did.
* *while growing*: twice as many in flight do not give more answers a second, each only takes longer.

Times alone deceive where answers scatter by their length: the first to come are the shortest of many. There
``overtaking`` tells how many are worked on, and no sign counts against it.

A knee that was found may be none, or no longer: answers change with the prompts. So a few more are let in
now and then, which costs nothing, and if they are answered in the same time the number rises.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .overtaking import Overtaking

#: In flight per call that is worked on, and besides: for so few that the latter counts most, and for more.
FEW, MORE = (2.0, 4.0), (1.25, 2.0)
#: Fewer worked on than these are seen from the beginning.
SEEN_AT_ONCE = 5.0
#: Seconds over which the first requests are spread.
SPREAD_SECONDS = 0.2
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
#: Of the calls that are worked on, one overtakes no more than a share: so many times more are at work, in
#: simulations with answers that scatter by a half.
AT_WORK = 1.4
#: The first few answers, that later ones are compared with; and what of those is their share of the average.
SOME, SMOOTHING = 8, 1 / 8
#: Answers that take hardly longer than the first few did take none longer.
HARDLY = 1.15
#: So many answers after the first few a queue is seen in that they take so many times longer.
SURE, LONGER = 8, 1.5


class Knee:
    """Follow the knee of a server that queues.

    Attributes:
        cap: how many may be in flight because of it; ``inf`` while no queue is seen.
    """

    def __init__(self, overtaking: Overtaking) -> None:
        self.cap = math.inf
        self._overtaking = overtaking
        self._answers = 0
        self._first_at = self._first_seconds = 0.0
        # What the first few answers took, what those of late took, and how many were out beside these.
        self._some_seconds = self._lately = self._beside = 0.0
        self._most_seen = self._most_unhindered = 0.0
        # What an answer takes without a queue, and what it took when that was seen first.
        self._alone = self._least = 0.0
        self._gain = FEW
        # How many are worked on, by Little's law.
        self._at_work = math.inf
        self._recent: deque[tuple[float, float]] = deque(maxlen=MOST_RECENT)
        self._since = self._in_a_row = 0
        self._hold = HOLD
        # After how long a call was given up that had waited in line.
        self._patience = math.inf
        # The rate before more were let in, while they are.
        self._before: float | None = None

    @property
    def worked_on(self) -> float:
        """How many calls it was seen to work on at once: of those in flight, as many as did not wait."""
        return max(self._most_seen, self.unhindered)

    @property
    def unhindered(self) -> float:
        """The same, while nothing shows that any had to wait."""
        return max(self._most_unhindered, self._overtaking.shown)

    @property
    def without_line(self) -> float:
        """How many may be in flight so that the server has enough to do, and no line before it."""
        seen = max(self._most_seen, self._most_unhindered)
        if self._gain is FEW:
            # The first few answers had waited for each other: what they took tells too little.
            seen = min(seen, self._at_work)
        return max(seen, AT_WORK * self._overtaking.shown)

    @property
    def shown(self) -> float:
        """How many may be in flight because that many are seen to be worked on."""
        times, besides = FEW
        shown = self._overtaking.shown
        return times * shown + besides if shown else 0.0

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

    def answered(
        self,
        now: float,
        seconds: float,
        beside: int,
        limit: float,
        *,
        grows: bool,
        held: bool,
        used: bool = True,
    ) -> None:
        """A call was answered that had taken so many seconds.

        Args:
            beside: how many were in flight when it was sent, itself included.
            limit: how many may be now.
            grows: whether that has grown by what answers have shown.
            held: whether fewer are let in for another reason, so that more cannot be tried.
            used: whether as many are in flight as may be; else the answers are those that were asked for.
        """
        self._recent.append((now, seconds))
        if not used:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._answers += 1
        self._since += 1
        if self._answers <= SOME:
            self._some_seconds += seconds
        share = max(SMOOTHING, 1 / self._answers)
        self._lately += share * (seconds - self._lately)
        self._beside += share * (beside - self._beside)
        at_first = self._some_seconds / min(self._answers, SOME)
        # No more than were answered can have been seen.
        seen = min(beside, self._answers)
        if self._lately <= HARDLY * at_first:
            self._most_unhindered = max(self._most_unhindered, seen)
        else:
            self._most_seen = max(self._most_seen, seen * min(1.0, at_first / self._lately))
        if self.cap == math.inf and self._answers >= SOME + SURE and self._lately > LONGER * at_first:
            times, besides = FEW
            fewer = max(times * self._beside * at_first / self._lately + besides, self.shown)
            # An answer tells of when its call was sent; what has grown since is ahead of it.
            if fewer < (self._beside if grows else limit):
                self.found(at_first, fewer)
        if self._answers == 1:
            self._first_at, self._first_seconds = now, seconds
        elif FIRST <= self._answers <= FIRST_MOST:
            self._look_at_first(now, seconds)
        elif self.cap < math.inf:
            self._follow(now, held=held)

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

    def _look_at_first(self, now: float, seconds: float) -> None:
        later = now - self._first_at
        if now - seconds <= self._first_at + max(0.0, SPREAD_SECONDS - self._first_seconds):
            # The first requests are sent one after the other, and are answered so where none waits.
            later = min(later, max(0.0, seconds - self._first_seconds))
        gap = later / (self._answers - 1)
        few = SEEN_AT_ONCE if self._answers > FIRST else 0.5 * SEEN_AT_ONCE
        if gap * few > self._first_seconds:
            self._alone = self._least = self._first_seconds
            self._gain = FEW
            self._begin_hold(HOLD)
            self._follow(now, held=False)
        elif self.cap < math.inf and gap * few * SURELY[self._answers == FIRST_MOST] < self._first_seconds:
            # They were only the quickest of many.
            self.cap = math.inf

    def _begin_hold(self, windows: int) -> None:
        self._hold = windows
        self._since = 0
        self._before = None

    def _follow(self, now: float, *, held: bool) -> None:
        # Twice as many as are in flight: they may come in waves.
        window = int(min(max(WINDOW, 2 * self.cap), MOST_RECENT))
        number = min(len(self._recent), window, self._in_a_row)
        seconds = now - self._recent[-number][0]
        if seconds <= 0 or (number < window and self._gain is MORE):
            return
        rate = (number - 1) / seconds
        times, besides = self._gain
        if held:
            self._begin_hold(self._hold)
        if self._before is None:
            self._at_work = rate * self._alone
            self.cap = max(times * self._at_work + besides, self.shown)
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

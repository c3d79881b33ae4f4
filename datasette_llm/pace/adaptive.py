"""How many requests may be in flight, when nobody has said so.

The limit starts at ``bounds.start`` and grows with time while it is used up and nothing is refused. It
grows by time, not by answers: a refusal comes back at once, an answer perhaps in half a minute. At first, and
after each pause, the room for requests reaches it within ``SPREAD_SECONDS`` only.

States:

* *fast*: doubles about every 0.4 s, as far as answers have proven (see ``UNPROVEN_FACTOR``).
* *slow*: a number at which the provider refuses, or gets slower, is known; it is tried again
  now and then, at longer and longer intervals.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .knee import SPREAD_SECONDS, Knee
from .overtaking import Overtaking
from .stagger import FEW_IN_FLIGHT, Stagger
from .throughput import ThroughputByLimit

if TYPE_CHECKING:
    from .policy import ConcurrencyBounds

#: The exponent of the fast growth, per second: doubles in 0.43 s.
FAST_GROWTH = 1.6
#: Seconds between two requests, at most, while they are spread over ``SPREAD_SECONDS``, at first and after a
#: pause: so a provider that takes few is heard before it has been asked by all of them.
GAP_SECONDS = 0.01
#: Until answers come, the limit grows to at most this many times its start: a server that queues instead
#: of refusing would otherwise be given 500 requests before it has answered the first.
UNPROVEN_FACTOR = 2
#: With answers it grows to at most this many times the number that was seen to be worked on: so fast up to
#: ``PROVEN_FEW``, and then more slowly.
PROVEN_FACTOR, PROVEN_FEW, PROVEN_FACTOR_MANY = 4.0, 200.0, 2.5
#: How much faster it grows, and without these bounds, when the pace follows what the provider announced.
ANNOUNCED_GROWTH = 5
#: Seconds without anybody waiting after which the limit counts as not used up: until then the next one may
#: only be on its way.
STILL_PRESSED_SECONDS = 0.03
#: The limit is about used up with this share of it in flight, or while somebody waits; and so many seconds
#: after that, since the next one may only be on its way. Else answers come as they are asked for, which does
#: not show what the server can do.
USED_SHARE, USED_SECONDS = 0.5, 1.0
#: Share to which the limit falls when a request was given up that had waited in line.
THINNED = 0.8
#: Share of a number in flight that was refused, to which the limit falls.
CUT = 0.9
#: Numbers in flight are the same that differ by no more than this share of them, and a half.
SAME_SHARE = 0.08
#: Refusals of single requests, at the same number in flight, that show that it is the reason.
SAME_NUMBER = 3
#: What was sent while an answer was on its way was not beside it: for a round trip, at most this share of
#: what an answer takes.
CROSSING_SHARE = 0.5
#: Refusals so many seconds apart belong together.
SAME_REFUSALS_SECONDS = 0.3
#: Seconds until a limit that is known is tried again, at first and at most.
RETRY_LIMIT_SECONDS, RETRY_LIMIT_SECONDS_MAX = 5.0, 60.0
#: So many seconds after somebody has asked who waits for the answer, no line is kept at a server that queues:
#: they would stand at its end, and ask again soon.
PEOPLE_SECONDS = 60.0
#: A few more than are worked on, to see whether these are as well.
A_FEW_MORE = 1.06
#: By what share it grows then. Each time that nobody is refused for it the next one is twice as large, up to
#: the latter: what was learnt in a bad minute is outdated as soon as it does not hold.
STEP, STEP_MAX = 0.05, 1.0


def _just_below(accepted: float) -> float:
    """Return a limit at which nobody is refused who would be beside so many others."""
    return 0.97 * accepted + (0.5 if accepted < FEW_IN_FLIGHT else 0.0)


class AdaptiveLimit:
    """The number of requests that may be in flight.

    Attributes:
        limit: that number.
        room: how many of these now, while they are spread.
    """

    def __init__(self, bounds: ConcurrencyBounds, now: float) -> None:
        self.bounds = bounds
        self.limit = max(bounds.min, min(bounds.start, bounds.max))
        self.room = bounds.min
        self._size = float(self.limit)
        # The share of the limit that is let in; less than 1 while requests are spread.
        self._opened = 0.0
        self._throughput = ThroughputByLimit(self._size, now)
        self.overtaking = Overtaking()
        self._knee = Knee(self.overtaking)
        # The limit before a knee was seen that may yet turn out to be none.
        self._without_knee = 0.0
        self._growth = FAST_GROWTH
        self._announced = False
        self._pressed_at: float | None = None
        self._relaxed_at: float | None = None
        self._suspect: float | None = None
        self._stagger = Stagger(bounds.min)
        # What a request and its refusal took together on their way.
        self._round_trip = 0.0
        self._alone_at = self._alone = self._alone_cut = 0
        self._alone_cut_at = -math.inf
        self._by_chance = False
        self._slow = False
        self._retry_at = 0.0
        self._retry_seconds = RETRY_LIMIT_SECONDS
        self._step = STEP
        # The number in flight that was found out last.
        self._known = 0.0
        self._trying_more = False
        self._more_answered = 0
        self._people_until = -math.inf
        # When the limit was known last to be about used up.
        self._used_at = -math.inf

    def sent(self, now: float) -> None:
        """A request is sent now."""
        self.overtaking.sent(now)
        self._stagger.sent(now)

    def ended(self, now: float, sent: float, *, answered: bool, refused: bool = False) -> int:
        """A request has ended, which was sent at that moment; return how many were in flight then."""
        if refused:
            self._round_trip = now - sent
        crossing = min(self._round_trip, CROSSING_SHARE * self._stagger.answer_seconds)
        return self.overtaking.ended(sent, answered=answered, crossed_since=now - crossing)

    def people_ask(self, now: float) -> None:
        """Somebody asks who waits for the answer: others form no line at the server for a while."""
        self._people_until = now + PEOPLE_SECONDS
        self._set_limit()

    def press(self, now: float) -> None:
        """Somebody waits because the limit is used up: let it grow by the time that went by so."""
        since, self._pressed_at = self._pressed_at, now
        if self._stagger.let_in < self.limit and self._stagger.press(now):
            self._set_limit()
        if self._opened < 1 and since is not None:
            self._opened = min(1.0, self._opened + (now - since) * self._opening_rate)
            self._set_limit()
        ceiling = self._ceiling()
        if since is None or self._size >= ceiling:
            return
        if self._relaxed_at is not None:
            if now - self._relaxed_at > STILL_PRESSED_SECONDS:
                since = now
            self._relaxed_at = None
        if not self._slow:
            # Capped, since one long wait says no more than a short one.
            self._resize(min(ceiling, self._size * math.exp(self._growth * min(now - since, 0.25))), now)
        elif now >= self._retry_at:
            grown = self._size + max(self._step / STEP, self._size * self._step)
            self._resize(min(ceiling, grown, 2 * self._size + 1), now)
            self._trying_more, self._more_answered = True, 0
            self._schedule_retry(now)

    def trust(self) -> None:
        """The pace follows limits that the provider announces: they protect it, this number need not."""
        if not self._announced:
            self._announced = True
            self._opened = 1.0
            self._set_limit()
            self._growth = ANNOUNCED_GROWTH * FAST_GROWTH

    def relax(self, now: float) -> None:
        """Nobody waits for the limit any more."""
        if self._relaxed_at is None:
            self._relaxed_at = now

    def next_growth(self, now: float) -> float:
        """Return when there will be room for one more, if it stays used up."""
        if self._stagger.let_in < self.limit:
            return max(now + 0.001, self._stagger.opens_at)
        if self._opened < 1:
            opened = (self.room - self.bounds.min + 1) / self.limit
            return now + max(0.001, (opened - self._opened) / self._opening_rate)
        if self._size >= self._ceiling():
            return math.inf
        if self._slow:
            return max(now, self._retry_at)
        return now + max(0.005, math.log((self.limit + 1) / self._size) / self._growth)

    @property
    def _opening_rate(self) -> float:
        """The share of the limit that is let in more, each second."""
        return max(1 / SPREAD_SECONDS, 1 / (GAP_SECONDS * self.limit))

    def answered(self, now: float, seconds: float, beside: int, *, waiting: bool = False) -> None:
        """A request was answered that had taken so many seconds.

        Args:
            beside: how many were in flight when it was sent, itself included.
            waiting: whether somebody waits for the limit.
        """
        if waiting or beside >= USED_SHARE * self.limit:
            self._used_at = now
        sent = now - seconds
        self._stagger.answered(now, seconds, beside)
        if self._trying_more and beside >= self.limit:
            self._more_answered += 1
            if self._more_answered >= max(2, self.limit):
                # More was accepted, so the limit is not where it was.
                self._trying_more = False
                self._step = min(2 * self._step, STEP_MAX)
                self._retry_seconds = RETRY_LIMIT_SECONDS
                self._schedule_retry(now)
        news = self._throughput.answered(sent, seconds)
        knee = self._knee
        held = now <= self._people_until
        if self._people_until > -math.inf:
            if not held:
                self._people_until = -math.inf
            self._set_limit()
        if news and not self._slow and knee.cap == math.inf:
            self._judge(now)
        grows = self._size > UNPROVEN_FACTOR * self.bounds.start
        used = now - self._used_at <= USED_SECONDS
        knee.answered(now, seconds, beside, self._size, grows=grows, held=held, used=used)
        if self._announced:
            return
        if knee.cap < self._size:
            self._without_knee = max(self._without_knee, self._size)
            self._resize(knee.cap, now)
        elif knee.cap == math.inf and self._without_knee:
            # There was none after all.
            self._resize(max(self._size, self._without_knee), now)
            self._without_knee = 0.0

    def given_up(self, now: float, seconds: float) -> bool:
        """A request was given up after so many seconds while others were answered.

        Returns:
            whether it had waited in line, as they did: then the limit falls.
        """
        if not self._knee.is_crowded(now, seconds):
            return False
        self._resize(self._size * THINNED, now)
        self._knee.given_up(seconds, self._size)
        self._slow = True
        self._failed_again(now)
        return True

    def refused(self, now: float, accepted: int) -> bool:
        """The provider refused a request while it was working on ``accepted`` others.

        Returns:
            whether it refuses for their number, as it seems: it did so at the same number before.
        """
        level = float(max(accepted, 1))
        suspect = None if self._stagger.takes_more_than(level) else self._suspect
        self._stagger.refused(now)
        # Where it worked on nothing, it did not refuse for the number.
        if accepted and suspect is not None and abs(level - suspect) <= SAME_SHARE * suspect + 0.5:
            self._suspect = min(level, suspect)
            # That others were refused with fewer was another time's.
            self._by_chance, self._alone_cut = False, 0
            self._resize(min(self._size, _just_below(self._suspect)), now)
            self._slow = True
            self._failed_again(now)
            return True
        self._slow = False
        if suspect is None or level > suspect:
            # The first time, or more than ever: perhaps that is how many it takes.
            self._resize(min(self._size, level * CUT), now)
        self._suspect = level
        if not self._announced:
            self._opened, self._pressed_at = 0.0, now
            self._set_limit()
        return False

    def refused_alone(self, now: float, accepted: int, *, paced: bool = False) -> bool:
        """One request was refused, and others were not: by chance, or because it was one too many.

        Args:
            accepted: how many others the provider was working on.
            paced: whether a rate was followed that was taken to be the reason of refusals before.

        Returns:
            whether that refutes the rate: it refused the same number before. The limit may fall without that.
        """
        if not accepted or self._stagger.takes_more_than(accepted):
            # Where it worked on nothing, or works on more, it did not refuse for the number.
            self._slow = False
            return False
        if self._by_chance or (accepted < 0.9 * self.limit - 2 and not self._trying_more):
            return False
        if self._alone_cut and accepted < 0.96 * self._alone_cut - 1:
            if now - self._alone_cut_at < SAME_REFUSALS_SECONDS:
                # Others were refused at the same moment, and had been counted.
                self._cut_alone(now, accepted)
                return False
            # With fewer it happens too, so it is not for their number.
            self._by_chance = True
            self._slow = False
            return False
        alike = 1 + 0.03 * accepted
        if abs(accepted - self._alone_at) > alike:
            self._alone_at, self._alone = accepted, 0
        self._alone += 1
        # Where a pace holds back, as many as may be are in flight for once: that is no chance.
        suspect = self._suspect if paced and accepted >= max(FEW_IN_FLIGHT, 0.94 * self.limit - 1) else None
        again = suspect is not None and abs(accepted - suspect) <= alike
        if self._alone < SAME_NUMBER and not again:
            return False
        self._cut_alone(now, accepted)
        return again

    def _cut_alone(self, now: float, accepted: int) -> None:
        self._alone = 0
        self._alone_cut, self._alone_cut_at = accepted, now
        self._resize(min(self._size, _just_below(accepted)), now)
        self._slow = True
        self._failed_again(now)

    def _ceiling(self) -> float:
        if self._announced:
            return float(self.bounds.max)
        knee = self._knee
        proven = max(
            UNPROVEN_FACTOR * self.bounds.start,
            min(PROVEN_FACTOR * knee.unhindered, PROVEN_FEW),
            PROVEN_FACTOR_MANY * knee.worked_on,
        )
        return float(min(self.bounds.max, proven, max(self._knee.cap, self.bounds.min)))

    def _resize(self, size: float, now: float) -> None:
        self._size = max(float(self.bounds.min), min(float(self.bounds.max), size))
        self._set_limit()
        self._throughput.resized(self._size, now)

    def _set_limit(self) -> None:
        self.limit = int(self._size)
        knee = self._knee
        if self._people_until > -math.inf and knee.cap < math.inf:
            self.limit = max(self.bounds.min, min(self.limit, round(A_FEW_MORE * knee.without_line)))
        self.room = min(self.limit, self.bounds.min + int(self.limit * self._opened))
        self.room = min(self.room, self._stagger.room(self.limit, None if self._announced else self._suspect))

    def _failed_again(self, now: float) -> None:
        """The limit that is known held: try it again later, and with one more."""
        if abs(self._size - self._known) > SAME_SHARE * self._known + 0.5:
            # It is another one: how often the one before was tried tells nothing of it.
            self._known = self._size
            self._retry_seconds = RETRY_LIMIT_SECONDS
        self._trying_more = False
        self._step = STEP
        self._schedule_retry(now)

    def _schedule_retry(self, now: float) -> None:
        self._retry_at = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, RETRY_LIMIT_SECONDS_MAX)

    def _judge(self, now: float) -> None:
        """Stop growing where more in flight only made each answer slower."""
        in_vain = self._throughput.in_vain()
        if in_vain is None:
            return
        throughput, took = in_vain
        # As many as keep it busy at this throughput, were each answered as fast as before.
        size = max(throughput * took * 1.1, self._knee.shown)
        if size < self._size:
            self._resize(size, now)
            self._knee.found(took, size)

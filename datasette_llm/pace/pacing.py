"""How many requests a second: token buckets, for limits that are configured or found out.

A ``Bucket`` is filled at a rate and holds at most its capacity; a request may start when it holds
enough. ``FoundRate`` learns such a bucket's rate from nothing but refusals. Limits that a provider
announces in headers are in ``announced``. All times are the event loop's, in seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .policy import RateLimit

#: A configured limit is spread evenly, but for this many seconds' worth: providers who say "per
#: minute" also refuse a minute's worth at once.
BURST_SECONDS = 1.0
#: Answers differ in length, so tokens get more slack than requests.
TOKEN_BURST_SECONDS = 6.0

#: How much of what was measured is used: the rest pays for the clock's and the network's jitter.
SAFETY = 0.99
#: Part of a known reserve at the provider that is used up on purpose.
RESERVE_USED = 0.8
#: A rate that so many requests show at least is measured.
ENOUGH_COUNTED = 3
#: A refusal contradicts it that comes at less than this share of what was accepted before.
CONTRADICTS = 0.9
#: What is accepted within so many seconds before the first refusal ever is about what the bucket holds.
AT_FIRST_SECONDS = 1.0
#: How late a busy machine may be: what was not sent in that time is made up for.
LATE_SECONDS = 0.1
#: Refusals of single requests that contradict the rate, after which it is given up.
UNEXPLAINED = 3
#: After so many seconds without a refusal the rate is tried upward, and by this share a second at first. Each
#: refusal that says the same rate again doubles them, up to the latter.
PROBE_AFTER_SECONDS, PROBE_AFTER_SECONDS_MAX = 4.0, 60.0
PROBE_GROWTH = 0.01
PROBE_DOUBLING_SECONDS = 6.0
PROBE_GROWTH_MAX = 0.15
#: Times as much at once, at most: of a rate below one a second little is heard for long.
PROBE_FACTOR_MAX = 1.5
#: Doublings that are more than enough for that: nobody may have asked for days, and floats have their bounds.
PROBE_DOUBLINGS_MAX = 8.0
#: The same for a rate that is only guessed: the sooner it is refused, the sooner it is measured.
GUESS_AFTER_SECONDS, GUESS_GROWTH = 0.5, 0.5


class Bucket:
    """A reserve that fills at ``rate`` a second up to ``capacity``; taking may leave a debt."""

    __slots__ = ("at", "capacity", "level", "rate")

    def __init__(self, rate: float, capacity: float, level: float, now: float) -> None:
        self.rate = rate
        self.capacity = capacity
        self.level = level
        self.at = now

    def fill(self, now: float) -> float:
        """Bring the level up to now, and return it."""
        if now > self.at:
            self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
            self.at = now
        return self.level

    def opening(self, now: float, amount: float = 1.0) -> float:
        """Return when ``amount`` may be taken: now, or later."""
        # More than the bucket holds is let through when it is full, else it would wait forever.
        missing = min(amount, self.capacity) - self.fill(now)
        # The tolerance is for sums of floats: a bucket filled for exactly long enough is full enough.
        if missing <= 1e-6:
            return now
        return now + missing / self.rate if self.rate > 0 else math.inf

    def take(self, now: float, amount: float = 1.0) -> None:
        """Take, into debt if need be; a negative amount gives back."""
        self.fill(now)
        self.level = min(self.capacity, self.level - amount)


def fixed_buckets(limit: RateLimit | None, now: float) -> tuple[Bucket | None, Bucket | None]:
    """Return the buckets of a configured limit: of requests, and of tokens."""

    def bucket(per_minute: int | None, burst_seconds: float) -> Bucket | None:
        if per_minute is None:
            return None
        rate = per_minute / 60
        capacity = max(1.0, rate * burst_seconds)
        return Bucket(rate, capacity, capacity, now)

    if limit is None:
        return None, None
    return (
        bucket(limit.requests_per_minute, BURST_SECONDS),
        bucket(limit.tokens_per_minute, TOKEN_BURST_SECONDS),
    )


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A moment when the provider's bucket was empty, and what it had accepted before.

    Attributes:
        windows: seconds before that moment, and how many requests were accepted within them.
        since_empty: the same, back to the refusal before, when the bucket was empty too.
    """

    windows: list[tuple[float, int]]
    since_empty: tuple[float, int] | None

    def rate(self, burst: float) -> float:
        """Return the rate that explains this refusal, if the bucket holds so much.

        A bucket that is empty now has let through at most ``burst + rate * seconds`` in any time before,
        and just that since it was last full; since it was last empty, at most ``rate * seconds``.
        """
        best = max(((number - burst) / seconds for seconds, number in self.windows), default=0.0)
        if self.since_empty is not None:
            seconds, number = self.since_empty
            best = max(best, number / seconds)
        return best

    def unexplained(self, rate: float, burst: float) -> float:
        """Return how many requests more than it did such a bucket would have accepted."""
        slack = min((burst + rate * seconds - number for seconds, number in self.windows), default=math.inf)
        if self.since_empty is not None:
            seconds, number = self.since_empty
            slack = min(slack, rate * seconds - number)
        return slack if slack < math.inf else 0.0


def _windows(empty_at: float, accepted_at: Sequence[float]) -> list[tuple[float, int]]:
    total = len(accepted_at)
    step = max(1, total // 128)
    return [
        (max(empty_at - accepted_at[index], 0.005), total - index) for index in range(total - 1, -1, -step)
    ]


class FoundRate:
    """Find the rate and burst of a provider's limit, from when it refuses.

    Each refusal gives, for every burst, the rate that explains it. One alone leaves both open: it is
    followed by a guess that is rather too high. Two or more of them agree on one burst only.

    States: *free* (no refusal yet, ``bucket`` is ``None``), *guessed* (one), *measured* (two or more).
    """

    def __init__(self) -> None:
        self.bucket: Bucket | None = None
        self.measured = False
        self._refusals: list[_Refusal] = []
        # How many were accepted at once before any was refused, while the provider's bucket was full.
        self._held = math.inf
        self._refused_before = False
        self._burst = math.inf
        self._empty_at = -math.inf
        self._accepted_at_empty = 0
        self._calm_since = 0.0
        self._probed_at = 0.0
        self._probe_after = PROBE_AFTER_SECONDS
        self._most_came_in = 0.0
        self._unexplained = 0

    def forget(self) -> None:
        """The refusals had another reason than the rate."""
        self.bucket = None
        self.measured = False
        self._refusals.clear()
        self._empty_at = -math.inf

    def learn(self, now: float, empty_at: float, accepted_at: Sequence[float], accepted: int) -> None:
        """Learn from a refusal, once the pause after it is over.

        Args:
            now: the end of the pause.
            empty_at: when the refused request was sent.
            accepted_at: when the requests before it were sent that were accepted, in order.
            accepted: how many ever were.
        """
        if not self._refused_before and accepted_at and empty_at - accepted_at[0] < AT_FIRST_SECONDS:
            self._held = len(accepted_at)
        self._refused_before = True
        self._calm_since = now
        self._probe_after = PROBE_AFTER_SECONDS
        self._most_came_in, self._unexplained = 0.0, 0
        since_empty = None
        seconds = empty_at - self._empty_at
        if seconds > 120:
            # Old news: the limit may be another one by now.
            self._refusals.clear()
        elif seconds > 0.05:
            since_empty = (seconds, accepted - self._accepted_at_empty)
        self._empty_at, self._accepted_at_empty = empty_at, accepted
        self._refusals = [*self._refusals[-3:], _Refusal(_windows(empty_at, accepted_at), since_empty)]
        rate, burst = self._solve(accepted_at)
        self._burst = burst if len(self._refusals) > 1 else math.inf
        if rate <= 0:
            self.bucket = None
            return
        reserve = min(burst, rate * (now - empty_at)) * RESERVE_USED if self.measured else 0.0
        capacity = max(1.0, burst * RESERVE_USED, rate * LATE_SECONDS)
        self.bucket = Bucket(rate * SAFETY, capacity, max(1.0, reserve), now)

    def _solve(self, sent: Sequence[float]) -> tuple[float, float]:
        counted = [refusal.since_empty[1] for refusal in self._refusals if refusal.since_empty is not None]
        self.measured = max(counted, default=0) >= ENOUGH_COUNTED
        if len(self._refusals) == 1:
            # Known is only that the bucket held what was accepted all at once at the beginning.
            at_once = bisect_right(sent, sent[0] + 0.02) if sent else 0
            seconds, number = self._refusals[0].windows[-1] if sent else (0.0, 0)
            return (max(0.0, number - at_once) / seconds if seconds >= 0.2 else 0.0), float(at_once)
        best = (math.inf, 0.0, 1.0)
        burst = 1.0
        while burst < 2000:
            rate = max(refusal.rate(burst) for refusal in self._refusals)
            unexplained = sum(refusal.unexplained(rate, burst) for refusal in self._refusals)
            best = min(best, (unexplained, rate, burst))
            burst = max(burst + 1, burst * 1.1)
        return best[1], best[2]

    def lone_refusal(self, now: float, accepted: int, sent: Sequence[float]) -> bool:
        """One request was refused while others passed: the bucket is about empty.

        Args:
            sent: when the latest requests were sent.
            accepted: how many requests ever were accepted.

        Returns:
            whether refusals go on that no bucket explains: more was accepted in the same time before, or
            much should have been left.
        """
        bucket = self.bucket
        if bucket is None:
            return False
        unexplained = bucket.fill(now) > max(3.0, 0.2 * bucket.capacity) and self.measured
        bucket.level = min(bucket.level, 0.0)
        burst = self._held if self._held < math.inf or self._burst >= 2 else self._burst
        seconds = now - self._empty_at
        tried_upward = now - self._calm_since > self._calm_seconds
        if not unexplained:
            bucket.rate *= SAFETY
            if seconds > 0.3:
                # From empty to empty: what was accepted is what came in.
                since_empty = accepted - self._accepted_at_empty
                # One that holds one is never quite empty.
                slack = 1 if burst < 2 else 0
                came_in = rate = (since_empty + slack) / seconds
                if tried_upward:
                    # But a bucket that was full for a while has taken in less, and what was let through
                    # lately says more.
                    lately = _Refusal(_windows(now, sent[max(0, len(sent) - since_empty) :]), None)
                    rate = max(rate, lately.rate(burst))
                bucket.rate = max(0.5 * bucket.rate, min(bucket.rate, rate * SAFETY))
                if seconds > 0.6:
                    self.measured = True
                    unexplained = came_in < CONTRADICTS * self._most_came_in
                    self._most_came_in = max(self._most_came_in, (since_empty - slack) / seconds)
        if seconds > 2.0 or (unexplained and seconds > 0.3):
            self._empty_at, self._accepted_at_empty = now, accepted
        self._calm_since = now
        if unexplained:
            self._probe_after = PROBE_AFTER_SECONDS
        elif tried_upward:
            self._probe_after = min(2 * self._probe_after, PROBE_AFTER_SECONDS_MAX)
        self._unexplained += unexplained
        return self._unexplained >= UNEXPLAINED

    @property
    def _calm_seconds(self) -> float:
        """How long nothing must be refused before the rate is tried upward."""
        return self._probe_after if self.measured else GUESS_AFTER_SECONDS

    def probe(self, now: float) -> None:
        """Try the rate upward, when nothing was refused for a while and requests have to wait for it."""
        bucket = self.bucket
        if bucket is None:
            return
        calm_since = self._calm_since + self._calm_seconds
        # Somebody has waited since the last look, but for no longer than from one request to the next.
        seconds = min(now - max(self._probed_at, calm_since), max(1.0, 1 / bucket.rate))
        self._probed_at = now
        if seconds > 0:
            growth = GUESS_GROWTH
            if self.measured:
                doublings = min((now - calm_since) / PROBE_DOUBLING_SECONDS, PROBE_DOUBLINGS_MAX)
                growth = min(PROBE_GROWTH_MAX, PROBE_GROWTH * 2**doublings)
            bucket.fill(now)
            bucket.rate *= min(1 + growth * seconds, PROBE_FACTOR_MAX)

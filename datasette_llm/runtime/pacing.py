"""How many requests a second: token buckets, for limits that are configured or found out.

A ``Bucket`` is filled at a rate and holds at most its capacity; a request may start when it holds
enough. ``FoundRate`` learns such a bucket's rate from nothing but refusals. Limits that a provider
announces in headers are in ``announced``. All times are the event loop's, in seconds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
#: After so many seconds without a refusal the rate is tried upward, by this share a second at first.
PROBE_AFTER_SECONDS = 4.0
PROBE_GROWTH = 0.01
PROBE_GROWTH_MAX = 0.15


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


class FoundRate:
    """Find the rate and burst of a provider's limit, from when it refuses.

    Between two refusals the provider's bucket went from empty to empty, so what it accepted in between
    is what it was filled with: that is the rate, whatever the burst. The first refusal alone gives
    only an upper bound, since the burst is in it.

    States: *free* (no refusal yet, ``bucket`` is ``None``), *guessed* (one), *measured* (two or more).
    """

    def __init__(self) -> None:
        self.bucket: Bucket | None = None
        self.measurements = 0
        self._first: tuple[float, float] | None = None
        self._episode: float | None = None
        self._pause_seconds = 0.0
        self._accepted_before = 0
        self._calm_since = 0.0
        self._burst = 0.0

    def begin_episode(self, now: float) -> None:
        """The provider's bucket is empty now."""
        self._previous_episode, self._episode = self._episode, now

    def end_episode(self, now: float, accepted: int, busy_seconds: float, in_busy: int) -> None:
        """Learn, once the pause is over and every refusal that belongs to it is known.

        Args:
            now: the end of the pause.
            accepted: requests the provider ever accepted.
            busy_seconds: how long requests had been sent without a gap, when the refusal came.
            in_busy: how many of these were accepted.
        """
        begun = self._episode
        assert begun is not None, "an episode ends after it began"
        pause, self._pause_seconds = self._pause_seconds, now - begun
        previous = self._previous_episode
        rate: float | None = None
        if previous is None or begun - previous <= pause + 0.05 or begun - previous > 60:
            self._first = (float(in_busy), busy_seconds)
            if busy_seconds >= 0.2:
                rate = in_busy / busy_seconds
            self.measurements = 0
        else:
            between = float(accepted - self._accepted_before)
            seconds = begun - previous
            rate, self._burst = self._solve(between, seconds, pause)
            self.measurements += 1
        self._accepted_before = accepted
        self._calm_since = now
        if rate is not None and rate > 0:
            rate *= SAFETY
            reserve = (
                min(self._burst, rate * self._pause_seconds) * RESERVE_USED if self.measurements else 0.0
            )
            capacity = max(1.0, self._burst * RESERVE_USED)
            self.bucket = Bucket(rate, capacity, max(1.0, reserve), now)

    def _solve(self, accepted: float, seconds: float, pause: float) -> tuple[float, float]:
        """Return rate and burst such that both refusals came when the bucket was empty.

        What came in during the pause is lost above the burst: ``accepted = min(burst, rate * pause) +
        rate * (seconds - pause)``, and the first refusal says ``burst = in_busy - rate * busy_seconds``.
        """
        rate = accepted / seconds
        burst = self._burst
        for _ in range(4):
            if self._first is not None:
                in_busy, busy_seconds = self._first
                burst = max(1.0, in_busy - rate * busy_seconds)
            if burst >= rate * pause:
                break
            rate = max(accepted / seconds, (accepted - burst) / (seconds - pause))
        return rate, burst

    def lone_refusal(self, now: float) -> None:
        """One request was refused while others passed: the bucket is about empty."""
        if self.bucket is not None:
            self.bucket.fill(now)
            self.bucket.level = min(self.bucket.level, 0.0)
            self.bucket.rate *= SAFETY
            self._calm_since = now

    def probe(self, now: float) -> None:
        """Try the rate upward, when nothing was refused for a while and requests have to wait for it."""
        bucket = self.bucket
        if bucket is None:
            return
        calm = now - self._calm_since - PROBE_AFTER_SECONDS
        seconds = now - bucket.at
        if calm > 0 and seconds > 0:
            growth = min(PROBE_GROWTH_MAX, PROBE_GROWTH * 2 ** (calm / 6))
            bucket.fill(now)
            bucket.rate *= 1 + growth * min(seconds, 1.0)

"""Limits that a provider announces in its response headers.

OpenAI and those who imitate it send ``x-ratelimit-limit-requests``, ``-remaining-requests`` and
``-reset-requests`` (``6m0s``, ``20ms``, ``0.25``), and the same for tokens; Anthropic
``anthropic-ratelimit-requests-limit`` and so on, with a date as reset. From these a copy of the
provider's bucket is kept here, and corrected by each response.

A response tells what remained when its request arrived, so it is compared with what the copy held then.
"""

from __future__ import annotations

import datetime
import re
from bisect import bisect_right
from typing import TYPE_CHECKING

from .pacing import Bucket

if TYPE_CHECKING:
    from collections.abc import Mapping

#: So much of the provider's bucket is left alone, at most: requests do not arrive as evenly as they are sent.
MARGIN, MARGIN_SHARE = 3.0, 0.15

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|d|h|m|s)")
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def seconds_until(text: str) -> float | None:
    """Read a reset header: a duration (``1m30.5s``, ``20ms``), a number of seconds, or a date."""
    text = text.strip()
    try:
        seconds = float(text)
    except ValueError:
        parts = _DURATION.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            return sum(float(number) * _UNITS[unit] for number, unit in parts)
        try:
            date = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, (date - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
    if not 0 <= seconds < 1e12:
        return None
    if seconds > 1e9:
        # A moment, as Unix time, in seconds or milliseconds.
        moment = seconds / 1000 if seconds > 1e11 else seconds
        return max(0.0, moment - datetime.datetime.now(datetime.timezone.utc).timestamp())
    return seconds


class AnnouncedLimits:
    """The limits on requests and on tokens that were announced, each as a copy of the provider's bucket."""

    __slots__ = ("known", "requests", "tokens")

    def __init__(self) -> None:
        self.known = False
        self.requests = AnnouncedBucket()
        self.tokens = AnnouncedBucket()

    def observe(self, now: float, headers: Mapping[str, str], age: float, *, refused: bool) -> bool:
        """Read one response's headers; return whether they announce anything."""
        for bucket, unit in ((self.requests, "requests"), (self.tokens, "tokens")):
            remaining = headers.get(f"x-ratelimit-remaining-{unit}")
            if remaining is not None:
                limit, reset = f"x-ratelimit-limit-{unit}", f"x-ratelimit-reset-{unit}"
            else:
                remaining = headers.get(f"anthropic-ratelimit-{unit}-remaining")
                if remaining is None:
                    continue
                limit, reset = f"anthropic-ratelimit-{unit}-limit", f"anthropic-ratelimit-{unit}-reset"
            try:
                left, most = float(remaining), float(headers.get(limit) or "nan")
            except ValueError:
                continue
            wait = seconds_until(headers.get(reset) or "")
            bucket.observe(now, most, max(0.0, left), wait, age)
            self.known = self.known or bucket.known
        if refused and self.requests.known:
            self.requests.refused(now)
        return self.known

    def opening(self, now: float, tokens: float) -> float:
        """Return when a request with so many tokens may be sent."""
        return max(self.requests.opening(now, 1.0), self.tokens.opening(now, tokens))

    def take(self, now: float, tokens: float) -> None:
        """A request is sent."""
        self.requests.take(now, 1.0)
        self.tokens.take(now, tokens)


class AnnouncedBucket:
    """A copy of one bucket of the provider's.

    The rate is ``limit`` per minute, which is what it mostly means, unless the
    time until the bucket is full says otherwise (some providers announce limits per day or per second).
    """

    __slots__ = ("_bucket", "_history_at", "_history_level", "_most_seen", "_window")

    def __init__(self) -> None:
        self._bucket: Bucket | None = None
        self._most_seen = 0.0
        self._history_at: list[float] = []
        self._history_level: list[float] = []

    @property
    def known(self) -> bool:
        return self._bucket is not None

    @property
    def rate(self) -> float | None:
        return None if self._bucket is None else self._bucket.rate

    def opening(self, now: float, amount: float) -> float:
        bucket = self._bucket
        if bucket is None:
            return now
        return bucket.opening(now, min(amount, bucket.capacity) + self._margin())

    def take(self, now: float, amount: float) -> None:
        bucket = self._bucket
        if bucket is None:
            return
        bucket.take(now, amount)
        self._history_at.append(now)
        self._history_level.append(bucket.level)
        if len(self._history_at) > 8192:
            del self._history_at[:4096], self._history_level[:4096]

    def refused(self, now: float) -> None:
        """A request was refused: nothing is left."""
        if self._bucket is not None:
            self._bucket.fill(now)
            self._bucket.level = min(self._bucket.level, 0.0)

    def observe(self, now: float, limit: float, remaining: float, reset: float | None, age: float) -> None:
        """A request that was sent ``age`` seconds ago left so much of the limit."""
        self._most_seen = max(self._most_seen, remaining + 1.0)
        rate = self._rate(limit, remaining, reset)
        if rate is None:
            return
        bucket = self._bucket
        if bucket is None:
            # The requests that are on their way now were counted by nobody here: assume the worst.
            bucket = self._bucket = Bucket(rate, self._most_seen, remaining, now)
            return
        bucket.fill(now)
        bucket.rate = rate
        bucket.capacity = self._most_seen
        index = bisect_right(self._history_at, now - age + 0.001) - 1
        held_then = self._history_level[index] if index >= 0 else bucket.level
        # Providers round down what remains.
        error = remaining + 0.5 - held_then
        # Downward at once: somebody else may use the same limit. Upward in steps, since it may be late news.
        bucket.level = min(bucket.capacity, bucket.level + (error if error < 0 else 0.3 * error))
        for later in range(max(index, 0), len(self._history_level)):
            self._history_level[later] += error if error < 0 else 0.3 * error

    def _margin(self) -> float:
        return min(MARGIN, MARGIN_SHARE * self._most_seen)

    def _rate(self, limit: float, remaining: float, reset: float | None) -> float | None:
        per_minute = limit / 60 if limit > 0 else None
        used = limit - remaining
        by_reset = used / reset if reset and used >= 1 and remaining > 0.3 * limit else None
        if per_minute is None or by_reset is None:
            return per_minute or by_reset
        return per_minute if 0.4 <= by_reset / per_minute <= 2.5 else by_reset

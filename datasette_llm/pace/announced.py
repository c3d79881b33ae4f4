"""Limits that a provider announces in its response headers.

OpenAI and those who imitate it send ``x-ratelimit-limit-requests``, ``-remaining-requests`` and
``-reset-requests`` (``6m0s``, ``20ms``, ``0.25``), and the same for tokens; Anthropic
``anthropic-ratelimit-requests-limit`` and so on, with a date as reset; Mistral spells them in ways of its
own. From these a copy of the
provider's bucket is kept here, and corrected by each response.

A response tells what remained when its request arrived, so it is compared with what the copy held then.
"""

from __future__ import annotations

import datetime
import math
import re
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from .pacing import Bucket

if TYPE_CHECKING:
    from collections.abc import Mapping

#: So much of the provider's bucket is left alone, at most: requests do not arrive as evenly as they are sent.
MARGIN, MARGIN_SECONDS, MARGIN_SHARE = 3.0, 0.05, 0.15

#: From so many used requests on the provider's rounding does not matter.
FEW_USED = 4
#: How much of a request, at most, one response raises what is thought to remain: 2 % of the rate.
RAISE = 0.02
#: Requests sent within so many seconds of each other may arrive in another order.
SAME_MOMENT_SECONDS = 0.002
#: How long a window is thought to be whose length has not been seen.
WINDOW_SECONDS = 60.0
#: How much later the next one is counted on, since clocks differ.
WINDOW_MARGIN_SECONDS = 0.1

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


#: How providers spell the headers of a bucket: what remains of it, how much it holds, when it is full again.
#: OpenAI, Groq and those who imitate them; Anthropic; Mistral, which announces what is left of a minute, and
#: for tokens by another gateway's names, too.
_SPELLINGS: dict[str, tuple[tuple[str, str, str], ...]] = {
    unit: (
        (f"x-ratelimit-remaining-{unit}", f"x-ratelimit-limit-{unit}", f"x-ratelimit-reset-{unit}"),
        (
            f"anthropic-ratelimit-{unit}-remaining",
            f"anthropic-ratelimit-{unit}-limit",
            f"anthropic-ratelimit-{unit}-reset",
        ),
        (
            f"x-ratelimit-remaining-{short}-minute",
            f"x-ratelimit-limit-{short}-minute",
            f"x-ratelimit-reset-{short}-minute",
        ),
        (f"{gateway}-remaining", f"{gateway}-limit", f"{gateway}-reset"),
    )
    for unit, short, gateway in (("requests", "req", "ratelimit"), ("tokens", "tokens", "ratelimitbysize"))
}


def _spelt(headers: Mapping[str, str], unit: str) -> tuple[float, float, float | None] | None:
    """Find what remains of a limit, how much it is, and the seconds until it is full again."""
    for remaining, limit, reset in _SPELLINGS[unit]:
        left = headers.get(remaining)
        if left is None:
            continue
        try:
            return float(left), float(headers.get(limit) or "nan"), seconds_until(headers.get(reset) or "")
        except ValueError:
            continue
    return None


class AnnouncedLimits:
    """The limits on requests and on tokens that were announced, each as a copy of the provider's bucket."""

    __slots__ = ("explains_refusal", "known", "requests", "tokens")

    def __init__(self) -> None:
        self.known = False
        # Whether the last refusal said that nothing remains: the pace will follow that.
        self.explains_refusal = False
        self.requests = AnnouncedBucket()
        self.tokens = AnnouncedBucket()

    def observe(
        self, now: float, headers: Mapping[str, str], age: float, sent_since: int, *, refused: bool
    ) -> bool:
        """Read one response's headers; return whether they announce anything.

        Args:
            age: seconds since the request was sent.
            sent_since: how many others were sent when it was, or later.
            refused: whether the response is a refusal.
        """
        explained = False
        for bucket, unit in ((self.requests, "requests"), (self.tokens, "tokens")):
            found = _spelt(headers, unit)
            if found is None:
                continue
            left, most, wait = found
            bucket.observe(now, most, max(0.0, left), wait, age, sent_since)
            self.known = self.known or bucket.known
            explained = explained or (bucket.known and left < (1.0 if unit == "requests" else 0.25 * most))
        if refused:
            self.explains_refusal = explained
            if self.requests.known and explained:
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

    __slots__ = (
        "_bucket",
        "_history_at",
        "_history_level",
        "_is_window",
        "_left",
        "_limit",
        "_most_seen",
        "_newest_sent",
        "_reset_sum",
        "_seen_at_first",
        "_taken",
        "_used_sum",
        "_window_ends",
    )

    def __init__(self) -> None:
        self._bucket: Bucket | None = None
        self._most_seen = 0.0
        self._used_sum = self._reset_sum = 0.0
        self._newest_sent = -math.inf
        self._seen_at_first: tuple[float, float] | None = None
        self._is_window = False
        self._window_ends = 0.0
        self._left = self._limit = 0.0
        # All that was taken.
        self._taken = 0.0
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
        if self._is_window:
            # All that remains may be used at once, and then nothing comes in until the window is over.
            if now >= self._window_ends:
                self._left, self._window_ends = self._limit, now + WINDOW_SECONDS
            return now if self._left >= amount + self._margin() else self._window_ends
        return bucket.opening(now, min(amount, bucket.capacity) + self._margin())

    def take(self, now: float, amount: float) -> None:
        bucket = self._bucket
        if bucket is None:
            return
        bucket.take(now, amount)
        self._left -= amount
        self._taken += amount
        self._history_at.append(now)
        self._history_level.append(bucket.level)
        if len(self._history_at) > 8192:
            del self._history_at[:4096], self._history_level[:4096]

    def refused(self, now: float) -> None:
        """A request was refused: nothing is left."""
        if self._bucket is not None:
            self._bucket.fill(now)
            self._bucket.level = min(self._bucket.level, 0.0)

    def observe(
        self, now: float, limit: float, remaining: float, reset: float | None, age: float, sent_since: int
    ) -> None:
        """A request that was sent ``age`` seconds ago left so much of the limit."""
        sent = now - age
        self._most_seen = max(self._most_seen, remaining + 1.0)
        self._look_for_window(sent, limit - remaining, reset)
        rate = self._rate(limit, remaining, reset)
        if rate is None:
            return
        if self._is_window:
            self._left, self._limit = remaining - sent_since, limit
        # As much at least is left now, if all that were sent at or after that moment were counted since.
        level = min(self._most_seen, remaining - sent_since + rate * age)
        bucket = self._bucket
        if bucket is None:
            self._bucket = Bucket(rate, self._most_seen, level, now)
            return
        bucket.fill(now)
        bucket.rate = rate
        bucket.capacity = self._most_seen
        # Several may have been sent at that moment, and which of them this one was is not known.
        first = bisect_left(self._history_at, sent - SAME_MOMENT_SECONDS)
        after = bisect_right(self._history_at, sent + SAME_MOMENT_SECONDS)
        if after == 0:
            # Sent before anything was announced. More than it holds was not left when the first was sent that
            # is counted.
            if self._history_at:
                level = min(level, self._most_seen - self._taken + rate * (now - self._history_at[0]))
            bucket.level = max(bucket.level, level)
            return
        if sent < self._newest_sent - SAME_MOMENT_SECONDS:
            # An answer that took long: others told later news already.
            return
        self._newest_sent = sent
        held = self._history_level[min(first, after - 1) : after]
        # Providers round down what remains. Downward at once: somebody else may use the same limit. Upward
        # slowly: what was let through here and is still on its way there looks as if it remained.
        correction = min(0.0, remaining + 1 - held[-1]) + RAISE * min(1.0, max(0.0, remaining - held[0]))
        if correction:
            bucket.level = min(bucket.capacity, bucket.level + correction)
            for later in range(min(first, after - 1), len(self._history_level)):
                self._history_level[later] += correction

    def _margin(self) -> float:
        rate = 0.0 if self._bucket is None else self._bucket.rate
        return min(MARGIN + MARGIN_SECONDS * rate, MARGIN_SHARE * self._most_seen)

    def _look_for_window(self, sent: float, used: float, reset: float | None) -> None:
        """Tell a window from a bucket, which is full again the later the more is taken."""
        if reset is None:
            return
        over_at = sent + reset
        if self._seen_at_first is None or over_at > self._seen_at_first[0] + 1 + 0.5 * reset:
            self._seen_at_first = (over_at, used)
            return
        first_over_at, first_used = self._seen_at_first
        moved = abs(over_at - first_over_at)
        self._is_window = used - first_used >= 5 and reset > 1 and moved < 0.02 * reset + 0.05
        self._window_ends = over_at + WINDOW_MARGIN_SECONDS

    def _rate(self, limit: float, remaining: float, reset: float | None) -> float | None:
        per_minute = limit / 60 if limit > 0 else None
        used = limit - remaining
        if reset and used >= 1:
            # Providers round down what remains, but not what is left of a full bucket: when little was used
            # this may only raise the rate.
            exactly = used - 0.5 if used >= FEW_USED else used
            if used >= FEW_USED or exactly * self._reset_sum >= self._used_sum * reset:
                self._used_sum = 0.95 * self._used_sum + exactly
                self._reset_sum = 0.95 * self._reset_sum + reset
        if self._reset_sum <= 0 or used != used:
            return per_minute
        by_reset = self._used_sum / self._reset_sum
        if per_minute is None:
            return by_reset
        if by_reset < 0.4 * per_minute:
            # A limit per hour or day, or a window that has only begun.
            return per_minute if self._is_window else by_reset
        if by_reset <= 2.5 * per_minute:
            return per_minute
        # A limit per second; or one per minute, enforced with a smaller bucket, never seen that full.
        return by_reset if self._most_seen > 0.5 * limit else per_minute

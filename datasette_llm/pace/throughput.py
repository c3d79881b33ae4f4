"""What each limit on the requests in flight gave: answers a second, by the limit they were sent under."""

from __future__ import annotations

#: Twice as many in flight must give at least this much more throughput, or growing stops. (1 is what a
#: server gives that only queues, 2 one that has room; answers' times scatter.)
WORTHWHILE = 1.3
#: Answers needed for such a judgement.
ENOUGH_ANSWERS = 16
#: So many limits are remembered.
REMEMBERED = 8


class _Level:
    """Answers to requests that were sent while the limit was between ``limit`` and twice that."""

    __slots__ = ("answers", "limit", "seconds", "since")

    def __init__(self, limit: float, since: float) -> None:
        self.limit = limit
        self.since = since
        self.answers = 0
        self.seconds = 0.0

    def throughput(self) -> float | None:
        if self.answers < ENOUGH_ANSWERS or self.seconds <= 0:
            return None
        return self.limit * self.answers / self.seconds


class ThroughputByLimit:
    """Whether a greater limit gives more answers a second."""

    def __init__(self, limit: float, now: float) -> None:
        self._levels = [_Level(limit, now)]

    def resized(self, limit: float, now: float) -> None:
        """The limit is this one from now on."""
        level = self._levels[-1]
        if limit >= 2 * level.limit or limit < level.limit:
            self._levels.append(_Level(limit, now))
            del self._levels[:-REMEMBERED]

    def answered(self, sent: float, seconds: float) -> bool:
        """A request was answered that was sent at that moment; return whether there is news to look at."""
        for level in reversed(self._levels):
            if level.since <= sent:
                break
        else:
            level = self._levels[0]
        level.answers += 1
        level.seconds += seconds
        return level.answers == ENOUGH_ANSWERS

    def in_vain(self) -> tuple[float, float] | None:
        """Say where more in flight only made each answer slower.

        Returns:
            the throughput, in answers a second, and the seconds that an answer took with fewer.
        """
        before: _Level | None = None
        for level in self._levels:
            throughput = level.throughput()
            if throughput is None:
                continue
            if before is not None and level.limit > before.limit:
                gain = throughput / (before.throughput() or throughput)
                if gain < 1 + (WORTHWHILE - 1) * (level.limit / before.limit - 1):
                    return throughput, before.seconds / before.answers
            before = level
        return None

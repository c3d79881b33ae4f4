"""Who waits for a slot, in which line, and whose turn it is.

A lane has one limit. Of those who wait in it, these go first:

1. people: prompts that somebody waits for (``Holder.urgent``), who may also go a little beyond an adaptive
   limit, so that they need not wait for an answer of a job's;
2. those whose call failed and is made again, since their time is limited;
3. of the holders that are left, groups say, the one that has the fewest calls in flight; of several the one
   whose last turn was longest ago. So a small job beside a large one gets half of the lane.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Protocol

import anyio

from .adaptive import AdaptiveLimit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .policy import Patience

#: How far beyond an adaptive limit people may go: a share of it, and at least one call.
RESERVE_SHARE = 0.1


class Holder(Protocol):
    """Somebody who takes slots of a lane, one group say."""

    lane: Lane
    in_use: int
    throttled_seconds: float
    urgent: bool
    patience: Patience
    last_turn: int


class Waiter:
    """Somebody's place in the queue of a lane."""

    __slots__ = (
        "again", "blocked_before", "error", "event", "granted", "scope", "since", "slots", "started",
        "ticket", "tokens",
    )  # fmt: skip

    def __init__(self, slots: Holder, tokens: int, since: float, *, again: bool = False) -> None:
        self.slots = slots
        self.tokens = tokens
        self.since = since
        self.started = since
        self.again = again
        self.granted = False
        #: What to raise instead of waiting on.
        self.error: Exception | None = None
        self.event = anyio.Event()
        self.scope: anyio.CancelScope | None = None
        self.ticket = 0
        self.blocked_before = 0.0

    @property
    def told(self) -> bool:
        """Whether this one need not wait any more."""
        return self.granted or self.error is not None

    def rank(self) -> tuple[bool, bool, int, int]:
        """Return the place of this one among the next of several lanes."""
        return not self.slots.urgent, not self.again, self.slots.last_turn, self.ticket


class Lane:
    """Those who share one limit on calls in flight, and the lines of those who wait for it."""

    __slots__ = (
        "__weakref__", "_again", "_lines", "_urgent", "adaptive", "blocked_seconds", "blocked_since", "fixed",
        "in_use", "waiting",
    )  # fmt: skip

    def __init__(self, limit: int | AdaptiveLimit) -> None:
        self.adaptive = limit if isinstance(limit, AdaptiveLimit) else None
        self.fixed = limit if isinstance(limit, int) else 0
        self.in_use = 0
        self.waiting = 0
        self._urgent: deque[Waiter] = deque()
        self._again: deque[Waiter] = deque()
        self._lines: dict[Holder, deque[Waiter]] = {}
        # How long somebody with a slot at hand was kept waiting by cooldown or pace.
        self.blocked_seconds = 0.0
        self.blocked_since: float | None = None

    @property
    def limit(self) -> int:
        return self.fixed or self.adaptive.limit  # type: ignore[union-attr]

    @property
    def room(self) -> int:
        """How many may be in flight now: fewer than the limit while they are spread."""
        return self.fixed or self.adaptive.room  # type: ignore[union-attr]

    @property
    def others_wait(self) -> bool:
        """Whether calls wait that are not those of people."""
        return bool(self._lines or self._again)

    def has_room(self, *, urgent: bool = False) -> bool:
        """Whether another call may be in flight."""
        limit = self.room
        if urgent and self.adaptive is not None:
            limit += math.ceil(RESERVE_SHARE * limit)
        return self.in_use < limit

    def add(self, waiter: Waiter) -> None:
        """Put somebody at the end of the line that is for such."""
        self.waiting += 1
        if waiter.slots.urgent:
            self._urgent.append(waiter)
        elif waiter.again:
            self._again.append(waiter)
        else:
            self._lines.setdefault(waiter.slots, deque()).append(waiter)

    def remove(self, waiter: Waiter) -> None:
        """Take somebody out of line."""
        self.waiting -= 1
        if waiter.slots.urgent:
            self._urgent.remove(waiter)
        elif waiter.again:
            self._again.remove(waiter)
        else:
            line = self._lines[waiter.slots]
            line.remove(waiter)
            if not line:
                del self._lines[waiter.slots]

    def next(self) -> Waiter | None:
        """Return whose turn it is."""
        if self._urgent:
            return self._urgent[0]
        if self._again:
            return self._again[0]
        if not self._lines:
            return None
        if len(self._lines) == 1:
            return next(iter(self._lines.values()))[0]
        holder = min(self._lines, key=lambda slots: (slots.in_use, slots.last_turn))
        return self._lines[holder][0]

    def last(self) -> Waiter:
        """Return one of those who have to wait longest."""
        if self._lines:
            return next(reversed(self._lines.values()))[-1]
        return (self._again or self._urgent)[-1]

    def __iter__(self) -> Iterator[Waiter]:
        yield from self._urgent
        yield from self._again
        for line in self._lines.values():
            yield from line

    def note_blocked(self, now: float, blocked: bool) -> None:
        if self.blocked_since is not None:
            self.blocked_seconds += now - self.blocked_since
        self.blocked_since = now if blocked else None

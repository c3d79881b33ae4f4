"""Who waits for a slot, and in which line."""

from __future__ import annotations

from collections import deque
from typing import Protocol

import anyio

from .adaptive import AdaptiveLimit


class Lane:
    """Those who share one limit on calls in flight, and the queue of those who wait for it."""

    __slots__ = ("adaptive", "blocked_seconds", "blocked_since", "fixed", "in_use", "waiters")

    def __init__(self, limit: int | AdaptiveLimit) -> None:
        self.adaptive = limit if isinstance(limit, AdaptiveLimit) else None
        self.fixed = limit if isinstance(limit, int) else 0
        self.in_use = 0
        self.waiters: deque[Waiter] = deque()
        # How long somebody with a slot at hand was kept waiting by cooldown or pace.
        self.blocked_seconds = 0.0
        self.blocked_since: float | None = None

    @property
    def limit(self) -> int:
        return self.fixed or self.adaptive.limit  # type: ignore[union-attr]

    def note_blocked(self, now: float, blocked: bool) -> None:
        if self.blocked_since is not None:
            self.blocked_seconds += now - self.blocked_since
        self.blocked_since = now if blocked else None


class Holder(Protocol):
    """Somebody who takes slots of a lane, one group say."""

    lane: Lane
    in_use: int
    throttled_seconds: float


class Waiter:
    """Somebody's place in the queue of a lane."""

    __slots__ = ("blocked_before", "event", "granted", "scope", "slots", "ticket", "tokens")

    def __init__(self, slots: Holder, tokens: int) -> None:
        self.slots = slots
        self.tokens = tokens
        self.granted = False
        self.event = anyio.Event()
        self.scope: anyio.CancelScope | None = None
        self.ticket = 0
        self.blocked_before = 0.0

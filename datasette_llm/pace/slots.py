"""One group's view of a throttle: it takes a slot for a call, and gives it back with how the call went."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from anyio.lowlevel import checkpoint

from .attempt_limit import AttemptLimit
from .lanes import Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lanes import Holder, Lane
    from .outage import Away, Outage
    from .outcome import Outcome
    from .policy import Patience
    from .queue import Queue
    from .tally import LastHour

#: How long a job's calls wait where it is not sure that all are refused, in seconds: a minute's limit is back
#: by then.
UNSURE_SECONDS = 120.0


class Shared(Protocol):
    """What all groups share that use the same key and model: a throttle."""

    now: Callable[[], float]
    paced: bool
    served_at: float
    unserved_since: float
    in_use: int
    outage: Outage
    queue: Queue
    hour: LastHour

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""

    @property
    def refuses_all(self) -> bool:
        """Whether several prompts were refused one after the other, and none was answered."""

    @property
    def refusing(self) -> bool:
        """Whether a pause runs, or one call at a time tries whether it may."""

    def away_now(self) -> Away | None:
        """Say that the provider cannot be reached, if so."""

    def cooldown_seconds(self) -> float:
        """Return how long a refusal still keeps everybody waiting."""

    def waited_in_line(self, lane: Lane, now: float, sent: float) -> bool:
        """Whether a call that was given up had waited in line while others were answered."""

    def people_ask(self) -> None:
        """Somebody asks who waits for the answer."""

    def opening(self, now: float, tokens: int) -> float:
        """Return when a call may start: now, or later."""

    def started(self, slots: Holder, now: float, tokens: int) -> float:
        """A call starts now; return when it did, on the clock."""

    def gave_back(self, slots: Holder, tokens: int, started: float) -> None:
        """A call that had started was cancelled before it began."""

    def release(self, slots: Holder, outcome: Outcome, started: float | None, prompt: object) -> None:
        """Take a slot back; see `Slots.release`."""


class Slots:
    """One group's view of a throttle. Every acquire is followed by exactly one release."""

    __slots__ = (
        "_throttle", "acquired_at", "attempts", "in_use", "lane", "last_turn", "now", "patience",
        "throttled_seconds", "urgent",
    )  # fmt: skip

    def __init__(self, throttle: Shared, lane: Lane, patience: Patience, urgent: bool) -> None:
        self._throttle = throttle
        self.lane = lane
        self.patience = patience
        #: How long one attempt may take, where nobody has said so.
        self.attempts = AttemptLimit()
        self.urgent = urgent
        self.last_turn = 0
        #: The event loop's clock, read faster than through anyio.
        self.now = throttle.now
        self.in_use = 0
        #: When the last slot was taken: of whoever has just called ``acquire_nowait()`` or ``acquire()``.
        self.acquired_at = 0.0
        self.throttled_seconds = 0.0

    @property
    def limit(self) -> int:
        """How many calls may be in flight now. An adaptive limit grows while somebody waits for it."""
        return self.lane.limit

    @property
    def wanted(self) -> int:
        """How many calls to have at hand: the limit, and one to wait for it where that makes it grow."""
        adaptive = self.lane.adaptive
        if adaptive is None:
            return self.lane.fixed
        limit = adaptive.limit
        return limit + 1 if limit < adaptive.bounds.max else limit

    @property
    def paced(self) -> bool:
        """Whether anything but the number in flight can make somebody wait; then a call's tokens count."""
        return self._throttle.paced

    @property
    def outage_seconds(self) -> float:
        """How long the provider could not be reached until now, for those whose time stands still then."""
        return self._throttle.outage.seconds(self.now()) if self.patience.together else 0.0

    def away(self) -> Away | None:
        """Say that the provider cannot be reached, if so."""
        return self._throttle.away_now()

    def cooldown_seconds(self) -> float:
        """Return how long the provider's last refusal still keeps everybody waiting."""
        return self._throttle.cooldown_seconds()

    def is_weather(self, sent: float, *, alone: bool) -> bool:
        """Whether a call that failed did so because the provider is, or was, away.

        Args:
            sent: when it was sent.
            alone: whether it may have failed for what it asked: then only if others had failed before.
        """
        return self._throttle.outage.covers(sent, alone=alone)

    def waited_in_line(self, sent: float) -> bool:
        """Whether a call that was given up had waited in line while others were answered: the limit falls.

        Args:
            sent: when it was sent.
        """
        return self._throttle.waited_in_line(self.lane, self.now(), sent)

    @property
    def refuses_all(self) -> bool:
        """Whether several prompts were refused one after the other, and none was answered."""
        return self._throttle.refuses_all

    def unserved_until(self) -> float:
        """Return until when a job's calls wait while none is served; ``inf`` if one was."""
        throttle = self._throttle
        sure = throttle.refuses_all and throttle.served_at > -math.inf
        return throttle.unserved_since + (self.patience.seconds if sure else UNSURE_SECONDS)

    def waits_for_room(self) -> bool:
        """Whether a call that found a full line waits for room: a job's, while anybody is served."""
        return self.patience.together and self.now() < self._throttle.unserved_since + self.patience.seconds

    def nobody_is_served(self, sent: float) -> bool:
        """Whether a job's call was refused as everybody is now, and waits until somebody is served again.

        Args:
            sent: when it was sent.
        """
        throttle = self._throttle
        if not self.patience.together or throttle.in_use or throttle.served_at >= sent:
            return False
        return throttle.refusing and self.now() < self.unserved_until()

    def acquire_nowait(self, tokens: int = 0) -> bool:
        """Take a slot if a call may start at once.

        Args:
            tokens: an estimate of what the call will use.
        """
        throttle, lane = self._throttle, self.lane
        if self.urgent:
            throttle.people_ask()
            waiter = lane.next()
            if (waiter is not None and waiter.slots.urgent) or not lane.has_room(urgent=True):
                return False
        elif lane.waiting or lane.in_use >= lane.room:
            return False
        now = self.now()
        if throttle.paced:
            overtakes = throttle.waiting and not self.urgent
            if overtakes or throttle.opening(now, tokens) > now:
                return False
        self.acquired_at = throttle.started(self, now, tokens)
        return True

    async def acquire(self, tokens: int = 0, *, first: bool = False) -> None:
        """Wait until a call may start, and take its slot.

        Cancellation while waiting leaves nothing taken.

        Args:
            tokens: an estimate of what the call will use.
            first: go ahead of those who wait (a retry, whose time is limited).

        Raises:
            ProviderUnreachable: it has been away for as long as the owner's ``patience`` lasts.
        """
        if self.acquire_nowait(tokens):
            taken = self.acquired_at
            try:
                await checkpoint()
            except BaseException:
                self._throttle.gave_back(self, tokens, taken)
                raise
            self.acquired_at = taken
            return
        waiter = Waiter(self, tokens, self.now(), again=first)
        await self._throttle.queue.wait(waiter)
        self.acquired_at = waiter.started

    def give_back(self, tokens: int, started: float) -> None:
        """Give the slot back of a call that was not made after all.

        Args:
            tokens: as of ``acquire()``.
            started: when the slot was taken.
        """
        self._throttle.gave_back(self, tokens, started)

    def release(self, outcome: Outcome, started: float | None = None, prompt: object = None) -> None:
        """Give the slot back, and say how the call went.

        Args:
            started: when the call started, by ``now()``; without it ``outcome.seconds`` counts.
            prompt: whose call it was, only to be compared.
        """
        self._throttle.release(self, outcome, started, prompt)

    @property
    def hour(self) -> LastHour:
        """What happened with this key and model in the last hour, whoever's calls they were."""
        return self._throttle.hour

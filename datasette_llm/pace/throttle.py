"""Who may call the model now: slots, pace and cooldown of one provider key and model.

A ``Throttle`` is shared by everybody on one event loop who uses the same key and model; ``Slots`` is one
group's view of it. A call may start when three things hold:

1. its lane has room: a fixed number in flight, or the shared adaptive one (``adaptive``);
2. no cooldown runs: the provider refused something and everybody waits until it is over;
3. the pace allows it: configured limits (``pacing``), announced ones (``announced``), or the rate that
   was found out from refusals (``pacing.FoundRate``).

Whoever waits holds nothing. There is no task here: one of those who wait, the *leader*, also waits
for the clock, and lets the others in when it is time. Everything but ``acquire()`` is synchronous, so
no state is ever seen half changed.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import TYPE_CHECKING, Literal, NamedTuple

import anyio
from anyio.lowlevel import RunVar, checkpoint

from ..backends.loops import loop_clock
from .adaptive import AdaptiveLimit
from .announced import AnnouncedLimits
from .cooldown import Cooldowns
from .lanes import Holder, Lane, Waiter
from .pacing import fixed_buckets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .policy import ConcurrencyBounds, PromptSettings


class Outcome(NamedTuple):
    """How a model call ended. (One per call: a tuple is made in a third of a frozen dataclass's time.)

    Attributes:
        kind: ``throttled`` is a refusal by the provider's rate limit.
        retry_after: seconds the provider asked to wait.
        seconds: how long the call took, from the moment ``acquire()`` let it start.
        tokens: what it really used.
    """

    kind: Literal["ok", "throttled", "transient", "failed", "cancelled"]
    retry_after: float | None = None
    seconds: float = 0.0
    tokens: int | None = None


class Slots:
    """One group's view of a throttle. Every acquire is followed by exactly one release."""

    __slots__ = ("_throttle", "acquired_at", "in_use", "lane", "now", "throttled_seconds")

    def __init__(self, throttle: Throttle, lane: Lane) -> None:
        self._throttle = throttle
        self.lane = lane
        #: The event loop's clock, read faster than through anyio.
        self.now = throttle._now
        self.in_use = 0
        #: When ``acquire_nowait()`` last took a slot.
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
        return self._throttle._paced

    def acquire_nowait(self, tokens: int = 0) -> bool:
        """Take a slot if a call may start at once.

        Args:
            tokens: an estimate of what the call will use.
        """
        throttle, lane = self._throttle, self.lane
        if lane.waiters or lane.in_use >= lane.limit:
            return False
        now = self.now()
        if throttle._paced and (throttle._waiting or throttle._opening(now, tokens) > now):
            return False
        throttle._start(self, now, tokens)
        self.acquired_at = now
        return True

    async def acquire(self, tokens: int = 0, *, first: bool = False) -> None:
        """Wait until a call may start, and take its slot.

        Cancellation while waiting leaves nothing taken.

        Args:
            tokens: an estimate of what the call will use.
            first: go ahead of those who wait (a retry, whose time is limited).
        """
        if self.acquire_nowait(tokens):
            try:
                await checkpoint()
            except BaseException:
                self._throttle._give_back(self, tokens)
                raise
            return
        await self._throttle._wait(Waiter(self, tokens), first=first)

    def release(self, outcome: Outcome, started: float | None = None) -> None:
        """Give the slot back, and say how the call went.

        Args:
            started: when the call started, by ``now()``; without it ``outcome.seconds`` counts.
        """
        self._throttle._release(self, outcome, started)


class Throttle:
    """Slots, pace and cooldown for one provider key and model on one event loop."""

    def __init__(self, model_id: str, settings: PromptSettings) -> None:
        self._now = loop_clock()
        self.throttled_seconds = 0.0
        self._fixed_requests, self._fixed_tokens = fixed_buckets(settings.rate_limit, self._now())
        self._announced = AnnouncedLimits()
        self._cooldowns = Cooldowns(model_id, settings.retries.timeout, self._cut, self._refused_alone)
        self._adaptive_lanes: dict[ConcurrencyBounds, Lane] = {}
        # Whether anything but the lanes can make somebody wait.
        self._paced = self._fixed_requests is not None or self._fixed_tokens is not None
        self._in_use = 0
        self._estimated_tokens = 0.0
        # Those who wait: in which lanes, how many, and who of them watches the clock.
        self._queues: list[Lane] = []
        self._waiting = 0
        self._leader: Waiter | None = None
        self._last_ticket = 0
        self._first_ticket = 0

    def slots(self, concurrency: int | ConcurrencyBounds) -> Slots:
        """Return a new view: with a limit of its own, or sharing the adaptive one with these bounds."""
        if isinstance(concurrency, int):
            return Slots(self, Lane(max(1, concurrency)))
        lane = self._adaptive_lanes.get(concurrency)
        if lane is None:
            lane = self._adaptive_lanes[concurrency] = Lane(AdaptiveLimit(concurrency, self._now()))
        return Slots(self, lane)

    def observe(self, status: int, headers: Mapping[str, str], age: float = 0.0) -> None:
        """Take note of a response's headers: the limits they announce, and what remains.

        Args:
            status: the response's HTTP status.
            headers: its headers, found by lower-case name.
            age: seconds since the request was sent.
        """
        now = self._now()
        sent_since = max(0, self._cooldowns.sent_since(now - age - 0.001) - 1)
        if self._announced.observe(now, headers, age, sent_since, refused=status in (429, 503, 529)):
            self._paced = True
            if self._announced.requests.known:
                for lane in self._adaptive_lanes.values():
                    if lane.adaptive is not None:
                        lane.adaptive.trust()
            if self._waiting:
                self._dispatch(now)

    # What follows is for Slots. Nothing of it but _wait() can be interrupted.

    def _opening(self, now: float, tokens: int) -> float:
        """Return when cooldown and pace let a call start: now, or later."""
        until = now
        if self._cooldowns.active:
            until = self._cooldowns.opening(now)
        if self._fixed_requests is not None:
            until = max(until, self._fixed_requests.opening(now))
        if self._fixed_tokens is not None:
            until = max(until, self._fixed_tokens.opening(now, tokens))
        if self._announced.known:
            until = max(until, self._announced.opening(now, tokens))
        return until

    def _start(self, slots: Holder, now: float, tokens: int) -> None:
        """Let a call start: take its slot, and its share of the pace."""
        slots.in_use += 1
        slots.lane.in_use += 1
        self._in_use += 1
        self._cooldowns.sent(now)
        if self._paced:
            self._take(now, 1.0, tokens)

    def _take(self, now: float, requests: float, tokens: float) -> None:
        self._estimated_tokens += tokens
        if self._fixed_requests is not None:
            self._fixed_requests.take(now, requests)
        if self._fixed_tokens is not None:
            self._fixed_tokens.take(now, tokens)
        if self._announced.known and requests > 0:
            self._announced.take(now, tokens)

    def _give_back(self, slots: Holder, tokens: int) -> None:
        """Undo ``_start()`` for a call that was cancelled before it began."""
        now = self._now()
        slots.in_use -= 1
        slots.lane.in_use -= 1
        self._in_use -= 1
        self._cooldowns.not_sent(now)
        if self._paced:
            self._take(now, -1.0, -tokens)
        if self._waiting:
            self._dispatch(now)

    def _release(self, slots: Slots, outcome: Outcome, started: float | None) -> None:
        lane = slots.lane
        slots.in_use -= 1
        lane.in_use -= 1
        if self._paced or outcome.kind != "ok" or lane.adaptive is not None:
            self._learn(lane, outcome, started)
        self._in_use -= 1
        if self._waiting:
            self._dispatch(self._now())

    def _learn(self, lane: Lane, outcome: Outcome, started: float | None) -> None:
        now = self._now()
        seconds = outcome.seconds if started is None else now - started
        if self._paced:
            # Which estimate was this call's is not known, only what all that run were estimated at.
            estimated = self._estimated_tokens / self._in_use
            self._estimated_tokens -= estimated
            if outcome.tokens is not None and self._fixed_tokens is not None:
                self._fixed_tokens.take(now, outcome.tokens - estimated)
        if outcome.kind == "ok":
            if lane.adaptive is not None:
                lane.adaptive.answered(now, seconds)
            if self._cooldowns.active:
                self._cooldowns.answered(now, seconds)
        elif outcome.kind == "throttled":
            self._cooldowns.refused(
                now, seconds, outcome.retry_after, self._in_use - 1, self._announced.explains_refusal
            )
            self._paced = self._paced or self._cooldowns.active

    def _cut(self, now: float, accepted: int) -> bool:
        """A pause is over that began when the provider was working on so many requests.

        Returns:
            whether that number is what it refused for.
        """
        for_number = False
        for lane in self._adaptive_lanes.values():
            if lane.adaptive is not None and lane.adaptive.refused(now, accepted):
                for_number = True
        return for_number

    def _refused_alone(self, now: float, accepted: int) -> None:
        for lane in self._adaptive_lanes.values():
            if lane.adaptive is not None:
                lane.adaptive.refused_alone(now, accepted)

    async def _wait(self, waiter: Waiter, *, first: bool) -> None:
        """Wait in the queue until somebody lets this waiter start."""
        slots, lane = waiter.slots, waiter.slots.lane
        self._enqueue(waiter, first=first)
        try:
            self._dispatch(self._now())
            while not waiter.granted:
                if self._leader is None:
                    self._leader = waiter
                if self._leader is waiter:
                    with anyio.CancelScope(deadline=self._next_opening(self._now())) as scope:
                        waiter.scope = scope
                        await waiter.event.wait()
                    waiter.scope = None
                    if not waiter.granted:
                        self._dispatch(self._now())
                else:
                    await waiter.event.wait()
                    if not waiter.granted:
                        # Woken to become the leader.
                        waiter.event = anyio.Event()
        except BaseException:
            if waiter.granted:
                self._give_back(slots, waiter.tokens)
            else:
                lane.waiters.remove(waiter)
                self._waiting -= 1
            raise
        finally:
            if self._leader is waiter:
                self._leader = None
                self._appoint_leader()

    def _enqueue(self, waiter: Waiter, *, first: bool) -> None:
        lane = waiter.slots.lane
        if not lane.waiters and lane not in self._queues:
            self._queues.append(lane)
        if first:
            self._first_ticket -= 1
            waiter.ticket = self._first_ticket
            lane.waiters.appendleft(waiter)
        else:
            self._last_ticket += 1
            waiter.ticket = self._last_ticket
            lane.waiters.append(waiter)
        self._waiting += 1
        waiter.blocked_before = lane.blocked_seconds

    def _appoint_leader(self) -> None:
        for lane in self._queues:
            if lane.waiters:
                # The last in line: it will have to be replaced the latest. It is the leader from now on, so
                # that it appoints another one even if it is cancelled before it runs.
                self._leader = lane.waiters[-1]
                self._leader.event.set()
                return

    def _dispatch(self, now: float) -> None:
        """Let everybody start who may, in the order they came."""
        while True:
            lane = self._next_lane(now)
            if lane is None:
                break
            waiter = lane.waiters[0]
            if self._paced and self._opening(now, waiter.tokens) > now:
                self._cooldowns.waited_for(now)
                break
            lane.waiters.popleft()
            self._waiting -= 1
            lane.note_blocked(now, blocked=False)
            blocked = lane.blocked_seconds - waiter.blocked_before
            waiter.slots.throttled_seconds += blocked
            self.throttled_seconds += blocked
            self._start(waiter.slots, now, waiter.tokens)
            waiter.granted = True
            waiter.event.set()
        for lane in self._queues:
            blocked = lane.in_use < lane.limit
            lane.note_blocked(now, blocked=blocked and bool(lane.waiters))
            if lane.adaptive is not None and (blocked or not lane.waiters):
                lane.adaptive.relax(now)
        self._queues = [lane for lane in self._queues if lane.waiters]
        if self._leader is not None and self._leader.scope is not None and not self._leader.granted:
            self._leader.scope.deadline = self._next_opening(now)

    def _next_lane(self, now: float) -> Lane | None:
        """Return the lane with room whose first waiter has waited longest."""
        chosen: Lane | None = None
        for lane in self._queues:
            if not lane.waiters:
                continue
            if lane.in_use >= lane.limit:
                if lane.adaptive is None:
                    continue
                lane.adaptive.press(now)
                if lane.in_use >= lane.limit:
                    continue
            if chosen is None or lane.waiters[0].ticket < chosen.waiters[0].ticket:
                chosen = lane
        return chosen

    def _next_opening(self, now: float) -> float:
        """Return when to look again, if nothing happens before."""
        until = math.inf
        for lane in self._queues:
            if not lane.waiters:
                continue
            if lane.in_use < lane.limit:
                until = min(until, self._opening(now, lane.waiters[0].tokens))
            elif lane.adaptive is not None:
                until = min(until, lane.adaptive.next_growth(now))
        return until


_throttles: RunVar[dict[tuple[bytes, str], Throttle]] = RunVar("datasette_llm_throttles")

#: Makes the registry's digests of keys useless outside of this process.
_SALT = os.urandom(16)

#: Throttles an event loop keeps; beyond that, the ones that nobody uses are forgotten, oldest first.
MOST_THROTTLES = 256


def get_throttle(key: str | None, model_id: str, settings: PromptSettings) -> Throttle:
    """Return this event loop's throttle for a provider key and a model; the key itself is not kept."""
    try:
        throttles = _throttles.get()
    except LookupError:
        throttles = {}
        _throttles.set(throttles)
    digest = hashlib.blake2b((key or "").encode(), key=_SALT, digest_size=16).digest()
    identity = (digest, model_id)
    throttle = throttles.pop(identity, None)
    if throttle is None:
        throttle = Throttle(model_id, settings)
        for old in [each for each, old in throttles.items() if not (old._in_use or old._waiting)]:
            if len(throttles) < MOST_THROTTLES:
                break
            del throttles[old]
    # Put back at the end: the order is that of last use.
    throttles[identity] = throttle
    return throttle

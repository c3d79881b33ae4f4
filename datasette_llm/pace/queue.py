"""How calls wait for their turn: no task, no polling, and whoever waits holds nothing.

One of those who wait, the *leader*, also waits for the clock, and lets the others in when it is time.
Everything but ``wait()`` is synchronous, so no state is ever seen half changed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lanes import Holder, Lane, Waiter


class Gate(Protocol):
    """What decides when a call may go whose lane has room."""

    #: Whether anything but the lanes can make somebody wait.
    paced: bool

    @property
    def away(self) -> bool:
        """Whether nobody can be reached, so that some may give up."""

    def opening(self, now: float, tokens: int) -> float:
        """Return when a call may start: now, or later."""

    def started(self, slots: Holder, now: float, tokens: int) -> float:
        """A call starts now; return when it did, on the clock."""

    def gave_back(self, slots: Holder, tokens: int, started: float) -> None:
        """A call that had started was cancelled before it began."""

    def held_back(self, now: float) -> None:
        """Somebody would start now, were it open."""

    def patience_ends(self, waiter: Waiter) -> float:
        """Return when somebody gives up waiting, as things are."""

    def given_up(self, waiter: Waiter) -> Exception:
        """Return what somebody is told who gives up."""


class Queue:
    """Those who wait in the lanes of one throttle."""

    def __init__(self, gate: Gate, clock: Callable[[], float]) -> None:
        self._gate = gate
        self._now = clock
        #: How many wait.
        self.waiting = 0
        self.throttled_seconds = 0.0
        self._lanes: list[Lane] = []
        self._leader: Waiter | None = None
        self._last_ticket = 0

    async def wait(self, waiter: Waiter) -> None:
        """Wait until somebody lets this waiter start.

        Raises:
            Exception: waiting any longer is pointless.
        """
        slots, lane = waiter.slots, waiter.slots.lane
        self._enqueue(waiter)
        try:
            self.dispatch(self._now())
            while not waiter.told:
                if self._leader is None:
                    self._leader = waiter
                if self._leader is waiter:
                    with anyio.CancelScope(deadline=self._next_opening(self._now())) as scope:
                        waiter.scope = scope
                        await waiter.event.wait()
                    waiter.scope = None
                    if not waiter.told:
                        self.dispatch(self._now())
                else:
                    await waiter.event.wait()
                    if not waiter.told:
                        # Woken to become the leader.
                        waiter.event = anyio.Event()
        except BaseException:
            if waiter.granted:
                self._gate.gave_back(slots, waiter.tokens, waiter.started)
            elif not waiter.told:
                lane.remove(waiter)
                self.waiting -= 1
            raise
        finally:
            if self._leader is waiter:
                self._leader = None
                self._appoint_leader()
        if waiter.error is not None:
            raise waiter.error

    def dispatch(self, now: float) -> None:
        """Let everybody start who may, in the order of their turns."""
        while True:
            waiter = self._next(now)
            if waiter is None:
                break
            if self._gate.paced and self._gate.opening(now, waiter.tokens) > now:
                self._gate.held_back(now)
                break
            lane = waiter.slots.lane
            lane.remove(waiter)
            self.waiting -= 1
            lane.note_blocked(now, blocked=False)
            blocked = lane.blocked_seconds - waiter.blocked_before
            waiter.slots.throttled_seconds += blocked
            self.throttled_seconds += blocked
            self.turn_of(waiter.slots)
            waiter.started = self._gate.started(waiter.slots, now, waiter.tokens)
            waiter.granted = True
            waiter.event.set()
        if self._gate.away:
            self._give_up(now)
        for lane in self._lanes:
            blocked = lane.in_use < lane.room
            lane.note_blocked(now, blocked=blocked and bool(lane.waiting))
            if lane.adaptive is not None and (blocked or not lane.waiting):
                lane.adaptive.relax(now)
        self._lanes = [lane for lane in self._lanes if lane.waiting]
        leader = self._leader
        if leader is not None and leader.scope is not None and not leader.told:
            leader.scope.deadline = self._next_opening(now)

    def turn_of(self, slots: Holder) -> None:
        """Somebody is let in: the others are before him now."""
        self._last_ticket += 1
        slots.last_turn = self._last_ticket

    def _enqueue(self, waiter: Waiter) -> None:
        lane = waiter.slots.lane
        if not lane.waiting and lane not in self._lanes:
            self._lanes.append(lane)
        self._last_ticket += 1
        waiter.ticket = self._last_ticket
        lane.add(waiter)
        self.waiting += 1
        waiter.blocked_before = lane.blocked_seconds

    def _appoint_leader(self) -> None:
        for lane in self._lanes:
            if lane.waiting:
                # One who will have to be replaced late. It is the leader from now on, so that it appoints
                # another one even if it is cancelled before it runs.
                self._leader = lane.last()
                self._leader.event.set()
                return

    def _next(self, now: float) -> Waiter | None:
        """Return whose turn it is, of the lanes that have room."""
        chosen: Waiter | None = None
        for lane in self._lanes:
            waiter = lane.next()
            if waiter is None:
                continue
            if not lane.has_room(urgent=waiter.slots.urgent):
                if lane.adaptive is None:
                    continue
                lane.adaptive.press(now)
                if lane.in_use >= lane.room:
                    continue
            if chosen is None or waiter.rank() < chosen.rank():
                chosen = waiter
        return chosen

    def _next_opening(self, now: float) -> float:
        """Return when to look again, if nothing happens before."""
        until = math.inf
        for lane in self._lanes:
            waiter = lane.next()
            if waiter is None:
                continue
            if lane.has_room(urgent=waiter.slots.urgent):
                until = min(until, self._gate.opening(now, waiter.tokens))
            elif lane.adaptive is not None:
                until = min(until, lane.adaptive.next_growth(now))
            if self._gate.away:
                until = min(until, min(map(self._gate.patience_ends, lane)))
        return until

    def _give_up(self, now: float) -> None:
        for lane in self._lanes:
            for waiter in [each for each in lane if self._gate.patience_ends(each) <= now]:
                lane.remove(waiter)
                self.waiting -= 1
                waiter.error = self._gate.given_up(waiter)
                waiter.event.set()

"""Who may call the model now: slots, pace and cooldown of one provider key and model.

A ``Throttle`` is shared by everybody on one event loop who uses the same key and model; ``slots.Slots`` is
one group's view of it. A call may start when four things hold:

1. its lane has room: a fixed number in flight, or the shared adaptive one (``adaptive``);
2. the provider can be reached (``outage``), or the call is the one that tries;
3. no cooldown runs: the provider refused something and everybody waits until it is over;
4. the pace allows it: configured limits (``pacing``), announced ones (``announced``), or the rate that
   was found out from refusals (``pacing.FoundRate``).

Whoever waits does so in the ``queue``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from weakref import ref

from ..backends.loops import loop_clock
from ..errors import ProviderUnreachable
from .adaptive import AdaptiveLimit
from .announced import AnnouncedLimits
from .cooldown import Cooldowns
from .lanes import Holder, Lane, Waiter
from .outage import Away, Outage
from .pacing import fixed_buckets
from .policy import Patience
from .queue import Queue
from .slots import Slots
from .tally import LastHour

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .outcome import Outcome
    from .policy import ConcurrencyBounds, PromptSettings

#: Seconds between two calls that start together.
MOMENT = 1e-6
#: Statuses that say that nobody is served now.
UNAVAILABLE = frozenset({502, 503, 504, 529})
#: Different prompts refused, with no answer between them, that show that it is not for what they ask.
ALL = 8


class Throttle:
    """Slots, pace and cooldown for one provider key and model on one event loop.

    Attributes:
        model_id: the model.
        key_name: where its key comes from, in words; never the key.
        hour: what happened in the last hour.
    """

    def __init__(self, model_id: str, settings: PromptSettings, key_name: str | None = None) -> None:
        self.now = loop_clock()
        self.model_id = model_id
        self.key_name = key_name
        self._known_lanes: list[ref[Lane]] = []
        self.hour = LastHour(self.now)
        self._fixed_requests, self._fixed_tokens = fixed_buckets(settings.rate_limit, self.now())
        self._announced = AnnouncedLimits()
        self._cooldowns = Cooldowns(model_id, settings.retries.timeout, self._cut, self._refused_alone)
        self._patience = Patience(settings.retries.timeout)
        self.outage = Outage(model_id)
        self._adaptive_lanes: dict[ConcurrencyBounds, Lane] = {}
        #: Whether anything but the lanes can make somebody wait.
        self.paced = self._fixed_requests is not None or self._fixed_tokens is not None
        self.in_use = 0
        self._estimated_tokens = 0.0
        #: When a call was answered with what it asked for, as far as that was looked at.
        self.served_at = -math.inf
        #: When the first call failed since then; ``inf`` if none did.
        self.unserved_since = math.inf
        # Who was refused since then.
        self._refused: set[object] = set()
        self._last_started = -math.inf
        self.queue = Queue(self, self.now)

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return self.queue.waiting

    @property
    def throttled_seconds(self) -> float:
        """How long they were kept waiting by anything but their number."""
        return self.queue.throttled_seconds

    @property
    def refusing(self) -> bool:
        """Whether a pause runs, or one call at a time tries whether it may."""
        return self._cooldowns.refusing

    @property
    def refuses_all(self) -> bool:
        """Whether several prompts were refused one after the other, and none was answered."""
        return len(self._refused) >= ALL

    @property
    def away(self) -> bool:
        """Whether the provider cannot be reached."""
        return self.outage.active

    def slots(
        self,
        concurrency: int | ConcurrencyBounds,
        *,
        patience: Patience | None = None,
        urgent: bool = False,
    ) -> Slots:
        """Return a new view: with a limit of its own, or sharing the adaptive one with these bounds.

        Args:
            patience: how long its calls wait for a provider that is away; by default as retries do.
            urgent: whether somebody waits for each answer: its calls go first.
        """
        patience = patience or self._patience
        if isinstance(concurrency, int):
            return Slots(self, self._known(Lane(max(1, concurrency))), patience, urgent)
        lane = self._adaptive_lanes.get(concurrency)
        if lane is None:
            lane = self._known(Lane(AdaptiveLimit(concurrency, self.now())))
            self._adaptive_lanes[concurrency] = lane
        return Slots(self, lane, patience, urgent)

    def observe(self, status: int, headers: Mapping[str, str], age: float = 0.0) -> None:
        """Take note of a response's headers: the limits they announce, and what remains.

        Args:
            status: the response's HTTP status.
            headers: its headers, found by lower-case name.
            age: seconds since the request was sent.
        """
        now = self.now()
        returned = self.outage.active and status not in UNAVAILABLE and self.outage.answered(now, now - age)
        sent_since = max(0, self._cooldowns.sent_since(now - age - 0.001) - 1)
        if self._announced.observe(now, headers, age, sent_since, refused=status in (429, 503, 529)):
            self.paced = True
            if self._announced.requests.known:
                for lane in self._adaptive_lanes.values():
                    if lane.adaptive is not None:
                        lane.adaptive.trust()
            returned = True
        if returned and self.waiting:
            self.queue.dispatch(now)

    def cooldown_seconds(self) -> float:
        """Return how long a refusal still keeps everybody waiting."""
        return self._cooldowns.seconds(self.now())

    def away_now(self) -> Away | None:
        """Say that the provider cannot be reached, if so."""
        outage, trouble = self.outage, self.outage.trouble
        if not outage.active or trouble is None:
            return None
        now = self.now()
        next_try = max(0.0, outage.next_probe - now) if not self.in_use else 0.0
        return Away(trouble.address, trouble.what, now - outage.began, next_try, outage.reached)

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that somebody uses, and the adaptive ones."""
        lanes = (known() for known in self._known_lanes)
        return [lane for lane in lanes if lane is not None]

    def _known(self, lane: Lane) -> Lane:
        # A new list each time: another thread may be looking at the old one.
        self._known_lanes = [*(known for known in self._known_lanes if known() is not None), ref(lane)]
        return lane

    def rates(self) -> dict[str, float]:
        """Return how many requests a second are let through, by where that is known from."""
        fixed = self._fixed_requests
        known = {
            "configured": None if fixed is None else fixed.rate,
            "announced": self._announced.requests.rate,
            "found": self._cooldowns.rate,
        }
        return {source: rate for source, rate in known.items() if rate is not None}

    # What follows is for slots and the queue.

    def people_ask(self) -> None:
        """Somebody asks who waits for the answer: see `AdaptiveLimit.people_ask`."""
        now = self.now()
        for lane in self._adaptive_lanes.values():
            if lane.adaptive is not None and lane.others_wait:
                lane.adaptive.people_ask(now)

    def opening(self, now: float, tokens: int) -> float:
        """Return when outage, cooldown and pace let a call start: now, or later."""
        until = now
        if self.outage.waiting:
            until = self.outage.opening(now, self.in_use)
        if self._cooldowns.active:
            until = max(until, self._cooldowns.opening(now))
        if self._fixed_requests is not None:
            until = max(until, self._fixed_requests.opening(now))
        if self._fixed_tokens is not None:
            until = max(until, self._fixed_tokens.opening(now, tokens))
        if self._announced.known:
            until = max(until, self._announced.opening(now, tokens))
        return until

    def started(self, slots: Holder, now: float, tokens: int) -> float:
        """Let a call start: take its slot, and its share of the pace; return when it did."""
        # No two at the same moment, so that each is known by it.
        now = self._last_started = max(now, self._last_started + MOMENT)
        slots.in_use += 1
        slots.lane.in_use += 1
        self.in_use += 1
        self._cooldowns.sent(now)
        adaptive = slots.lane.adaptive
        if adaptive is not None:
            adaptive.sent(now)
        if self.outage.active:
            self.outage.sent(now)
        if self.paced:
            self._take(now, 1.0, tokens)
        return now

    def _take(self, now: float, requests: float, tokens: float) -> None:
        self._estimated_tokens += tokens
        if self._fixed_requests is not None:
            self._fixed_requests.take(now, requests)
        if self._fixed_tokens is not None:
            self._fixed_tokens.take(now, tokens)
        if self._announced.known and requests > 0:
            self._announced.take(now, tokens)

    def gave_back(self, slots: Holder, tokens: int, started: float) -> None:
        """Undo ``started()`` for a call that was cancelled before it began."""
        now = self.now()
        if slots.lane.adaptive is not None:
            slots.lane.adaptive.ended(now, started, answered=False)
        slots.in_use -= 1
        slots.lane.in_use -= 1
        self.in_use -= 1
        self._cooldowns.not_sent(now)
        if self.outage.active:
            self.outage.not_sent(now)
        if self.paced:
            self._take(now, -1.0, -tokens)
        if self.waiting:
            self.queue.dispatch(now)

    def held_back(self, now: float) -> None:
        """Somebody would start now, did the pace allow it."""
        self._cooldowns.waited_for(now)

    def patience_ends(self, waiter: Waiter) -> float:
        """Return when somebody gives up who waits for a provider that is away."""
        outage, patience = self.outage, waiter.slots.patience
        since = outage.began if patience.together else max(outage.began, waiter.since)
        seconds = patience.seconds
        if not outage.reached:
            seconds = min(seconds, patience.first_contact)
        return since + seconds

    def given_up(self, waiter: Waiter) -> Exception:
        """Return what those are told whose patience has ended."""
        away, trouble = self.away_now(), self.outage.trouble
        assert away is not None
        assert trouble is not None
        error = ProviderUnreachable(away.address, away.what, away.seconds, reached=away.reached)
        error.__cause__ = trouble.error.with_traceback(None)
        return error

    def release(self, slots: Holder, outcome: Outcome, started: float | None, prompt: object) -> None:
        """Take a slot back; see `Slots.release`."""
        lane = slots.lane
        slots.in_use -= 1
        lane.in_use -= 1
        unserved = self.unserved_since < math.inf or not self.outage.forgotten
        if unserved or self.paced or outcome.kind != "ok" or lane.adaptive is not None:
            self._learn(lane, outcome, started, prompt)
        self.in_use -= 1
        if self.waiting:
            self.queue.dispatch(self.now())

    def _learn(self, lane: Lane, outcome: Outcome, started: float | None, prompt: object) -> None:
        now = self.now()
        seconds = outcome.seconds if started is None else now - started
        beside = 1
        if lane.adaptive is not None:
            sent = now - seconds if started is None else started
            answered, refused = outcome.kind == "ok", outcome.kind == "throttled"
            beside = lane.adaptive.ended(now, sent, answered=answered, refused=refused)
        if self.paced:
            # Which estimate was this call's is not known, only what all that run were estimated at.
            estimated = self._estimated_tokens / self.in_use
            self._estimated_tokens -= estimated
            if outcome.tokens is not None and self._fixed_tokens is not None:
                self._fixed_tokens.take(now, outcome.tokens - estimated)
        if outcome.trouble is not None:
            # When others are answered, somebody is there: then silence is about the line, or about this one.
            if not outcome.trouble.silent or self.outage.answered_at <= now - seconds:
                self._learn_trouble(now, now - seconds, outcome, prompt)
        elif outcome.kind != "cancelled" and outcome.answered:
            self._learn_answer(now, now - seconds)
        elif self.outage.active:
            self.outage.not_sent(now)
        if outcome.kind == "ok":
            self.served_at, self.unserved_since = now, math.inf
            self._refused.clear()
            if lane.adaptive is not None:
                lane.adaptive.answered(now, seconds, beside, waiting=lane.waiting > 0)
            if self._cooldowns.active:
                self._cooldowns.answered(now, seconds)
        elif outcome.kind != "cancelled":
            self.unserved_since = min(self.unserved_since, now)
            if outcome.kind == "throttled" and len(self._refused) < ALL:
                self._refused.add(prompt)
        if outcome.kind == "throttled" and not self.outage.active:
            self._cooldowns.refused(
                now, seconds, outcome.retry_after, self.in_use - 1, self._announced.explains_refusal
            )
            self.paced = self.paced or self._cooldowns.active

    def _learn_trouble(self, now: float, sent: float, outcome: Outcome, prompt: object) -> None:
        assert outcome.trouble is not None
        if self.outage.failed(now, sent, outcome.trouble, self.in_use - 1, outcome.retry_after, prompt):
            self.paced = True
            # Whatever refusals there were, they were not for anybody's rate or number.
            self._cooldowns.call_off()

    def waited_in_line(self, lane: Lane, now: float, sent: float) -> bool:
        """Whether a call that was given up had waited in line while others were answered."""
        adaptive = lane.adaptive
        others = self.outage.answered_at > sent
        return others and adaptive is not None and adaptive.given_up(now, now - sent)

    def _learn_answer(self, now: float, sent: float) -> None:
        outage = self.outage
        if not outage.answered(now, sent) and outage.room < math.inf:
            outage.widened(max((lane.limit for lane in self._adaptive_lanes.values()), default=64))

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

    def _refused_alone(self, now: float, accepted: int, paced: bool) -> bool:
        """See `AdaptiveLimit.refused_alone`."""
        for_number = False
        for lane in self._adaptive_lanes.values():
            if lane.adaptive is not None and lane.adaptive.refused_alone(now, accepted, paced=paced):
                for_number = True
        return for_number

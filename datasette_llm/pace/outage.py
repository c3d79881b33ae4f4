"""A provider that is away: nobody is answered, whatever is tried.

States of an ``Outage``, and what leads from one to the next:

* *open* -> *away*: calls fail in a row, with no answer between them, because nobody takes them: refused or
  broken connections, unknown names, 502, 503, 504 and 529. So many of them that it is no chance (``RUN`` and
  as many as are still out), or a few over a second or more.
* *away*: one call at a time, the probe, at growing intervals. Everybody else waits.
* *away* -> *returning*: a call that was sent since then is answered, with whatever.
* *returning* -> *open*: few calls at a time first; each answer lets two more in, until all may.
* *returning* -> *away*: two failures in a row.

Times are the event loop's, in seconds.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .outcome import Trouble

logger = logging.getLogger("datasette_llm")

#: Failures in a row that are no chance, besides as many as are still out. Of a provider that breaks every
#: other connection one run in 250 is as long.
RUN = 8
#: Failures in a row that are none either, if they are so many seconds apart.
FEW, FEW_SECONDS = 3, 1.0
#: The same while the provider only just came back.
FEW_AGAIN = 2
#: Seconds from one probe to the next: this share of the time that the outage has lasted, between these.
INTERVAL_SHARE, INTERVAL_MIN, INTERVAL_MAX = 0.25, 1.0, 30.0
#: A probe that is out so many times longer than any that failed has found somebody: the next one may go.
OUTLIVED, OUTLIVED_SECONDS = 3.0, 1.0
#: Calls at a time when a probe has got through.
RETURNING = 2


class Away(NamedTuple):
    """A provider that cannot be reached, at one moment.

    Attributes:
        address: whom it was tried to reach, if that is known: host and port.
        what: what happened at the last try.
        seconds: since when nobody was answered.
        next_try: seconds until the next try; 0 while one is under way.
        reached: whether it ever answered.
    """

    address: str | None
    what: str
    seconds: float
    next_try: float
    reached: bool


class Outage:
    """Whether the provider of one throttle can be reached.

    Attributes:
        active: whether it is away.
        began: since when nobody was answered: the last answer, or when the first call was sent that failed if
            that was later; if active.
        trouble: what the last failure was; if active.
        reached: whether there ever was an answer.
        next_probe: when the next probe may be sent; ``inf`` while one is out.
        answered_at: when something was answered last.
        room: how many calls may be out while it returns; ``inf`` otherwise.
    """

    def __init__(self, model_id: str) -> None:
        self.active = False
        self.began = 0.0
        self.trouble: Trouble | None = None
        self.reached = False
        self.next_probe = 0.0
        self.room = math.inf
        self.answered_at = -math.inf
        self._model_id = model_id
        self._known_at = 0.0
        # When the first call was sent that failed: it may have waited in line while others were answered.
        self._first_sent = 0.0
        self._ended_at = -math.inf
        self._over_seconds = 0.0
        # The run of failures without an answer.
        self._run = 0
        self._run_alone = True
        self._run_sent = self._run_failed = 0.0
        self._prompts: set[object] = set()
        self._slowest = 0.0
        self._out = 0
        self._probe_at = -math.inf

    @property
    def waiting(self) -> bool:
        """Whether calls have to wait for it: it is away, or returning."""
        return self.active or self.room < math.inf

    @property
    def forgotten(self) -> bool:
        """Whether another answer would tell nothing new."""
        return self.reached and self._run == 0 and not self.waiting

    def seconds(self, now: float) -> float:
        """Return how long it has been away, all outages together, and what may turn out to be one."""
        if self.active:
            return self._over_seconds + now - self.began
        if self._run:
            return self._over_seconds + now - max(self._run_sent, self.answered_at)
        return self._over_seconds

    def covers(self, sent: float, *, alone: bool) -> bool:
        """Whether a call that failed did so because the provider is, or was, away.

        Args:
            sent: when it was sent.
            alone: whether that may have been its own fault; then it counts only if others had failed before.
        """
        if not self.active and sent > self._ended_at:
            return False
        return sent >= (self._known_at if alone else self._first_sent)

    def answered(self, now: float, sent: float) -> bool:
        """A call was answered that had been sent at a moment; return whether that ends the outage."""
        self.reached = True
        self.answered_at = now
        self._run = 0
        if self.active:
            if sent < self._known_at:
                return False
            self._over_seconds += now - self.began
            self._ended_at = now
            self.active = False
            self.trouble = None
            self.room = RETURNING
            logger.warning(
                "Model %s can be reached again, after %.0f seconds", self._model_id, now - self.began
            )
            return True
        if self.room < math.inf:
            self.room += 2
        return False

    def failed(
        self, now: float, sent: float, trouble: Trouble, out: int, retry_after: float | None, prompt: object
    ) -> bool:
        """A call found nobody; return whether that begins an outage.

        Args:
            sent: when it was sent.
            out: how many others are still out.
            retry_after: how many seconds the provider asked to wait.
            prompt: whose call it was; only compared.
        """
        self.reached = self.reached or trouble.answered
        if self.active:
            self.trouble = trouble
            self._slowest = max(self._slowest, now - sent)
            if sent >= self._known_at:
                wait = min(max(INTERVAL_SHARE * (now - self.began), INTERVAL_MIN), INTERVAL_MAX)
                self.next_probe = now + max(wait, min(retry_after or 0.0, INTERVAL_MAX))
            return False
        if self._run == 0:
            self._run_sent, self._run_failed = sent, now
            self._run_alone = True
            self._prompts.clear()
            self._slowest = 0.0
        self._run += 1
        self._run_sent = min(self._run_sent, sent)
        self._run_alone = self._run_alone and trouble.alone
        self._slowest = max(self._slowest, now - sent)
        if self._run_alone and len(self._prompts) < FEW:
            self._prompts.add(prompt)
            if len(self._prompts) < FEW:
                return False
        if not self._is_no_chance(now, out):
            return False
        self.active = True
        self.began, self._known_at = max(self._run_sent, self.answered_at), now
        self._first_sent = self._run_sent
        self.trouble = trouble
        self.room = math.inf
        self._prompts.clear()
        self.next_probe = now + max(INTERVAL_MIN, min(retry_after or 0.0, INTERVAL_MAX))
        logger.warning(
            "Model %s: no connection to %s (%s); trying again now and then",
            self._model_id, trouble.address or "the provider", trouble.what,
        )  # fmt: skip
        return True

    def _is_no_chance(self, now: float, out: int) -> bool:
        if self.room < math.inf:
            return self._run >= FEW_AGAIN
        if self._run >= RUN + out:
            return True
        return self._run >= max(FEW, out) and now - self._run_failed >= FEW_SECONDS

    def opening(self, now: float, out: int) -> float:
        """Return when the next call may go; ``inf`` if something has to happen before.

        Args:
            out: how many calls are out.
        """
        if self.active:
            return self.next_probe
        return now if out < self.room else math.inf

    def sent(self, now: float) -> None:
        """A call is sent while the provider is away: the probe."""
        self.next_probe = now + OUTLIVED_SECONDS + OUTLIVED * self._slowest

    def not_sent(self, now: float) -> None:
        """The probe was cancelled."""
        self.next_probe = min(self.next_probe, now + INTERVAL_MIN)

    def widened(self, limit: int) -> None:
        """All that may be out at a time are let in again, once there is room for so many."""
        if self.room >= limit:
            self.room = math.inf

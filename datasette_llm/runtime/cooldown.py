"""What a refusal means for everybody: one pause, then the rate that was found out.

A refusal is one of these:

1. It belongs to the pause that runs or just ended: the request was sent before. It is only counted.
2. It is the first in a while: a pause begins, as long as the provider asks for.
3. It is a lone one: the rate was found out or announced already, or refusals were seen to strike at random
   while requests sent later passed. Only the refused prompt waits; the pace is lowered a little.
4. It is one of several at once: a pause, as for 2.

A pause ends early when requests that were sent after the refused one are being answered.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .pacing import Bucket, FoundRate

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("datasette_llm")

#: The pause when the provider does not say how long, in seconds: at first, and at most after doublings.
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 30.0
#: Answers to requests sent after the refused one that end a pause early.
ANSWERS_TO_RESUME = 3
#: Refusals within so many seconds count as "at once", from so many on and from this share of the requests.
AT_ONCE_SECONDS, AT_ONCE, AT_ONCE_SHARE = 0.3, 3, 0.1
#: A gap in sending that ends what is counted as "busy", in seconds.
IDLE_SECONDS = 1.0


@dataclass(slots=True)
class _Pause:
    begun: float
    until: float
    refused_was_sent: float
    in_flight: int
    sent: int
    refused: int = 1
    answered_later: int = 0
    ended: bool = False


class Cooldowns:
    """The pauses of one provider key and model, and the pace after them.

    Args:
        model_id: for the log.
        most_seconds: no pause is longer, whatever the provider asks for.
        cut: told, when a pause is over, how many requests the provider was working on as it refused.
    """

    def __init__(self, model_id: str, most_seconds: float, cut: Callable[[float, int], None]) -> None:
        self.active = False
        self.most_seconds = most_seconds
        self._model_id = model_id
        self._cut = cut
        self._found = FoundRate()
        self._pause: _Pause | None = None
        self._trial: Bucket | None = None
        self._strike_at_random = False
        self._refused_in_a_row = 0
        self._sent: deque[float] = deque(maxlen=4096)
        self._sent_count = 0
        self._refused_count = 0
        self._refused_at: deque[float] = deque(maxlen=64)
        self._accepted_at_pause = 0

    @property
    def pausing(self) -> bool:
        return self._pause is not None and not self._pause.ended

    @property
    def rate(self) -> float | None:
        """Requests a second that were found to be accepted, if that is known."""
        return self._found.bucket.rate if self._found.bucket is not None else None

    def opening(self, now: float) -> float:
        """Return when the next request may be sent."""
        pause = self._pause
        if pause is not None and not pause.ended:
            if now < pause.until:
                return pause.until
            self._end(pause, now)
        until = now
        if self._found.bucket is not None:
            until = self._found.bucket.opening(now)
        if self._trial is not None:
            until = max(until, self._trial.opening(now))
        return until

    def sent(self, now: float) -> None:
        """A request is sent now."""
        self._sent.append(now)
        self._sent_count += 1
        if self.active:
            if self._found.bucket is not None:
                self._found.bucket.take(now)
            if self._trial is not None:
                self._trial.take(now)

    def not_sent(self, now: float) -> None:
        """The request that ``sent()`` was called for was cancelled before it could be."""
        self._sent_count -= 1
        if self._found.bucket is not None:
            self._found.bucket.take(now, -1.0)
        if self._trial is not None:
            self._trial.take(now, -1.0)

    def waited_for(self, now: float) -> None:
        """Somebody waits for the pace: it may be tried upward."""
        self._found.probe(now)

    def answered(self, now: float, seconds: float) -> bool:
        """A request was accepted and answered; return whether that ends a pause."""
        pause = self._pause
        if pause is None:
            return False
        sent = now - seconds
        if pause.ended:
            if self._trial is not None and sent >= pause.until:
                self._trial = None
                self._refused_in_a_row = 0
                return True
            return False
        if sent > pause.refused_was_sent:
            pause.answered_later += 1
            if pause.answered_later >= ANSWERS_TO_RESUME and pause.answered_later > 10 * (pause.refused - 1):
                self._strike_at_random = True
                pause.until, pause.ended = now, True
                self._found.lone_refusal(now)
                self._log_end()
                return True
        return False

    def refused(
        self, now: float, seconds: float, retry_after: float | None, in_flight: int, announced: bool
    ) -> None:
        """A request was refused that had been sent so many seconds ago.

        Args:
            in_flight: how many others are on their way.
            announced: whether the pace follows limits that the provider announces.
        """
        self._refused_count += 1
        pause = self._pause
        sent = now - seconds
        if pause is not None and (not pause.ended or sent < pause.until):
            # Case 1.
            pause.refused += 1
            if not pause.ended and retry_after is not None:
                pause.until = max(pause.until, now + min(retry_after, self.most_seconds))
            return
        self._refused_at.append(now)
        if (announced or self._strike_at_random or self._found.bucket is not None) and not self._at_once(now):
            # Case 3.
            self._found.lone_refusal(now)
            return
        # Cases 2 and 4.
        wait = retry_after
        if wait is None:
            wait = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS * 2**self._refused_in_a_row)
        wait = min(wait, self.most_seconds)
        self.active = True
        self._pause = _Pause(now, now + wait, sent, in_flight, self._sent_count)
        self._found.begin_episode(now)
        logger.warning("Model %s: rate limit reached, no prompts for %.1f seconds", self._model_id, wait)

    def _at_once(self, now: float) -> bool:
        since = now - AT_ONCE_SECONDS
        refused = sum(1 for at in self._refused_at if at >= since)
        if self._found.bucket is not None and self._found.measurements == 0:
            # The rate is only guessed, too high: what matters is to measure it soon.
            return refused >= 2
        if refused < AT_ONCE:
            return False
        sent = 0
        for at in reversed(self._sent):
            if at < since:
                break
            sent += 1
        return refused >= AT_ONCE_SHARE * sent

    def _end(self, pause: _Pause, now: float) -> None:
        pause.ended = True
        accepted = self._sent_count - self._refused_count
        since_last = accepted - self._accepted_at_pause
        self._accepted_at_pause = accepted
        if since_last > 0:
            self._refused_in_a_row = 0
        else:
            # Nothing at all passes: let in one at a time, until one is answered.
            self._refused_in_a_row += 1
            self._trial = Bucket(1.0, 1.0, 1.0, now)
        busy_seconds, busy = self._busy_before(pause.begun)
        self._found.end_episode(now, accepted, busy_seconds, max(0, busy - pause.refused))
        self._cut(now, max(0, pause.in_flight - (pause.refused - 1)))
        self._log_end()

    def _busy_before(self, moment: float) -> tuple[float, int]:
        number, earliest = 0, moment
        for at in reversed(self._sent):
            if at > moment:
                continue
            if earliest - at > IDLE_SECONDS:
                break
            number, earliest = number + 1, at
        return moment - earliest, number

    def _log_end(self) -> None:
        rate = self.rate
        pace = "" if rate is None else f", at most {rate:.1f} a second"
        logger.info("Model %s: prompts are sent again%s", self._model_id, pace)

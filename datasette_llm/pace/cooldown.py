"""What a refusal means for everybody: one pause, then the rate that was found out.

A refusal is one of these:

1. It belongs to the pause that runs or just ended: the request was sent before. It is only counted.
2. It is the first that this provider gives, or asks for a long wait: a pause begins, as long as it asks for.
3. It is a lone one among many answers: only the refused prompt waits, and the number in flight is told. Once
   the rate was found out or announced it is lowered a little.
4. It is one of several: a pause, as for 2.

A pause ends early when requests that were sent after the refused one are being answered.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .overtaking import SAME_MOMENT_SECONDS
from .pacing import Bucket, FoundRate

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("datasette_llm")

#: The pause when the provider does not say how long, in seconds: at first, and at most after doublings.
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 30.0
#: No pause is shorter, or those who were on their way would be refused after it, and be taken for news.
PAUSE_SECONDS_MIN = 0.15
#: Answers to requests sent after the refused one that end a pause early.
ANSWERS_TO_RESUME = 3
#: Refusals within so many seconds count as "at once", from so many on and from this share of the requests.
AT_ONCE_SECONDS, AT_ONCE, AT_ONCE_SHARE = 0.3, 3, 0.1
#: The same once refusals were seen to strike at random.
AT_ONCE_AT_RANDOM, AT_ONCE_AT_RANDOM_SHARE = 5, 0.2
#: Requests that such a judgement takes, at least.
ENOUGH_REQUESTS = 20
#: A provider that has accepted so many requests may refuse one by chance, if it asks for no longer wait than
#: this, in seconds; it is no chance any more when so many are refused, and this share of what was sent.
ENOUGH_ACCEPTED, SHORT_WAIT_SECONDS = 20, 0.5
NO_CHANCE, NO_CHANCE_SHARE = 4, 0.2
#: So many accepted requests show that the last refusal was the only one.
SINGLE_REFUSAL_REQUESTS = 30
#: A gap in sending, in seconds, after which what was sent before does not count.
IDLE_SECONDS = 5.0


@dataclass(slots=True)
class _Pause:
    begun: float
    until: float
    refused_was_sent: float
    in_flight: int
    refused: int = 1
    answered_later: int = 0
    ended: bool = False


class Cooldowns:
    """The pauses of one provider key and model, and the pace after them.

    Args:
        model_id: for the log.
        most_seconds: no pause is longer, whatever the provider asks for.
        cut: told, when a pause is over, how many requests the provider was working on as it refused; says
            whether that is the reason for the refusal.
        refused_alone: told the same of a single refused request, and whether a found rate was followed; says
            whether that rate is refuted.
    """

    def __init__(
        self,
        model_id: str,
        most_seconds: float,
        cut: Callable[[float, int], bool],
        refused_alone: Callable[[float, int, bool], bool],
    ) -> None:
        self.active = False
        self.most_seconds = most_seconds
        self._model_id = model_id
        self._cut = cut
        self._refused_alone = refused_alone
        self._found = FoundRate()
        self._pause: _Pause | None = None
        self._trial: Bucket | None = None
        # Pauses in a row that ended early.
        self._lifted = 0
        self._refused_in_a_row = 0
        self._sent: deque[float] = deque(maxlen=4096)
        self._sent_count = 0
        self._lone_at = -math.inf
        # How many had been accepted when a pause with one refusal only was over.
        self._single_refusal_at = -math.inf
        self._refused_count = 0
        self._refused_at: deque[float] = deque(maxlen=64)
        # The latest ones that were refused outside of pauses, newest first: how many had been sent before
        # and until then.
        self._latest: deque[tuple[int, int]] = deque(maxlen=32)
        self._accepted_at_pause = 0
        # Whether what was sent after the last pause was answered: somebody is there, and has a limit.
        self._served_since = False

    @property
    def pausing(self) -> bool:
        return self._pause is not None and not self._pause.ended

    @property
    def refusing(self) -> bool:
        """Whether a pause runs, or one request at a time tries whether it may be sent."""
        return self.pausing or self._trial is not None

    @property
    def _strikes_at_random(self) -> bool:
        return self._lifted >= 2

    @property
    def rate(self) -> float | None:
        """Requests a second that were found to be accepted, if that is known."""
        return self._found.bucket.rate if self._found.bucket is not None else None

    def seconds(self, now: float) -> float:
        """Return how long everybody still waits after a refusal."""
        pause = self._pause
        return 0.0 if pause is None or pause.ended else max(0.0, pause.until - now)

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

    def sent_since(self, moment: float) -> int:
        """Return how many requests were sent after that moment."""
        number = 0
        for at in reversed(self._sent):
            if at <= moment:
                break
            number += 1
        return number

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
            self._served_since = self._served_since or sent >= pause.until
            if self._trial is not None and sent >= pause.until:
                self._trial = None
                self._refused_in_a_row = 0
                return True
            return False
        if sent >= pause.refused_was_sent - 0.001:
            pause.answered_later += 1
            if pause.answered_later >= ANSWERS_TO_RESUME and pause.answered_later > 8 * pause.refused:
                self._lifted += 1
                pause.until, pause.ended = now, True
                self._log_end()
                return True
        return False

    def refused(
        self, now: float, seconds: float, retry_after: float | None, in_flight: int, explained: bool
    ) -> None:
        """A request was refused that had been sent so many seconds ago.

        Args:
            in_flight: how many others are on their way.
            explained: whether the provider announced that nothing remains; the pace follows that.
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
        if self._trial is not None and not explained:
            pass  # Case 4: since the last pause nothing has passed.
        elif explained or self._strikes_at_random or self._found.bucket is not None:
            # Those that were on their way when the last one was refused tell nothing new.
            if sent > self._lone_at:
                self._refused_at.append(now)
            if not self._at_once():
                # Case 3.
                paced = self._found.bucket is not None
                if sent > self._lone_at and not explained and self._refused_alone(now, in_flight, paced):
                    self._found.forget()
                if sent > self._lone_at and not self._strikes_at_random:
                    if self._found.lone_refusal(
                        now, self._sent_count - self._refused_count, list(self._sent)
                    ):
                        self._lifted = 2
                        self._found.forget()
                    self._lone_at = now
                return
        elif self._by_chance(now, seconds, retry_after):
            # Case 3.
            self._refused_alone(now, in_flight, False)
            return
        # Cases 2 and 4.
        wait = retry_after
        if wait is None:
            wait = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS * 2**self._refused_in_a_row)
        wait = min(max(wait, PAUSE_SECONDS_MIN), self.most_seconds)
        self.active = True
        self._refused_at.clear()
        self._latest.clear()
        self._pause = _Pause(now, now + wait, sent, in_flight)
        logger.warning("Model %s: rate limit reached, no prompts for %.1f seconds", self._model_id, wait)

    def call_off(self) -> None:
        """Nobody can be reached: the refusals tell nothing about a limit, and the pause is over."""
        if not self._served_since:
            self._found.forget()
        if self.pausing and self._pause is not None:
            self._pause.until, self._pause.ended = self._pause.begun, True
        self._trial = None
        self._refused_in_a_row = 0
        self._refused_at.clear()

    def _by_chance(self, now: float, seconds: float, retry_after: float | None) -> bool:
        """Whether a refusal is most likely nothing that concerns others."""
        latest, count, sent = self._latest, self._sent_count, now - seconds
        # Those that were sent in the same moment arrive in any order: it stands for all of them.
        latest.appendleft(
            (
                count - self.sent_since(sent - SAME_MOMENT_SECONDS),
                count - self.sent_since(sent + SAME_MOMENT_SECONDS),
            )
        )
        if retry_after is not None and retry_after > SHORT_WAIT_SECONDS:
            return False
        first, last = latest[0]
        for refused, (before, until) in enumerate(latest, 1):
            first, last = min(first, before), max(last, until)
            if refused >= NO_CHANCE and refused >= NO_CHANCE_SHARE * (last - first):
                return False
        # Refusals come back sooner than answers: who was sent long enough ago was accepted.
        on_their_way = self.sent_since(now - 2 * seconds - 0.01)
        return count - on_their_way - self._refused_count >= ENOUGH_ACCEPTED

    def _at_once(self) -> bool:
        if not self._refused_at:
            return False
        now = self._refused_at[-1]
        since = now - AT_ONCE_SECONDS
        if len(self._sent) >= ENOUGH_REQUESTS:
            since = min(since, self._sent[-ENOUGH_REQUESTS])
        if self._pause is not None:
            since = max(since, self._pause.until)
        refused = sum(1 for at in self._refused_at if at >= since)
        least, share = AT_ONCE, AT_ONCE_SHARE
        if self._strikes_at_random:
            least, share = AT_ONCE_AT_RANDOM, AT_ONCE_AT_RANDOM_SHARE
        elif self._found.bucket is not None and not self._found.measured:
            # The rate is only guessed, too high: what matters is to measure it soon.
            least = 2
        return refused >= least and refused >= share * self.sent_since(since)

    def _end(self, pause: _Pause, now: float) -> None:
        pause.ended = True
        self._served_since = False
        lifted, self._lifted = self._lifted, 0
        accepted = self._sent_count - self._refused_count
        since_last = accepted - self._accepted_at_pause
        self._accepted_at_pause = accepted
        if since_last > 0:
            self._refused_in_a_row = 0
        else:
            # Nothing at all passes: let in one at a time, until one is answered.
            self._refused_in_a_row += 1
            self._trial = Bucket(1.0, 1.0, 1.0, now)
        if pause.refused == 1:
            self._refused_alone(now, pause.in_flight, False)
            apart = accepted - self._single_refusal_at
            self._single_refusal_at = accepted
            if SINGLE_REFUSAL_REQUESTS < apart < math.inf:
                # Were there a limit on rate or number, the second would have come soon after the first.
                self._lifted = lifted + 1
                self._found.forget()
                self._log_end()
                return
        if self._cut(now, max(0, pause.in_flight - (pause.refused - 1))):
            self._found.forget()
        else:
            busy = self._busy_until(pause.begun)
            # The bucket was empty from the first refusal on, so it is the latest that were refused.
            accepted_at = busy[: max(0, len(busy) - pause.refused)]
            self._found.learn(now, pause.refused_was_sent, accepted_at, accepted)
        self._log_end()

    def _busy_until(self, moment: float) -> list[float]:
        """Return when requests were sent before a moment, back to the last long gap."""
        busy: list[float] = []
        last = moment
        for at in reversed(self._sent):
            if last - at > IDLE_SECONDS:
                break
            if at <= moment:
                busy.append(at)
                last = at
        busy.reverse()
        return busy

    def _log_end(self) -> None:
        rate = self.rate
        pace = "" if rate is None else f", at most {rate:.1f} a second"
        logger.info("Model %s: prompts are sent again%s", self._model_id, pace)

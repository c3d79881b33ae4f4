"""How the prompts of one owner stand with their provider: welcome, refused for good, or waiting for a quota.

One `Standing` for each key that is used. Once it is refused, no more calls are made: the provider's error
is everybody's. A quota that comes back within the owner's patience is sat out instead: whoever would call
waits, once and together, and none of it counts as anybody's attempt.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

import anyio

if TYPE_CHECKING:
    from .failures import Failure
    from .refusals import Reason

logger = logging.getLogger("datasette_llm")

#: How often a quota is tried that does not say when it comes back, in seconds.
UNKNOWN_SECONDS = 900.0
#: Providers round down what they ask to wait.
MARGIN_SECONDS = 1.0
#: Refusals without an answer between them that show that a key, or a model, which has worked is gone:
#: a single one also comes from a provider's bad moment.
DOUBTS = 3


class Refusal(NamedTuple):
    """What all further prompts are refused with.

    Attributes:
        error: the provider's own.
        reason: why no prompt can escape it.
        retry_after: seconds after which it may be over, if the provider said so.
    """

    error: Exception
    reason: Reason
    retry_after: float | None = None


class Standing:
    """What one key's calls have been told.

    Args:
        model_id: for the log.
        patience: how long a used up quota is sat out, in seconds.

    Attributes:
        refusal: set once no more calls are to be made.
    """

    __slots__ = ("_doubts", "_model_id", "_patience", "_used_up_at", "_welcome", "refusal", "until")

    def __init__(self, model_id: str, patience: float = 0.0) -> None:
        self.refusal: Refusal | None = None
        #: Until when a quota is sat out, on the event loop's clock.
        self.until = -math.inf
        self._model_id = model_id
        self._patience = patience
        # Since when the quota is used up, without an answer since.
        self._used_up_at: float | None = None
        self._welcome = False
        self._doubts = 0

    def answered(self) -> None:
        """A call has been answered."""
        self._welcome = True
        self._doubts = 0
        if self._used_up_at is not None and anyio.current_time() >= self.until:
            self._used_up_at = None

    def refused(self, error: Exception, failure: Failure) -> bool:
        """A call failed with what no other one can escape.

        Returns:
            whether it may be made again, when `wait` has returned.
        """
        reason = failure.reason
        if reason is None:
            return False
        if reason == "quota" and self._sit_out(failure.retry_after):
            return True
        if self._welcome and reason in ("key", "model"):
            self._doubts += 1
            if self._doubts < DOUBTS:
                return False
        if self.refusal is None:
            self.refusal = Refusal(error, reason, failure.retry_after)
            logger.warning(
                "No more prompts are sent to %s: the provider refuses them all (%s)", self._model_id, reason
            )
        return False

    def _sit_out(self, seconds: float | None) -> bool:
        now = anyio.current_time()
        if now < self.until:
            return True  # It was on its way when another one was told.
        began = now if self._used_up_at is None else self._used_up_at
        left = began + self._patience - now
        if left <= 0 or (seconds is not None and seconds > left):
            return False
        wait = min(UNKNOWN_SECONDS, left) if seconds is None else seconds + MARGIN_SECONDS
        self._used_up_at = began
        self.until = now + wait
        logger.warning("Model %s: its quota is used up, no prompts for %.0f seconds", self._model_id, wait)
        return True

    @property
    def waiting(self) -> bool:
        """Whether a quota is being sat out."""
        return self._used_up_at is not None and anyio.current_time() < self.until

    async def wait(self) -> None:
        """Wait until the quota is back."""
        await anyio.sleep_until(self.until)

"""The time that an attempt may take stands still while nobody works on it: its model waits for a worker, say.

Who has a call made tells it here, in the task of the attempt; who limits the attempt listens.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..pace.attempt_limit import AttemptLimit


class Limited(Protocol):
    """An attempt whose time is limited."""

    def stand_still(self) -> None:
        """Its time does not count until `go_on()`."""

    def go_on(self) -> None:
        """Its time begins again, from nothing."""


class FixedTime:
    """So many seconds, until the scope is cancelled."""

    def __init__(self, scope: anyio.CancelScope, seconds: float) -> None:
        self._scope = scope
        self._seconds = seconds
        self.go_on()

    def stand_still(self) -> None:
        self._scope.deadline = math.inf

    def go_on(self) -> None:
        self._scope.deadline = anyio.current_time() + self._seconds


class LearntTime:
    """Far longer than answers usually take; of a streamed answer the silence counts, not the length.

    Attributes:
        since: when something of the answer was heard last, or the attempt began.
    """

    def __init__(self, scope: anyio.CancelScope, attempts: AttemptLimit, now: Callable[[], float]) -> None:
        self._scope = scope
        self._attempts = attempts
        self._now = now
        self._longest = 0.0
        self.go_on()

    def stand_still(self) -> None:
        self._attempts.forget(self._scope)
        self._scope.deadline = math.inf

    def go_on(self) -> None:
        self.since = self._now()
        self._attempts.watch(self._scope, self.since)

    def heard(self) -> None:
        """Something of the answer has come."""
        self._longest = max(self._longest, self._now() - self.since)
        self.go_on()

    def answered(self) -> None:
        """The answer has come to its end."""
        self._attempts.answered(max(self._longest, self._now() - self.since))


_attempt: ContextVar[Limited | None] = ContextVar("datasette_llm_attempt_time", default=None)


@contextmanager
def limiting(attempt: Limited) -> Iterator[None]:
    """Have what runs inside tell this attempt."""
    token = _attempt.set(attempt)
    try:
        yield
    finally:
        _attempt.reset(token)


def stand_still() -> None:
    """Say that nobody works on the attempt that this task makes, from now on."""
    attempt = _attempt.get()
    if attempt is not None:
        attempt.stand_still()


def go_on() -> None:
    """Say that somebody does again."""
    attempt = _attempt.get()
    if attempt is not None:
        attempt.go_on()

"""How long a transient failure is retried, and what is raised in the end.

``retrying()`` is a loop of attempts on stamina, used only after a first attempt has failed:

    async for attempt in retrying(policy, on_retry=count):
        with attempt:
            ...

Nothing here holds a slot: whoever waits between two attempts has released it.
"""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import anyio
import stamina

from .failures import Failure, IncompleteAnswer, classify, retry_after_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from types import TracebackType

    from ..pace.policy import RetryPolicy

__all__ = [
    "Attempt",
    "Failure",
    "IncompleteAnswer",
    "classify",
    "retry_after_seconds",
    "retrying",
]

#: Seconds before the first retry of a transient failure, and at most between two; the jitter keeps the
#: prompts that one broken connection failed together from coming back together.
WAIT_INITIAL, WAIT_MAX, WAIT_JITTER = 0.25, 10.0, 0.5
#: The same before the first retry alone, from and to: what fails once most often passes at once.
WAIT_FIRST = (0.05, 0.2)
#: Between refusals that do not say how long to wait, but for the first.
WAIT_REFUSED = (0.1, 0.4)


class Attempt:
    """One turn of the retry loop: ``with attempt:`` runs the model call.

    Attributes:
        number: 1 for the first turn of the loop.
        error: what the turn failed with, when it is to be tried again.
    """

    __slots__ = ("_inner", "_retrying", "error", "number")

    def __init__(self, retrying: _Retrying, inner: stamina.Attempt) -> None:
        self.number = inner.num
        self.error: Exception | None = None
        self._retrying = retrying
        self._inner = inner

    def __enter__(self) -> Attempt:
        self._inner.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        if exc is not None and not isinstance(exc, Exception):
            # Cancellation and the end of the program are nobody's failed attempt.
            return None
        if isinstance(exc, _GaveUp):
            self.error = exc.error
        elif isinstance(exc, Exception):
            self.error = self._retrying.last_error = exc
        return self._inner.__exit__(exc_type, exc, tb)

    async def wait(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for a slot, bounded by what is left of the policy's time.

        Raises:
            Exception: the provider's own error of the attempt before, when the time is over.
        """
        retrying = self._retrying
        if retrying.last_error is None:
            await wait()
            return
        while True:
            deadline = retrying.deadline
            with anyio.CancelScope(deadline=deadline) as scope:
                await wait()
                return
            # The clock may have stood still meanwhile.
            if scope.cancelled_caught and retrying.deadline <= deadline:
                raise _GaveUp(retrying.last_error) from None


#: Set while stamina waits for us. It logs each retry of each prompt, where a bulk job has one cooldown for
#: all; its hooks for metrics are told as ever.
_quiet: ContextVar[bool] = ContextVar("datasette_llm_quiet", default=False)

logging.getLogger("stamina").addFilter(lambda record: not _quiet.get())


@contextmanager
def quietly() -> Iterator[None]:
    """Keep stamina from logging what is tried again inside: whoever does that tells of it, if it matters."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


class _GaveUp(Exception):
    """Carries the provider's error out of a wait: it is not retried, and raised as it was."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Retrying:
    def __init__(
        self,
        policy: RetryPolicy,
        on_retry: Callable[[], object] | None,
        started: float | None,
        paused: Callable[[], float] | None,
    ) -> None:
        self.policy = policy
        self.on_retry = on_retry
        self.started = anyio.current_time() if started is None else started
        self._paused = paused
        self._paused_before = 0.0 if paused is None else paused()
        self.last_error: Exception | None = None
        self._attempts = 0

    @property
    def deadline(self) -> float:
        """When the time for all attempts is over, as things are."""
        paused = 0.0 if self._paused is None else self._paused() - self._paused_before
        return self.started + self.policy.timeout + paused

    def backoff(self, error: Exception) -> bool | float:
        """Decide for stamina: give up, wait as long as the provider asked, or as stamina computes."""
        if isinstance(error, _GaveUp):
            return False
        self._attempts += 1
        failure = classify(error)
        if failure.kind not in ("throttled", "transient"):
            return False
        if self._attempts >= self.policy.attempts:
            self.note(error, self._gave_up())
            return False
        left = self.deadline - anyio.current_time()
        if left <= 0:
            self.note(error, self._gave_up())
            return False
        wait = failure.retry_after or 0.0
        if wait > left:
            self.note(
                error,
                f"{self._gave_up()}: the provider asks to wait {wait:.0f} seconds, "
                f"more than is left of the {self.policy.timeout:g} that a prompt may take",
            )
            return False
        throttled, first = failure.kind == "throttled", self._attempts == 1
        if failure.retry_after is not None or (throttled and first):
            # The throttle decides when anybody is let in again; here only what this prompt was told.
            return wait
        if throttled:
            # Where it is refused again the throttle has not understood yet, and attempts are few.
            return random.uniform(*WAIT_REFUSED)
        return random.uniform(*WAIT_FIRST) if first else True

    @staticmethod
    def note(error: Exception, text: str) -> None:
        """Say in the traceback why there was no other attempt, where Python can."""
        add_note = getattr(error, "add_note", None)
        if add_note is not None and text not in getattr(error, "__notes__", ()):
            add_note(text)

    def __aiter__(self) -> _Retrying:
        context = stamina.retry_context(
            on=self.backoff,
            attempts=self.policy.attempts,
            timeout=None,  # stamina counts with the machine's clock, the deadline here with the event loop's
            wait_initial=WAIT_INITIAL,
            wait_max=WAIT_MAX,
            wait_jitter=WAIT_JITTER,
        )
        self._turns = context.__aiter__()
        return self

    # An iterator, not an async generator: a body that returns would leave that one to the garbage collector.
    async def __anext__(self) -> Attempt:
        token = _quiet.set(True)
        try:
            inner = await self._turns.__anext__()
        except _GaveUp as gave_up:
            self.note(gave_up.error, self._gave_up())
            raise gave_up.error from None
        finally:
            _quiet.reset(token)
        if inner.num > 1 and self.on_retry is not None:
            self.on_retry()
        return Attempt(self, inner)

    def _gave_up(self) -> str:
        count = "1 attempt" if self._attempts == 1 else f"{self._attempts} attempts"
        return f"gave up after {count} in {anyio.current_time() - self.started:.1f} seconds"


def retrying(
    policy: RetryPolicy,
    *,
    on_retry: Callable[[], object] | None = None,
    started: float | None = None,
    paused: Callable[[], float] | None = None,
) -> AsyncIterator[Attempt]:
    """Return the attempts a policy allows, each to be run as ``with attempt:``.

    A body that succeeds leaves the loop by itself. A failure that ``classify()`` calls throttled or
    transient is followed by a wait (what the provider asked for, else stamina's jittered backoff) and the
    next attempt. Any other failure, and the last one, is raised as it was, with a note on how long that took.

    Args:
        on_retry: called before each attempt but the first.
        started: when the first attempt began, on the event loop's clock; now, if not given.
        paused: tells for how many seconds, all together, time has stood still for these attempts.
    """
    return _Retrying(policy, on_retry, started, paused)

"""One answer from a model: a slot, the call, its chunks to the readers, and again if that may help.

A slot is held only while the model call runs. Between two attempts nothing is held.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ..pace.outcome import Outcome
from .attempt_time import FixedTime, LearntTime, limiting
from .contents import Contents
from .driving import drive
from .metrics import record_call
from .prices import told_in_headers
from .retry import classify, retrying
from .semantics import error_type
from .trouble import trouble_of
from .weather import Cause, cause_of, wait_with_all

if TYPE_CHECKING:
    from collections.abc import Callable

    import llm

    from ..pace.policy import PromptSettings
    from ..pace.slots import Slots
    from ..responses.response import PromptResponse
    from .choice import Choice
    from .failures import Failure
    from .retry import Attempt
    from .standing import Refusal, Standing

_CANCELLED = Outcome("cancelled")
_OK = Outcome("ok")


class Caller(Protocol):
    """The task that a model call is a part of: what it is told, and asked."""

    @property
    def choice(self) -> Choice: ...

    @property
    def measured(self) -> bool: ...

    def standing(self, key: str | None) -> Standing | None: ...

    def begin_attempt(self, response: llm.AsyncResponse) -> None: ...

    def count_retry(self) -> None: ...

    def rest(self, resting: bool) -> None: ...


def _everybodys(refusal: Refusal) -> Exception:
    # Without its traceback, which would grow with every prompt.
    return refusal.error.with_traceback(None)


class ModelCall:
    """Get the answer for one response.

    Args:
        task: who runs this; it is told when the call begins.
        response: where the chunks go. It observes the llm response of the first attempt already.
        ask: makes llm's response object for another attempt.
        slots: bound the calls in flight.
        settings: retries and the timeout of an attempt.
    """

    __slots__ = (
        "_ask", "_lost", "_refused_with_all", "_response", "_resting", "_sent_at", "_settings", "_slots",
        "_started", "_task",
    )  # fmt: skip

    def __init__(
        self,
        task: Caller,
        response: PromptResponse,
        ask: Callable[[], llm.AsyncResponse],
        slots: Slots,
        settings: PromptSettings,
    ) -> None:
        self._task = task
        self._response = response
        self._ask = ask
        self._slots = slots
        self._settings = settings
        self._started: float | None = None
        self._sent_at = 0.0
        self._resting = False
        # Seconds that count for no attempt: of those that never came back, and while nobody was served.
        self._lost = 0.0
        # The last refusal, if that counts for no attempt.
        self._refused_with_all: Exception | None = None

    @property
    def slots(self) -> Slots:
        """What bounds its calls."""
        return self._slots

    async def run(self) -> None:
        """Call the model until there is an answer, or no point in calling it again.

        Raises:
            Exception: the model's or the provider's own, of the last attempt.
        """
        while True:
            try:
                return await self._call()
            except Exception as error:
                if not self._is_sat_out(error):
                    raise
            # What was waited for was no attempt's time.
            self._started = None

    async def _call(self) -> None:
        try:
            await self._attempt()
        except Exception as error:
            if not self._may_retry(error):
                raise
            first: Exception | None = error
        else:
            return
        self._rest(True)
        try:
            await self._call_again(first)
        finally:
            self._rest(False)

    async def _call_again(self, first: Exception | None) -> None:
        # Most prompts need no second attempt, so the retry loop is told of the first one afterwards.
        retries = self._settings.retries
        async for attempt in retrying(
            retries,
            on_retry=self._count_retry,
            started=None if self._started is None else self._started + self._lost,
            paused=lambda: self._slots.outage_seconds + self._lost,
        ):
            with attempt:
                if first is not None:
                    failure, first = first, None
                    raise failure
                await self._attempt(attempt)
                return
            if attempt.error is not None and not self._may_retry(attempt.error):
                raise attempt.error
            self._rest(True)

    def _rest(self, resting: bool) -> None:
        """Tell the task whether the call waits between two attempts, without a slot."""
        if resting is not self._resting:
            self._resting = resting
            self._task.rest(resting)

    def _may_retry(self, error: Exception) -> bool:
        # A reader that has seen part of an answer must not see the beginning of another one.
        standing = self._standing()
        again = (
            (standing is None or standing.refusal is None)
            and not self._response._was_streamed
            and self._settings.retries.attempts > 1
            and classify(error).kind in ("throttled", "transient")
        )
        if again:
            # Nor may one that comes while we wait see what is given up now.
            self._response._events = []
        return again

    def _is_sat_out(self, error: Exception) -> bool:
        """Whether a call may be made again when the quota that refused it is back."""
        standing = self._standing()
        if standing is None or not standing.waiting or self._response._was_streamed:
            return False
        again = self._classify(error).reason == "quota"
        if again:
            self._response._events = []
        return again

    def _classify(self, error: Exception) -> Failure:
        return classify(error).within(self._settings.retries.timeout)

    def _count_retry(self) -> None:
        self._slots.hour.now().retries += 1
        self._task.count_retry()

    async def _attempt(self, again: Attempt | None = None) -> None:
        """Make one attempt; what only shows that the provider is away counts for none."""
        while True:
            try:
                return await self._call_once(again)
            except Exception as error:
                made = 1 if again is None else again.number
                last = made >= self._settings.retries.attempts
                if not await self._was_weather(error, last=last):
                    raise
            if again is None:
                self._started = None
            self._count_retry()

    async def _was_weather(self, error: Exception, *, last: bool) -> bool:
        """Whether a call failed for what is not its own; see `cause_of`."""
        if self._response._was_streamed:
            return False
        cause = await cause_of(error, self._classify(error), self._slots, self._sent_at, last=last)
        if cause is Cause.ITS_OWN:
            return False
        self._response._events = []
        if cause is Cause.REFUSED_WITH_ALL:
            self._refused_with_all = error
        return True

    async def _call_once(self, again: Attempt | None) -> None:
        response, slots = self._response, self._slots
        made = response.attempts
        if made:
            response._restart(self._ask())
        standing = self._standing()
        if standing is not None and standing.refusal is not None:
            # No slot is waited for only to be given back.
            self._task.begin_attempt(response._observed)
            raise _everybodys(standing.refusal)
        started = await self._acquire(again, standing)
        self._rest(False)
        outcome = _CANCELLED
        error_name: str | None = "PromptCancelled"
        self._sent_at = started
        if self._started is None:
            self._started = started
        try:
            self._task.begin_attempt(response._observed)
            response.attempts += 1
            await self._drive_with_contents()
            outcome = self._answered() if slots.paced else _OK
            error_name = None
            if standing is not None:
                standing.answered()
        except Exception as error:
            error_name = error_type(error)
            failure = self._classify(error)
            if failure.kind == "hopeless" and standing is not None:
                standing.refused(error, failure)
            kind = failure.kind if failure.kind in ("throttled", "transient") else "failed"
            trouble = trouble_of(error, failure)
            outcome = Outcome(
                kind,
                retry_after=failure.retry_after,
                trouble=trouble,
                answered=trouble is None and (failure.status is not None or kind != "failed"),
            )
            raise
        finally:
            slots.release(outcome, started, self)
            if response.attempts > made:
                slots.hour.ended(outcome.kind)
                if self._task.measured:
                    # Two that start together are told apart by a moment: it may be in the future.
                    seconds = max(0.0, slots.now() - started)
                    record_call(self._task.choice, seconds, response._first_chunk_seconds, error_name)

    async def _acquire(self, again: Attempt | None, standing: Standing | None) -> float:
        """Wait for a slot, and for a quota that is used up; return when the slot was taken."""
        slots, observed = self._slots, self._response._observed
        while True:
            if standing is not None and standing.waiting:
                await standing.wait()
                again = None  # Its time was bounded before that.
            tokens = _estimated_tokens(observed) if slots.paced else 0
            if not slots.acquire_nowait(tokens):
                if self._refused_with_all is not None:
                    refusal, self._refused_with_all = self._refused_with_all, None
                    self._lost += await wait_with_all(refusal, slots, tokens, standing)
                elif again is None:
                    await slots.acquire(tokens)
                else:
                    await again.wait(partial(slots.acquire, tokens, first=True))
            self._refused_with_all = None
            started = slots.acquired_at
            if standing is None:
                return started
            if standing.refusal is not None:
                slots.give_back(tokens, started)
                self._task.begin_attempt(observed)
                raise _everybodys(standing.refusal)
            if not standing.waiting:
                return started
            slots.give_back(tokens, started)

    def _standing(self) -> Standing | None:
        return self._task.standing(self._response._observed._key)

    def _answered(self) -> Outcome:
        return Outcome("ok", tokens=_used_tokens(self._response._observed))

    async def _drive_with_contents(self) -> None:
        """Let the model answer; from its beginning again when it asks for a file that has to be fetched."""
        contents: Contents | None = None
        try:
            while True:
                try:
                    if self._settings.timeout is None:
                        await self._drive_watched()
                    else:
                        await self._drive_in_time(self._settings.timeout)
                    return
                except Exception as error:
                    contents = contents or Contents()
                    if not await contents.provide(error):
                        raise
                self._response._restart(self._ask())
                self._task.begin_attempt(self._response._observed)
        finally:
            if contents is not None:
                contents.forget()

    async def _drive_in_time(self, seconds: float) -> None:
        with anyio.CancelScope() as scope, limiting(FixedTime(scope, seconds)):
            await self._drive()
        if scope.cancelled_caught:
            raise TimeoutError(f"the model did not answer within {seconds:g} seconds")

    async def _drive_watched(self) -> None:
        """Let the model answer, unless that takes far longer than it usually does."""
        attempts, now = self._slots.attempts, self._slots.now
        with anyio.CancelScope() as scope:
            time = LearntTime(scope, attempts, now)
            try:
                with limiting(time):
                    await self._drive(time.heard)
            finally:
                attempts.forget(scope)
            time.answered()
        if scope.cancelled_caught:
            self._lost += now() - time.since
            raise TimeoutError(
                f"no answer within {attempts.seconds:.0f} seconds, far longer than the model usually takes"
            )

    async def _drive(self, heard: Callable[[], None] | None = None) -> None:
        """Let the model answer; readers see its chunks as they come."""
        response = self._response
        publish = response._publish
        if response._observed.stream:
            response._first_chunk_seconds = None

        def listen(event: Any) -> None:
            if response._first_chunk_seconds is None:
                response._first_chunk_seconds = max(0.0, self._slots.now() - self._sent_at)
            publish(event)
            if heard is not None:
                heard()

        headers = await drive(response._observed, listen)
        response.told_cost = told_in_headers(headers)
        response._publish_all()


def _estimated_tokens(observed: llm.AsyncResponse) -> int:
    # Four characters a token is what providers give as a rule of thumb for English.
    prompt = observed.prompt
    return (len(prompt.prompt or "") + len(prompt.system or "")) // 4 + 1


def _used_tokens(observed: llm.AsyncResponse) -> int | None:
    if observed.input_tokens is None and observed.output_tokens is None:
        return None
    return (observed.input_tokens or 0) + (observed.output_tokens or 0)

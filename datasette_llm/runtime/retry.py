"""What is transient, how long a provider asks to wait, and when to give up.

``classify()`` reads an exception and everything in its chain; it imports no provider's SDK.
``retrying()`` is a loop of attempts on stamina, used only after a first attempt has failed:

    async for attempt in retrying(policy, on_retry=count):
        with attempt:
            ...

Nothing here holds a slot: whoever waits between two attempts has released it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

import anyio
import llm
import stamina

from datasette_llm._compat import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from types import TracebackType

    from .policy import RetryPolicy

Kind = Literal["throttled", "transient", "permanent", "authentication"]

#: Seconds before the first retry of a transient failure, and at most between two; the jitter keeps the
#: prompts that one broken connection failed together from coming back together.
WAIT_INITIAL, WAIT_MAX, WAIT_JITTER = 0.25, 10.0, 0.5

#: Answers with which a provider says "not so fast": everybody's business, not only this prompt's.
_THROTTLED = frozenset({429, 503, 529})
_AUTHENTICATION = frozenset({401, 403})
#: 408 and 409 are what the OpenAI and Anthropic clients retry themselves; 425 is "too early".
_TRANSIENT = frozenset({408, 409, 425})

#: Libraries whose transport errors are recognised by class name, since they need not be installed.
_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "h11", "h2"})
_NOT_TRANSIENT = frozenset({"UnsupportedProtocol", "LocalProtocolError", "InvalidURL"})
_TRANSPORT_ERRORS = frozenset(
    {
        "TransportError", "TimeoutException", "NetworkError", "RemoteProtocolError",
        "ClientConnectionError", "ClientPayloadError", "ServerTimeoutError",
    }
)  # fmt: skip
#: What SDKs that share the OpenAI client's design raise around a transport error.
_SDK_CONNECTION_ERRORS = frozenset({"APIConnectionError", "APITimeoutError"})


class IncompleteAnswer(ConnectionError):
    """A streamed answer ended without the provider's finish marker: part of it is missing."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What an exception means for a retry.

    Attributes:
        kind: ``throttled`` and ``transient`` failures may be retried, the others never.
        retry_after: seconds the provider asked to wait, if it did.
        status: the HTTP status, if there was an answer.
    """

    kind: Kind
    retry_after: float | None = None
    status: int | None = None


_PERMANENT = Failure("permanent")


def classify(exc: BaseException) -> Failure:
    """Say what a failed model call means, from the exception, its causes and a group's members.

    The first exception of the chain that tells something decides, the outermost first.
    """
    for error in _chain(exc):
        failure = _classify_one(error)
        if failure is not None:
            return failure
    return _PERMANENT


def _chain(exc: BaseException) -> Iterator[BaseException]:
    pending, seen = [exc], set[int]()
    while pending:
        error = pending.pop()
        if id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is not None:
            pending.append(inner)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(reversed(error.exceptions))


def _classify_one(error: BaseException) -> Failure | None:
    if isinstance(error, llm.NeedsKeyException):
        return Failure("authentication")
    status = _status(error)
    if status is not None:
        return _classify_status(status, error)
    if isinstance(error, llm.ModelError):
        # A plugin's own words for a failure: what it wraps tells more, if it wraps anything.
        return None
    if isinstance(error, (ConnectionError, TimeoutError)):
        return Failure("transient")
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(error).__mro__}
    if any(name in _SDK_CONNECTION_ERRORS for _, name in names):
        return Failure("transient")
    if any(module in _TRANSPORTS and name in _TRANSPORT_ERRORS for module, name in names):
        return None if type(error).__name__ in _NOT_TRANSIENT else Failure("transient")
    if isinstance(error, json.JSONDecodeError):
        return Failure("transient") if _was_raised_in_sdk(error) else None
    code = getattr(error, "code", None) or getattr(error, "type", None)
    if isinstance(code, str):
        # An error inside of a stream that had begun with status 200.
        return Failure(_CODES[code]) if code in _CODES else None
    if isinstance(error, OSError) and not isinstance(error, _FILE_ERRORS):
        return Failure("transient")
    if isinstance(error, (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)):
        return Failure("transient")
    return None


#: Error codes and types of OpenAI's and Anthropic's error objects.
_CODES: dict[str, Kind] = {
    "rate_limit_exceeded": "throttled",
    "rate_limit_error": "throttled",
    "overloaded_error": "throttled",
    "server_error": "transient",
    "api_error": "transient",
    "internal_server_error": "transient",
    "timeout": "transient",
    "timeout_error": "transient",
}


def _was_raised_in_sdk(error: BaseException) -> bool:
    """Broken JSON on the wire is read by an SDK; broken JSON that a model wrote is read by llm."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _WIRE_READERS:
            return True
        frame = frame.tb_next
    return False


_WIRE_READERS = _TRANSPORTS | {"openai", "anthropic"}

#: OSErrors of this machine's file system say nothing about the provider.
_FILE_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def _classify_status(status: int, error: BaseException) -> Failure:
    headers = _headers(error)
    wait = retry_after_seconds(headers) if headers is not None else None
    if status in _THROTTLED:
        if status == 429 and _says_quota_is_used_up(error):
            return Failure("permanent", status=status)
        return Failure("throttled", wait, status)
    if status >= 500 or status in _TRANSIENT:
        # 501 and 505 say that this server will never do what was asked.
        return Failure("permanent" if status in (501, 505) else "transient", wait, status)
    return Failure("authentication" if status in _AUTHENTICATION else "permanent", status=status)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    for holder, name in (
        (error, "status_code"), (error, "status"), (error, "code"), (error, "http_status"),
        (response, "status_code"), (response, "status"),
    ):  # fmt: skip
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600:
            return value
    return None


def _headers(error: BaseException) -> Mapping[str, str] | None:
    headers = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    return headers if hasattr(headers, "get") else None


def _says_quota_is_used_up(error: BaseException) -> bool:
    """OpenAI answers 429 also when the account has no money left: waiting does not help."""
    return getattr(error, "code", None) == "insufficient_quota"


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return how long the headers ask to wait: ``retry-after-ms``, or ``Retry-After`` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name) or headers.get(name.title())
        if not text:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                date = parsedate_to_datetime(text)
            except (TypeError, ValueError):
                continue
            if date.tzinfo is None:
                date = date.replace(tzinfo=datetime.timezone.utc)
            seconds = (date - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
        if seconds == seconds and seconds != float("inf"):  # neither nan nor inf
            return max(0.0, seconds)
    return None


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

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Bound the wait for a slot by what is left of the policy's time.

        Raises:
            Exception: the provider's own error of the attempt before, when the time is over.
        """
        retrying = self._retrying
        if retrying.last_error is None:
            yield
            return
        with anyio.CancelScope(deadline=retrying.deadline) as scope:
            yield
        if scope.cancelled_caught:
            raise _GaveUp(retrying.last_error) from None


#: Set while stamina waits for us. It logs each retry of each prompt, where a bulk job has one cooldown for
#: all; its hooks for metrics are told as ever.
_quiet: ContextVar[bool] = ContextVar("datasette_llm_quiet", default=False)

logging.getLogger("stamina").addFilter(lambda record: not _quiet.get())


class _GaveUp(Exception):
    """Carries the provider's error out of a wait: it is not retried, and raised as it was."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Retrying:
    def __init__(
        self, policy: RetryPolicy, on_retry: Callable[[], object] | None, started: float | None
    ) -> None:
        self.policy = policy
        self.on_retry = on_retry
        self.started = anyio.current_time() if started is None else started
        self.deadline = self.started + policy.timeout
        self.last_error: Exception | None = None
        self._attempts = 0

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
        wait = failure.retry_after or 0.0
        if wait > left:
            self.note(
                error,
                f"{self._gave_up()}: the provider asks to wait {wait:.0f} seconds, "
                f"more than is left of the {self.policy.timeout:g} that a prompt may take",
            )
            return False
        if left <= 0:
            self.note(error, self._gave_up())
            return False
        if failure.kind == "throttled" or failure.retry_after is not None:
            # The throttle decides when anybody is let in again; here only what this prompt was told.
            return wait
        return True

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
    policy: RetryPolicy, *, on_retry: Callable[[], object] | None = None, started: float | None = None
) -> AsyncIterator[Attempt]:
    """Return the attempts a policy allows, each to be run as ``with attempt:``.

    A body that succeeds leaves the loop by itself. A failure that ``classify()`` calls throttled or
    transient is followed by a wait (what the provider asked for, else stamina's jittered backoff) and the
    next attempt. Any other failure, and the last one, is raised as it was, with a note on how long that took.

    Args:
        on_retry: called before each attempt but the first.
        started: when the first attempt began, on the event loop's clock; now, if not given.
    """
    return _Retrying(policy, on_retry, started)


def check_complete(response: llm.AsyncResponse) -> None:
    """Make sure that an OpenAI-family model's streamed answer did not end half-way.

    llm takes a stream that just ends for a complete answer. The provider's last chunk carries a finish
    reason (a status, for the Responses API): without one, something is missing.

    Raises:
        IncompleteAnswer: if so. Other models' responses, and unstreamed ones, are never doubted.
    """
    if not response.stream:
        return
    family = _openai_family(response.model)
    if family is None:
        return
    said: Any = response.response_json
    if family == "responses" and not getattr(response.prompt.options, "chat_completions", None):
        # llm sets it from the event response.completed, and from nothing else.
        complete = bool(said)
    else:
        # llm drops keys whose value is None.
        complete = isinstance(said, dict) and bool(said.get("finish_reason"))
    if not complete:
        raise IncompleteAnswer("the answer's stream ended before the provider said that it was complete")


def _openai_family(model: Any) -> Literal["chat", "responses"] | None:
    from llm.default_plugins import openai_models

    responses = getattr(openai_models, "AsyncResponses", None)
    if responses is not None and isinstance(model, responses):
        # A subclass with its own execute() may fill response_json in its own way.
        return "responses" if type(model).execute is responses.execute else None
    if isinstance(model, openai_models.AsyncChat):
        return "chat" if type(model).execute is openai_models.AsyncChat.execute else None
    return None

"""What a failed model call means: whether it may be tried again, and how long the provider asks to wait.

``classify()`` reads an exception and everything in its chain; it imports no provider's SDK.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Literal

import anyio
import llm

from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.errors import ProviderUnreachable

from .http_answers import answer_of
from .refusals import is_about_one_request, recognise, said, text_of, wait_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .refusals import Reason

Kind = Literal["throttled", "transient", "permanent", "hopeless"]

#: Answers with which a provider says "not so fast": everybody's business, not only this prompt's.
_THROTTLED = frozenset({429, 503, 529})
#: 408 and 409 are what the OpenAI and Anthropic clients retry themselves; 425 is "too early".
_TRANSIENT = frozenset({408, 409, 425})

#: Libraries whose transport errors are recognised by class name, since they need not be installed.
_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "h11", "h2"})
#: A wait that is asked for in words alone counts when it is as long as this. The throttle finds out shorter
#: ones better than providers say them.
LONG_WAIT_SECONDS = 60.0
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
        kind: ``throttled`` and ``transient`` failures may be retried, the others never; ``hopeless`` is
            what no other prompt of the same model and key can escape now.
        retry_after: seconds the provider asked to wait, if it did.
        status: the HTTP status, if there was an answer.
        reason: why it is hopeless.
    """

    kind: Kind
    retry_after: float | None = None
    status: int | None = None
    reason: Reason | None = None

    def within(self, seconds: float) -> Failure:
        """Return what this means for prompts that may take so many seconds, waits included.

        A rate limit that asks to wait longer is a quota that is used up; a server that is overloaded or
        down for so long is something else.
        """
        overloaded = self.status is not None and self.status >= 500
        if self.kind == "throttled" and not overloaded and (self.retry_after or 0.0) > seconds:
            return Failure("hopeless", self.retry_after, self.status, "quota")
        return self


_PERMANENT = Failure("permanent")


def classify(exc: BaseException) -> Failure:
    """Say what a failed model call means, from the exception, its causes and a group's members.

    The first exception of the chain that tells something decides, the outermost first. Where none does,
    the words of a ``llm.ModelError`` may. What no prompt can escape (``refusals``) is looked for in all of
    them, where the provider has answered. What it answered, where that was seen, fills in what the
    exception does not tell.
    """
    if isinstance(exc, ProviderUnreachable):
        # It has been waited for already.
        return _PERMANENT
    errors = list(chain_of(exc))
    failure = _classify_one_of(errors)
    if failure.kind not in ("permanent", "throttled") or not _is_answer(failure, errors):
        return failure
    reason = recognise(errors, failure.status)
    if reason is None:
        if failure.kind == "throttled" and failure.retry_after is None:
            wait = wait_in_words(text_of(errors))
            if wait is not None and wait >= LONG_WAIT_SECONDS:
                return Failure("throttled", wait, failure.status)
        return failure
    wait = failure.retry_after if failure.retry_after is not None else wait_in_words(text_of(errors))
    if reason == "quota" and wait is not None:
        # Whether that is too long is for whoever waits to say: a quota of the last 24 hours may be
        # back in a second.
        return Failure("throttled", wait, failure.status)
    return Failure("hopeless", wait, failure.status, reason)


def refusal_of(exc: BaseException) -> tuple[int | None, str] | None:
    """Return the status and the words with which a provider refused a request.

    Returns:
        ``None`` if that was no refusal, or one that is about this request's own content or length.
    """
    errors = list(chain_of(exc))
    failure = _classify_one_of(errors)
    if not _is_answer(failure, errors) or is_about_one_request(errors):
        return None
    return failure.status, words_of(exc)


def words_of(exc: BaseException) -> str:
    """Return what a provider said in a failed call, in its own words."""
    errors = list(chain_of(exc))
    told = next((error for error in errors if _classify_one(error) is not None), exc)
    return said(told, _classify_one_of(errors).status)


def _classify_one_of(errors: list[BaseException]) -> Failure:
    failure = _by_exception(errors)
    for error in errors:
        answer = answer_of(error)
        if answer is not None and answer.status is not None:
            return _with_answer(failure, answer.status, answer.headers)
    return failure


def _with_answer(failure: Failure, status: int, headers: Mapping[str, str]) -> Failure:
    """Add what the provider answered, where it was seen and the exception does not tell it."""
    if failure.kind == "hopeless":
        return failure
    if failure.status is None and failure.kind == "permanent":
        return _classify_status(status, headers)
    wait = failure.retry_after
    if wait is None and failure.kind != "permanent":
        wait = retry_after_seconds(headers)
    return replace(failure, retry_after=wait, status=failure.status or status)


def _by_exception(errors: list[BaseException]) -> Failure:
    for error in errors:
        failure = _classify_one(error)
        if failure is not None:
            return failure
    by_words = (_classify_words(str(error)) for error in errors if isinstance(error, llm.ModelError))
    return next((failure for failure in by_words if failure is not _PERMANENT), _PERMANENT)


def _is_answer(failure: Failure, errors: list[BaseException]) -> bool:
    """Whether a failure is something that a provider said."""
    return failure.status is not None or any(
        isinstance(error, llm.ModelError) or isinstance(getattr(error, "body", None), dict)
        for error in errors
    )


def chain_of(exc: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes and contexts, and a group's members."""
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
        return Failure("hopeless", reason="key")
    status = _status(error)
    if status is not None:
        return _classify_status(status, _headers(error))
    code = getattr(error, "code", None) or getattr(error, "type", None)
    if isinstance(code, str) and code.lower() in _CODES:
        # An error object inside of an answer with status 200.
        return Failure(_CODES[code.lower()])
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
        return Failure("transient") if was_raised_in_sdk(error) else None
    if isinstance(code, str):
        return None
    if isinstance(error, OSError) and not isinstance(error, _FILE_ERRORS):
        return Failure("transient")
    if isinstance(error, (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)):
        return Failure("transient")
    return None


#: Error codes and types of the error objects of OpenAI, Anthropic, Google and those who imitate them.
_CODES: dict[str, Kind] = {
    "rate_limit": "throttled",
    "rate_limit_exceeded": "throttled",
    "rate_limit_error": "throttled",
    "too_many_requests": "throttled",
    "resource_exhausted": "throttled",
    "overloaded": "throttled",
    "overloaded_error": "throttled",
    "engine_overloaded": "throttled",
    "unavailable": "transient",
    "service_unavailable": "transient",
    "internal_error": "transient",
    "server_error": "transient",
    "api_error": "transient",
    "internal_server_error": "transient",
    "timeout": "transient",
    "timeout_error": "transient",
}


#: What Google's Gemini API says with the statuses 429, 503, 500 and 504: llm-gemini passes on only the words.
_WORDS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (
        re.compile(r"resource has been exhausted|exceeded your current quota|overloaded|high demand"),
        "throttled",
    ),
    (re.compile(r"internal error|service is currently unavailable|deadline expired"), "transient"),
)


def _classify_words(text: str) -> Failure:
    text = text.lower()
    for words, kind in _WORDS:
        if words.search(text):
            return Failure(kind, wait_in_words(text))
    return _PERMANENT


def note_raised_in_sdk(error: BaseException) -> None:
    """Remember of an exception that an SDK raised it, where its traceback does not tell."""
    error._datasette_llm_in_sdk = True  # type: ignore[attr-defined]


def was_raised_in_sdk(error: BaseException) -> bool:
    """Say whether it was an SDK's code that raised an exception, or an HTTP library's.

    Broken JSON on the wire is read by an SDK; broken JSON that a model wrote is read by llm.
    """
    if getattr(error, "_datasette_llm_in_sdk", False):
        return True
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _WIRE_READERS:
            return True
        frame = frame.tb_next
    return False


_WIRE_READERS = _TRANSPORTS | {"openai", "anthropic"}

#: OSErrors of this machine's file system say nothing about the provider.
_FILE_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def _classify_status(status: int, headers: Mapping[str, str] | None) -> Failure:
    wait = retry_after_seconds(headers) if headers is not None else None
    if status in _THROTTLED:
        return Failure("throttled", wait, status)
    if status >= 500 or status in _TRANSIENT:
        # 501 and 505 say that this server will never do what was asked.
        return Failure("permanent" if status in (501, 505) else "transient", wait, status)
    return Failure("permanent", status=status)


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

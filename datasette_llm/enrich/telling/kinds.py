"""What happened to a row that failed, in a word or two: by these failures are counted and shown.

The words are for people, and stay the same for programs. What a row or its answer is to blame for says so
itself (`RowError`); here is what a failed model call means, whichever provider's exception it ended with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from datasette_llm.calls.attachments import AttachmentError
from datasette_llm.calls.failures import classify
from datasette_llm.calls.trouble import untranslated
from datasette_llm.calls.wording import UnusableAnswer

from ..errors import RowError

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER = "error"

_BY_STATUS = {
    400: "rejected",
    402: "no money left",
    404: "not found",
    408: "timed out",
    413: "too long",
    422: "rejected",
    429: "rate limited",
    504: "timed out",
    529: "overloaded",
}
_BY_REASON = {
    "key": "key refused",
    "money": "no money left",
    "model": "no such model",
    "quota": "quota used up",
}
_BY_FAILURE = {
    "throttled": "rate limited",
    "transient": "connection lost",
}
# What providers call a rejection whose reason is worth a word of its own.
_BY_CODE = {
    "content_filter": "filtered",
    "content_policy_violation": "filtered",
    "context_length_exceeded": "too long",
}


def kind_of(error: BaseException) -> str:
    """Return what happened; ``error`` where nothing is known but the exception."""
    if isinstance(error, RowError):
        return error.kind
    if isinstance(error, AttachmentError):
        return "attachment"
    chain = list(_chain(error))
    for one in chain:
        code = getattr(one, "code", None)
        if isinstance(code, str) and code in _BY_CODE:
            return _BY_CODE[code]
    failure = classify(error)
    if failure.reason is not None:
        return _BY_REASON[failure.reason]
    if failure.status is not None:
        return _BY_STATUS.get(failure.status, "server error" if failure.status >= 500 else "rejected")
    if any(isinstance(one, TimeoutError) or "Timeout" in type(one).__name__ for one in untranslated(chain)):
        return "timed out"
    unusable = next((one for one in chain if isinstance(one, UnusableAnswer)), None)
    if unusable is not None and failure.kind != "throttled":
        return "server error" if failure.kind == "transient" and unusable.code is not None else "no answer"
    return _BY_FAILURE.get(failure.kind, OTHER)


def group_of(error: BaseException | None, kind: str) -> str:
    """Return what a failure is counted under: its kind, or the exception's name where that says no more."""
    return type(error).__name__ if kind == OTHER and error is not None else kind


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

"""The HTTP answers of one attempt, as the clients that are shared saw them.

Some SDKs drop an answer's status and headers from what they raise, and some leave an answer open that is not
read to its end. Whoever runs an attempt watches: what the clients saw is told to `classify()` with the
exception, and what is still open afterwards is closed.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("datasette_llm")

#: How long closing the answers that were left open may take, in seconds.
CLOSE_SECONDS = 2.0

_ATTRIBUTE = "_datasette_llm_answer"


class HttpAnswers:
    """What was answered to the requests of one attempt.

    Attributes:
        status: the status of the last answer, or ``None`` before there was one.
        headers: its headers, found by lower-case name.
    """

    __slots__ = ("_responses", "headers", "status")

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: Mapping[str, str] = {}
        self._responses: list[Any] = []

    def saw(self, response: Any) -> None:
        """Note the response of an HTTP library, whose body may not have been read yet."""
        self.status = response.status_code
        self.headers = response.headers
        self._responses.append(response)

    def tell(self, status: int, headers: Mapping[str, str]) -> None:
        """Note what was answered elsewhere."""
        self.status = status
        self.headers = headers

    def attach(self, error: BaseException) -> None:
        """Tell with an exception what the provider had answered, if that was a refusal or a failure."""
        if self.status is not None and self.status >= 400:
            try:
                setattr(error, _ATTRIBUTE, self)
            except AttributeError:  # pragma: no cover - an exception with slots and nothing else
                pass

    async def aclose(self) -> None:
        """Close the answers that were not read to their end, and with them their connections.

        Runs to its end although the attempt was cancelled, up to a deadline.
        """
        responses = [response for response in self._responses if not response.is_closed]
        self._responses.clear()
        if not responses:
            return
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            for response in responses:
                try:
                    await response.aclose()
                except Exception:
                    logger.debug("An answer that was left open could not be closed", exc_info=True)


_current: ContextVar[HttpAnswers | None] = ContextVar("datasette_llm_http_answers", default=None)


def watch(answers: HttpAnswers | None) -> None:
    """Have the clients that are used in this task tell their answers, or no longer."""
    _current.set(answers)


def watched() -> bool:
    """Say whether an attempt runs in this task."""
    return _current.get() is not None


def saw(response: Any) -> None:
    """Tell whoever watches in this task of a response."""
    answers = _current.get()
    if answers is not None:
        answers.saw(response)


def tell(status: int, headers: Mapping[str, str]) -> None:
    """Tell whoever watches in this task of a response that another process has got."""
    answers = _current.get()
    if answers is not None:
        answers.tell(status, headers)


def answer_of(error: BaseException) -> HttpAnswers | None:
    """Return what the provider answered before this exception was raised, where that is known."""
    found = getattr(error, _ATTRIBUTE, None)
    return found if isinstance(found, HttpAnswers) else None

"""Calls that reach nobody: requests are recorded, answers are replayed.

The clients of an offline group have a transport that looks for the `Exchange` of the prompt that uses it. One
without an answer takes the request and ends the prompt with `Recorded`; one with an answer is answered with
it. Either way the model's own ``execute()`` does the work, and the plugins' wrappers are around it: when a
request is recorded they can refuse it, and see it cancelled; when its answer is replayed they see the answer.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...backends.closing import close_quietly
from ...errors import PromptCancelled
from ..failures import chain_of
from ..model_call import ModelCall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Recorded(PromptCancelled):
    """The prompt's request has been recorded: it is sent with others, and answered later."""


class NotOfflineError(RuntimeError):
    """A model's requests cannot be recorded: it does not use the clients it is given."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a model's client would have sent it.

    Attributes:
        headers: found by lower-case name; they hold the key.
    """

    url: str
    headers: Mapping[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"<Request of {len(self.body)} bytes>"


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it would have come over HTTP."""

    status: int
    body: bytes
    content_type: str = "application/json"


class Exchange:
    """One prompt's request and its answer.

    Args:
        reply: makes the answer to the request; without it the request is recorded.

    Attributes:
        request: what the model sent, once it has.
    """

    __slots__ = ("reply", "request")

    def __init__(self, reply: Callable[[Request], Reply] | None = None) -> None:
        self.reply = reply
        self.request: Request | None = None

    def use(self) -> None:
        """Have the prompts that are started in this context use it."""
        _current.set(self)


_current: ContextVar[Exchange | None] = ContextVar("datasette_llm_exchange", default=None)


class OfflineCall(ModelCall):
    """A model call whose request is recorded, or whose answer is replayed; it takes no slot."""

    __slots__ = ()

    async def run(self) -> None:
        """Call the model, once.

        Raises:
            Recorded: its request has been taken.
            NotOfflineError: it was answered by somebody else.
            Exception: the model's own.
        """
        exchange = _current.get()
        if exchange is None:
            raise NotOfflineError("there is nothing to record or replay")
        self._task.begin_attempt(self._response._observed)
        self._response.attempts += 1
        try:
            await self._drive()
        except Exception:
            if exchange.reply is None and exchange.request is not None:
                raise Recorded("the request waits for its batch") from None
            raise
        if exchange.request is None:
            raise NotOfflineError("the model does not send its requests through the clients it is given")


async def sample_request(model: Any, arguments: Mapping[str, Any]) -> Request:
    """Return the request that an adopted model of llm makes of a prompt, to see where it goes.

    No plugin is asked: nothing is sent, now or later.

    Args:
        model: one whose clients are offline.
        arguments: of its ``prompt()``.

    Raises:
        NotOfflineError: it does not use the clients it is given.
        Exception: the model's own: there is no key, say.
    """
    exchange = Exchange()
    token = _current.set(exchange)
    try:
        response = model.prompt("-", **arguments)
        try:
            await response.text()
        except Exception:
            if exchange.request is None:
                raise
        finally:
            generator = getattr(response, "_generator", None)
            if generator is not None:
                await close_quietly(generator, "the generator of a model")
    finally:
        _current.reset(token)
    if exchange.request is None:
        raise NotOfflineError("the model does not send its requests through the clients it is given")
    return exchange.request


class Offline:
    """What makes a group an offline one: the observer of its clients, and how its prompts call the model."""

    call_type = OfflineCall

    def __call__(self, status: int, headers: Mapping[str, str], age: float = 0.0, /) -> None:
        pass

    def transport(self, library: Any) -> Any:
        """Return the transport of one client."""
        return _transport_class(library)()


def is_recorded(error: BaseException | None) -> bool:
    """Say whether a prompt has ended so because its request was recorded; a wrapper may have wrapped that."""
    return error is not None and any(isinstance(each, Recorded) for each in chain_of(error))


class _Taken(Exception):
    """Ends the request that was taken; SDKs take it for a broken connection."""


@functools.cache
def _transport_class(library: Any) -> Any:
    class OfflineTransport(library.AsyncBaseTransport):  # type: ignore[misc]
        async def handle_async_request(self, request: Any) -> Any:
            exchange = _current.get()
            if exchange is None:
                raise NotOfflineError("there is nothing to record or replay")
            exchange.request = Request(str(request.url), request.headers, await request.aread())
            if exchange.reply is None:
                raise _Taken("recorded")
            reply = exchange.reply(exchange.request)
            headers = {"content-type": reply.content_type}
            return library.Response(reply.status, headers=headers, content=reply.body, request=request)

    return OfflineTransport

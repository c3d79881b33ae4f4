"""A stream of an SDK of the OpenAI make, listened to: its beginning, its end, or the JSON in its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .wording import UnusableAnswer, error_of, quoted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

#: Bytes that are kept of the beginning of a stream, to quote, and of its end.
HEAD, TAIL = 800, 64


class HeardStream:
    """An SDK's stream, listened to: an async iterator over its events.

    Args:
        stream: the SDK's.
        hear: what is made of its events, an async generator function that is given this object.
        events_of: the events that an answer is which came whole, as JSON.
    """

    def __init__(
        self,
        stream: Any,
        hear: Callable[[HeardStream], AsyncIterator[Any]],
        events_of: Callable[[dict[str, Any], Any], list[Any]],
    ) -> None:
        self._stream = stream
        self._events_of = events_of
        self._head = b""
        self._tail = b""
        self._events = hear(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aenter__(self) -> HeardStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stream.close()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._events

    async def __anext__(self) -> Any:
        return await self._events.__anext__()

    @property
    def said_done(self) -> bool:
        """Whether the stream ended with ``[DONE]``."""
        return b"[DONE]" in self._tail

    async def events(self) -> AsyncIterator[Any]:
        """What the SDK makes of the stream, or of the JSON that came in its place."""
        response = getattr(self._stream, "response", None)
        if response is None:
            async for event in self._stream:
                yield event
            return
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("application/json", "text/html"):
            for event in self._whole(await response.aread()):
                yield event
            return
        self._overhear(response)
        none = True
        async for event in self._sdk_events():
            none = False
            yield event
        if none and not self.said_done:
            if self._head.lstrip()[:1] == b"{":
                for event in self._whole(self._head):
                    yield event
            elif self._head.strip():
                raise _no_events(self._head)

    async def _sdk_events(self) -> AsyncIterator[Any]:
        try:
            async for event in self._stream:
                yield event
        except Exception as error:
            body = getattr(error, "body", None)
            if type(error).__name__ != "APIError" or body is None:
                raise
            # Its own words, and those of an error that is no object.
            raise error_of(body, where=" in the middle of its stream") from error

    def _overhear(self, response: Any) -> None:
        """Keep the beginning and the end of what an SDK reads of a response."""
        read = response.aiter_bytes

        async def aiter_bytes(*args: Any, **kwargs: Any) -> AsyncIterator[bytes]:
            async for chunk in read(*args, **kwargs):
                if len(self._head) < HEAD:
                    self._head += chunk[:HEAD]
                self._tail = (self._tail + chunk)[-TAIL:]
                yield chunk

        response.aiter_bytes = aiter_bytes

    def _whole(self, content: bytes) -> list[Any]:
        """The events that an answer is which came whole."""
        try:
            body = json.loads(content)
        except ValueError:
            raise _no_events(content) from None
        if not isinstance(body, dict):
            raise UnusableAnswer(f"the provider answered with no object: {quoted(body)}")
        if body.get("error") and not body.get("status"):
            raise error_of(body["error"])
        return self._events_of(body, self._stream)


def _no_events(content: bytes) -> UnusableAnswer:
    return UnusableAnswer(f"the provider answered with no stream of events: {quoted(content)}")

"""Readers of one response: each holds a position of its own in the chunks that have arrived.

So one may come early or late, and a slow one costs no memory. Where it has caught up with the model it
waits at its doorbell, a memory channel of one slot, which exists no longer than that wait: a reader can be
dropped anywhere and leaves nothing behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from anyio.streams.memory import MemoryObjectSendStream
    from llm.parts import StreamEvent


class Broadcast(Protocol):
    """What readers hold positions in: everything that has arrived, in order, and who waits for more."""

    _events: list[StreamEvent]
    _bells: set[MemoryObjectSendStream[None]] | None
    _was_streamed: bool

    def _is_readable(self) -> bool: ...

    def _raise_error(self) -> None: ...


def ring(bells: Iterable[MemoryObjectSendStream[None]]) -> None:
    """Wake the readers that wait at these doors."""
    for bell in bells:
        try:
            bell.send_nowait(None)
        except anyio.WouldBlock:
            # It is ringing already.
            pass


class EventReader:
    """One reader of a response: an async iterator over what the model sends, live until the end."""

    def __init__(self, response: Broadcast) -> None:
        self._response = response
        self._position = 0
        self._closed = False
        self._bell: MemoryObjectSendStream[None] | None = None

    def __aiter__(self) -> EventReader:
        return self

    async def __anext__(self) -> StreamEvent:
        response = self._response
        while not self._closed:
            if self._position < len(response._events):
                event = response._events[self._position]
                self._position += 1
                response._was_streamed = True
                return event
            if response._is_readable():
                self.close()
                response._raise_error()
                break
            await self._wait_at_door()
        raise StopAsyncIteration

    async def _wait_at_door(self) -> None:
        response = self._response
        if response._bells is None:
            response._bells = set()
        bells = response._bells
        bell, door = anyio.create_memory_object_stream[None](1)
        with bell, door:
            self._bell = bell
            bells.add(bell)
            try:
                await door.receive()
            finally:
                bells.discard(bell)
                self._bell = None

    def close(self) -> None:
        """Stop reading; what the model still sends stays readable for others."""
        self._closed = True
        if self._bell is not None:
            # Another task waits in this very reader.
            ring([self._bell])

    async def aclose(self) -> None:
        """Stop reading, as ``contextlib.aclosing`` calls it."""
        self.close()


class TextReader(EventReader):
    """One reader of a response's text: an async iterator over the chunks of text alone."""

    def __aiter__(self) -> TextReader:
        return self

    async def __anext__(self) -> str:  # type: ignore[override]
        while True:
            event = await super().__anext__()
            if event.type == "text":
                return event.chunk

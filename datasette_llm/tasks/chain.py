"""What the readers of a chain hold: any number of them, each at its own place.

The chain starts when it is first read. The furthest reader sets the pace, the others see the same responses.
Where the last one leaves before the end, the chain is told.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

from anyio import get_cancelled_exc_class
from llm.parts import StreamEvent

from ..backends.loops import LoopDoor
from ..backends.signal import Signal
from .supervisor import Child

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import llm

    from ..responses.readers import EventReader
    from ..responses.response import PromptResponse
    from .supervisor import Supervisor


class ChainRun(Child, Protocol):
    """What runs a chain, as its readers know it."""

    supervisor: Supervisor

    def wake(self) -> None: ...

    def abandon(self) -> None: ...


class Chain:
    """What ``model.chain()`` returns: a chain that starts when it is first read.

    Read it with ``async for response in chain.responses()``, ``async for text in chain``,
    ``async for event in chain.astream_events()`` or ``await chain.text()``, from as many tasks as you like.
    """

    def __init__(self, begun: llm.models.AsyncChainResponse, make_task: Callable[[Chain], ChainRun]) -> None:
        self._begun = begun
        self._make_task = make_task
        self._task: ChainRun | None = None
        self._responses: list[PromptResponse] = []
        # How many responses the furthest reader has asked for.
        self._wanted: float = 0
        self._readers = 0
        self._ended = False
        self._error: Exception | None = None
        self._traceback: TracebackType | None = None
        self._changed = Signal()

    def responses(self) -> ChainReader:
        """Iterate over the responses, each live as soon as it is yielded.

        The tools of a response run when the next one is asked for.

        Raises:
            llm.PauseChain: a tool paused the chain; resume with ``messages=``.
            ValueError: the chain limit was reached.
            Exception: a wrapper's, the model's or a hook's own, bare.
        """
        return ChainReader(self)

    def __aiter__(self) -> ChainText:
        return ChainText(self)

    def astream_events(self) -> ChainEvents:
        """Iterate over the ``StreamEvent`` objects of all responses."""
        return ChainEvents(self)

    async def text(self) -> str:
        """Run the chain to its end and return the text of all responses."""
        reader = ChainText(self)
        self._wanted = math.inf
        try:
            return "".join([chunk async for chunk in reader])
        finally:
            reader.close()

    def cancel(self) -> None:
        """Cancel the chain, if it runs; readers get ``PromptCancelled``. Returns at once."""
        if self._task is not None:
            self._task.cancel()

    def log_to_db(self, db: Any) -> None:
        """Record the responses so far in an llm log database (a ``sqlite_utils.Database``)."""
        for response in self._responses:
            response.log_to_db(db)

    def __getattr__(self, name: str) -> Any:
        # What llm's object says of itself: prompt, model, conversation, chain_limit, ...
        if name == "_begun":
            raise AttributeError(name)
        return getattr(self._begun, name)

    # Readers and the task meet here

    async def _response(self, index: int) -> PromptResponse | None:
        while index >= len(self._responses):
            if self._ended:
                if self._error is not None:
                    # With the traceback it first had: it would otherwise grow with every reader.
                    raise self._error.with_traceback(self._traceback)
                return None
            self._wanted = max(self._wanted, index + 1)
            changed = self._changed
            if self._task is None:
                self._task = self._make_task(self)
                self._task.supervisor.start(self._task)
            else:
                self._task.wake()
            await changed.wait()
        return self._responses[index]

    def _tell_readers(self) -> None:
        changed, self._changed = self._changed, Signal()
        changed.set()

    def _reader_left(self) -> None:
        self._readers -= 1
        if not self._readers and not self._ended and self._task is not None:
            self._task.abandon()


class ChainReader:
    """One reader of a chain's responses."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._door = LoopDoor()
        self._position = 0
        self._closed = False
        chain._readers += 1

    def __aiter__(self) -> ChainReader:
        return self

    async def __anext__(self) -> PromptResponse:
        if self._closed:
            raise StopAsyncIteration
        try:
            response = await self._chain._response(self._position)
        except (Exception, get_cancelled_exc_class()):
            self.close()
            raise
        if response is None:
            self.close()
            raise StopAsyncIteration
        self._position += 1
        return response

    def close(self) -> None:
        """Stop reading. If this was the chain's last reader, the chain ends."""
        if not self._closed:
            self._closed = True
            self._chain._reader_left()

    async def aclose(self) -> None:
        """Stop reading, as ``contextlib.aclosing`` calls it."""
        self.close()

    def __del__(self) -> None:
        # Where the loop was left with break, this is the first to know.
        if not self._closed and not self._chain._ended:
            self._door.call_soon(self._chain._reader_left)


class ChainEvents:
    """One reader of a chain's events; between two responses whose texts would touch it puts a space."""

    def __init__(self, chain: Chain) -> None:
        self._responses = ChainReader(chain)
        self._events: EventReader | None = None
        self._last_text = ""
        self._first_text = True
        self._held: StreamEvent | None = None

    def __aiter__(self) -> ChainEvents:
        return self

    async def __anext__(self) -> StreamEvent:
        if self._held is not None:
            event, self._held = self._held, None
            return event
        while True:
            if self._events is None:
                self._events = (await anext(self._responses)).astream_events()
                self._first_text = True
            try:
                event = await anext(self._events)
            except StopAsyncIteration:
                self._events = None
                continue
            except (Exception, get_cancelled_exc_class()):
                self.close()
                raise
            return self._spaced(event)

    def _spaced(self, event: StreamEvent) -> StreamEvent:
        if event.type != "text" or not event.chunk:
            return event
        touches = self._first_text and self._last_text and not self._last_text.isspace()
        self._first_text = False
        self._last_text = event.chunk[-1]
        if touches and not event.chunk[0].isspace():
            self._held = event
            return StreamEvent(type="text", chunk=" ")
        return event

    def close(self) -> None:
        """Stop reading. If this was the chain's last reader, the chain ends."""
        self._responses.close()
        if self._events is not None:
            self._events.close()

    async def aclose(self) -> None:
        """Stop reading, as ``contextlib.aclosing`` calls it."""
        self.close()


class ChainText(ChainEvents):
    """One reader of a chain's text."""

    def __aiter__(self) -> ChainText:
        return self

    async def __anext__(self) -> str:  # type: ignore[override]
        while True:
            event = await super().__anext__()
            if event.type == "text" and event.chunk:
                return event.chunk

"""PromptResponse: what every prompt returns, and how its chunks reach any number of readers.

One task drives the model call and tells the response what happens (``_publish``, ``_finish``); every
reader only observes. A response is in one of four states:

* open: chunks may still arrive; readers that have caught up wait at their doorbell, a memory channel;
* succeeded: the model call and all callbacks are done; every read answers at once;
* failed: every read raises the prompt's own error, the same object each time;
* cancelled: every read raises ``PromptCancelled``.

Each chunk is kept once, in ``_events``; `readers` hold positions in that list.
"""

from __future__ import annotations

from contextvars import ContextVar
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import llm

from ..errors import PromptCancelled
from .finish import FinishReason, ended_because
from .readers import EventReader, TextReader, ring
from .tools import execute_tool_calls, tool_message

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from anyio.streams.memory import MemoryObjectSendStream
    from llm.parts import StreamEvent

#: The response whose own wrappers or callbacks run in this context. They end before readers are let go,
#: so what they read is the model's answer: they must not wait for themselves.
_own: ContextVar[PromptResponse | None] = ContextVar("datasette_llm_own_response", default=None)


class Prompter(Protocol):
    """What a response can be continued with: a model of this package."""

    async def prompt(self, prompt: str | None = None, **kwargs: Any) -> PromptResponse: ...


class PromptResponse(llm.AsyncResponse):
    """The answer to one prompt, readable by any number of tasks while it arrives and afterwards.

    It offers everything that ``llm.AsyncResponse`` offers. Reading never starts or repeats the work.
    Reading a failed response raises the prompt's own error every time, reading a cancelled one raises
    ``PromptCancelled``.

    Attributes:
        done: whether the prompt has ended, callbacks included.
        error: the exception the prompt ended with, or ``None``.
        attempts: how many model calls it took so far.
        told_cost: what the answer cost in dollars, where a header said so.
    """

    attempts: int = 0
    told_cost: float | None = None
    #: How long the first chunk took from the request, in seconds, where the answer was streamed.
    _first_chunk_seconds: float | None = None

    # How nearly every response begins, and most end: in the class, since a million of them may be made.
    _finished = False
    _error: Exception | None = None
    _traceback: TracebackType | None = None
    _error_seen = False
    _was_streamed = False
    #: What the model call came to, for the prompt's own wrappers and callbacks.
    _answered = False
    _answer_error: Exception | None = None
    _default_reader: TextReader | None = None
    # Made for the first who waits or registers, and dropped at the end: of each answer that a group keeps,
    # the garbage collector goes over every object, again and again.
    _bells: set[MemoryObjectSendStream[None]] | None = None
    #: One event per waiting task: on trio, plugins wait on the hosted asyncio loop.
    _waiters: set[anyio.Event] | None = None
    _callbacks: list[Any] | None = None

    def __init__(
        self,
        observed: llm.AsyncResponse,
        *,
        on_cancel: Callable[[], None],
        reply_model: Prompter | None = None,
    ) -> None:
        # llm's own initialiser is not called: the state of the answer lives in the response object
        # that the model writes to, and __getattr__ reads it from there.
        self._observed = observed
        self._on_cancel: Callable[[], None] | None = on_cancel
        self._reply_model = reply_model
        self._events: list[StreamEvent] = []

    # What readers see

    @property
    def done(self) -> bool:
        """Whether the prompt has ended: succeeded, failed or cancelled."""
        return self._finished

    @property
    def error(self) -> Exception | None:
        """The exception the prompt ended with; ``None`` while it runs and when it succeeded."""
        if self._error is not None:
            self._error_seen = True
        return self._error

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the model stopped; ``None`` until its answer is complete, and when the prompt was cancelled.

        One vocabulary for all providers: ``stop``, ``length``, ``content_filter``, ``refusal``,
        ``tool_calls``, ``error``, or ``unknown`` for a model that does not say. A prompt that failed has
        what its provider said, else ``error``.
        """
        return ended_because(self._observed, self._error or self._answer_error) if self._answered else None

    def cancel(self) -> None:
        """Cancel the prompt, if it has not ended yet.

        Its model call is closed and its hook wrappers see ``PromptCancelled``; readers get the same
        once those have settled. Returns at once; cancelling twice is harmless.
        """
        if self._on_cancel is not None:
            self._on_cancel()

    async def wait(self) -> None:
        """Wait until the prompt has ended, however it ended; raises nothing of its own."""
        while not self._is_readable():
            if self._waiters is None:
                self._waiters = set()
            waiters, event = self._waiters, anyio.Event()
            waiters.add(event)
            try:
                await event.wait()
            finally:
                waiters.discard(event)

    def _is_readable(self) -> bool:
        return self._finished or (self._answered and _own.get() is self)

    async def _force(self) -> PromptResponse:
        # The one place through which all of llm's reading methods go.
        if not self._finished:
            await self.wait()
        self._raise_error()
        return self

    def _raise_error(self) -> None:
        if self._error is not None:
            self._error_seen = True
            # With the traceback it first had: it would otherwise grow with every reader.
            raise self._error.with_traceback(self._traceback)
        if self._answer_error is not None and _own.get() is self:
            raise self._answer_error

    def __aiter__(self) -> TextReader:
        return TextReader(self)

    async def __anext__(self) -> str:
        if self._default_reader is None:
            self._default_reader = TextReader(self)
        return await self._default_reader.__anext__()

    def astream_events(self) -> EventReader:
        """Iterate over the ``StreamEvent`` objects, from the first one, live until the end.

        Returns:
            an async iterator of its own for each call. Leaving it early does not stop the prompt.
        """
        return EventReader(self)

    async def on_done(self, callback: Any) -> None:
        """Have a callback called with the llm response when the prompt has succeeded.

        It has finished before any reader gets the whole answer, and an exception of it becomes the
        error of this response. Called at once if the prompt has succeeded already, never if it failed.

        Args:
            callback: a function taking the response, sync or async.
        """
        if not self._finished:
            if self._callbacks is None:
                self._callbacks = []
            self._callbacks.append(callback)
        elif self._error is None:
            await _call_back(callback, self._observed)

    async def reply(
        self,
        prompt: str | None = None,
        *,
        messages: list[Any] | None = None,
        tool_results: list[llm.ToolResult] | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> llm.AsyncResponse:
        """Prompt the same model again, with this exchange as the history.

        Tool calls of this response are run first, unless their results are given.

        Returns:
            the ``PromptResponse`` of the new prompt.
        """
        await self._force()
        if "tools" not in kwargs and self.prompt.tools:
            kwargs["tools"] = self.prompt.tools
        if tool_results is None and self._tool_calls:
            tool_results = await self.execute_tool_calls(tools=kwargs.get("tools"))
        history = [*self.prompt.messages, *await self.messages()]
        if tool_results:
            history += tool_message(tool_results)
        if prompt:
            history.append(llm.user(prompt))
        history += messages or []
        if self._reply_model is None:
            raise RuntimeError("this response does not know which model to reply with")
        return await self._reply_model.prompt(None, messages=history, options=options, **kwargs)

    async def execute_tool_calls(
        self,
        *,
        before_call: Any = None,
        after_call: Any = None,
        tool_calls_list: list[llm.ToolCall] | None = None,
        tools: list[Any] | None = None,
    ) -> list[llm.ToolResult]:
        """Run the tool calls of this response, async tools at the same time, on either backend.

        Args:
            before_call: called with the tool and the call before each; may raise ``CancelToolCall``.
            after_call: called with the tool, the call and its result after each.
            tool_calls_list: the calls to run instead of the response's own.
            tools: where to find the implementations instead of in the prompt.

        Returns:
            a result per call, in the order of the calls.

        Raises:
            llm.PauseChain: a tool paused; its ``tool_results`` are those of its siblings.
        """
        if tool_calls_list is None:
            tool_calls_list = await self.tool_calls()
        return await execute_tool_calls(
            self._observed, tool_calls_list, before_call=before_call, after_call=after_call, tools=tools
        )

    def log_to_db(self, db: Any) -> None:
        self._raise_error()
        if not self._is_readable():
            raise ValueError("The response is not finished: await it before it is logged")
        # What llm's command logs of an async response is its sync likeness; before 0.36 that is the only one
        # that can be logged. Nothing in it waits once the response is finished.
        try:
            self.to_sync_response().send(None)
        except StopIteration as finished:
            finished.value.log_to_db(db)

    def to_dict(self) -> Any:
        self._raise_error()
        return super().to_dict()

    def text_or_raise(self) -> str:
        self._raise_error()
        return super().text_or_raise()

    def tool_calls_or_raise(self) -> list[llm.ToolCall]:
        self._raise_error()
        return super().tool_calls_or_raise()

    def __repr__(self) -> str:
        if not self._finished:
            state = "open"
        elif self._error is None:
            state = "succeeded"
        else:
            state = "cancelled" if isinstance(self._error, PromptCancelled) else "failed"
        return f"<PromptResponse {self._observed.model.model_id} {state}>"

    # The answer itself lives in the observed response

    def __getattr__(self, name: str) -> Any:
        if name == "_observed":
            raise AttributeError(name)
        return getattr(self._observed, name)

    @property
    def _done(self) -> bool:  # type: ignore[override]
        return self._finished and self._error is None

    # llm's class says nothing of this one, but every reader of the text asks for it.
    @property
    def _chunks(self) -> list[str]:  # type: ignore[override]
        return self._observed._chunks

    @property
    def resolved_model(self) -> str | None:  # type: ignore[override]
        return self._observed.resolved_model

    @property
    def conversation(self) -> llm.AsyncConversation | None:  # type: ignore[override]
        return self._observed.conversation

    @property
    def _key(self) -> str | None:  # type: ignore[override]
        return self._observed._key

    # What the driving task tells

    def _restart(self, observed: llm.AsyncResponse) -> None:
        """Begin another attempt, which forgets the chunks of the last; only while nobody streamed any."""
        # The readers' response keeps its identity however many attempts there are.
        observed.id = self._observed.id
        self._observed = observed
        self._events = []

    def _publish(self, event: StreamEvent) -> None:
        self._events.append(event)
        if self._bells:
            ring(self._bells)

    def _publish_all(self) -> None:
        """The answer is complete: what is not published yet is now, all of it if it came unstreamed."""
        # llm has the same events in the same order: no need to keep two lists of them.
        self._events = self._observed._stream_events
        if self._bells:
            ring(self._bells)

    async def _run_callbacks(self) -> None:
        """Run what readers registered with ``on_done`` so far, in order; the first error ends it."""
        token = _own.set(self)
        try:
            while self._callbacks:
                await _call_back(self._callbacks.pop(0), self._observed)
        finally:
            _own.reset(token)

    def _answer(self, error: Exception | None = None) -> None:
        """The model call is over; wrappers and callbacks still settle."""
        self._answered = True
        self._answer_error = error
        if self._has_own_context:
            self._wake_readers()

    def _enter_context(self) -> None:
        """From here on, what runs in this context settles before readers are let go."""
        self._has_own_context = True
        _own.set(self)

    _has_own_context = False

    def _wake_readers(self) -> None:
        if self._waiters:
            for event in self._waiters:
                event.set()
        if self._bells:
            ring(self._bells)

    def _finish(self, error: Exception | None) -> None:
        """End the prompt; idempotent, the first call counts."""
        if self._finished:
            return
        self._finished = self._answered = True
        self._on_cancel = None
        self._answer_error = None
        if error is not None:
            self._error = error
            self._traceback = error.__traceback__
        self._wake_readers()
        self._bells = self._waiters = self._callbacks = None


async def _call_back(callback: Any, response: llm.AsyncResponse) -> None:
    # llm takes a function, sync or async, or something awaitable. It is the caller's own, so it is
    # awaited where the caller's code runs, not on Datasette's side.
    value = callback(response) if callable(callback) else callback
    if isawaitable(value):
        await value

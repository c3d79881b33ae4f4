"""A chain: a model and its tools taking turns, as one supervised task that goes on in step with its readers.

The task starts when the chain is first read. It enters the wrappers once, runs the first turn, and then
rests until a reader asks for the next response: only then the tools of the turn run. A turn without tool
calls is the last one, and ends the chain at once. Readers may be many; the furthest one sets the pace, the
others see the same responses.

When the last reader leaves before the end, the chain ends too: cancelled if a model call or a tool is
running, else normally, so that what was used is accounted. When its owner is about to end (a group's
block is left, the server stops), a chain that rests ends in the same way, and one that a reader runs to
its end (``text()``) goes on.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import anyio
import llm
from anyio import get_cancelled_exc_class
from llm.parts import StreamEvent

from ..backends.loops import LoopDoor
from ..backends.signal import Signal
from ..calls.attachments import find_types, need_finding
from ..calls.metrics import record_usage
from ..calls.model_call import ModelCall
from ..calls.prices import cost_of
from ..calls.tracing import no_span, tool_span, turn_span
from ..errors import PromptCancelled
from ..responses.response import PromptResponse, finish_reasons, used_tokens
from ..responses.tools import attachments_of, execute_tool_calls, pending_tool_calls, tool_message, unobserved
from .task import SupervisedTask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from llm.parts import Message

    from ..calls.choice import Choice
    from ..pace.throttle import Slots
    from ..responses.readers import EventReader
    from ..responses.response import Prompter
    from .conversation import Turn
    from .supervisor import Supervisor


class Chain:
    """What ``model.chain()`` returns: a chain that starts when it is first read.

    Read it with ``async for response in chain.responses()``, ``async for text in chain``,
    ``async for event in chain.astream_events()`` or ``await chain.text()``, from as many tasks as you like.
    """

    def __init__(self, begun: llm.models.AsyncChainResponse, make_task: Callable[[Chain], ChainTask]) -> None:
        self._begun = begun
        self._make_task = make_task
        self._task: ChainTask | None = None
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


class ChainTask(SupervisedTask):
    """Run one chain.

    Args:
        chain: what its readers hold.
        begin: makes llm's object of it; called when the chain's turn in its conversation has come.
        slots: bound the model calls in flight.
        reply_model: what ``response.reply()`` prompts.
    """

    is_chain = True

    def __init__(
        self,
        chain: Chain,
        supervisor: Supervisor,
        datasette: Any,
        choice: Choice,
        begin: Callable[[], Awaitable[llm.models.AsyncChainResponse]],
        slots: Slots,
        *,
        prompt: str | None,
        turn: Turn | None = None,
        reply_model: Prompter | None = None,
    ) -> None:
        super().__init__(supervisor, datasette, choice, prompt, turn=turn)
        self._chain = chain
        self._begin = begin
        self._slots = slots
        self._reply_model = reply_model
        self._abandoned = False
        self._owner_is_ending = False
        self._pause: llm.PauseChain | None = None
        self._limit_error: ValueError | None = None
        self._chain_complete = False
        # Between two turns: the callbacks of a response, and the rest until a reader wants more.
        self._between_turns = False
        self._woken = anyio.Event()

    def wake(self) -> None:
        """A reader wants more."""
        self._woken.set()

    def abandon(self) -> None:
        """No reader is left: end, normally if nothing is under way."""
        self._abandoned = True
        if self._between_turns:
            self.wake()
        else:
            self.cancel()

    def wind_down(self) -> None:
        self._owner_is_ending = True
        self.wake()

    async def work(self) -> None:
        plan = self._chain._begun = await self.interruptible(self._begin)
        limit = plan.chain_limit
        try:
            prompt = await self._resumed(plan)
            for count in itertools.count(1):
                response = await self._take_turn(plan, prompt)
                calls = await response.tool_calls()
                at_limit = bool(limit) and count >= (limit or 0)
                if not calls and not at_limit:
                    break
                if not await self.interruptible(self._wanted):
                    return
                self._between_turns = False
                if at_limit:
                    self._limit_error = ValueError(f"Chain limit of {limit} exceeded.")
                    raise self._limit_error
                results = await self._run_tools(plan, response, calls)
                history = [*response.prompt.messages, *await response.messages()]
                prompt = _next_prompt(plan.prompt, history, results)
        except llm.PauseChain as pause:
            # No failure: the wrappers are left normally, so that what was used is accounted.
            self._pause = pause
            return
        self._chain_complete = True
        if self.result is not None:
            self.result.chain_complete = True

    async def after(self) -> None:
        if self._pause is not None:
            raise self._pause
        if not self._chain_complete:
            raise PromptCancelled("the chain was left by its readers before its end")

    def spoils_turn(self, error: Exception) -> bool:
        # Where it paused or reached its limit it can be resumed.
        return error is not self._pause and error is not self._limit_error

    async def _resumed(self, plan: llm.models.AsyncChainResponse) -> llm.Prompt:
        """The first prompt: with the results of the tool calls that its history has left open."""
        prompt = plan.prompt
        pending = pending_tool_calls(prompt.messages) if prompt.tools else []
        if not pending:
            return prompt
        results = await self._run_tools(plan, self._ask(plan, prompt), pending)
        return _next_prompt(prompt, prompt.messages, results)

    async def _wanted(self) -> bool:
        """Rest until a reader wants the next response. Returns whether there is such a reader."""
        while not self._abandoned:
            if self._chain._wanted > len(self._chain._responses):
                return True
            if self._owner_is_ending:
                break
            self._woken = anyio.Event()
            await self._woken.wait()
        return False

    def _ask(self, plan: llm.models.AsyncChainResponse, prompt: llm.Prompt) -> llm.AsyncResponse:
        return llm.AsyncResponse(
            prompt,
            self.choice.model,
            plan.stream,
            conversation=cast("llm.AsyncConversation", plan.conversation),
            key=plan._key,
            before_call=plan.before_call,
            after_call=plan.after_call,
        )

    async def _take_turn(self, plan: llm.models.AsyncChainResponse, prompt: llm.Prompt) -> PromptResponse:
        def ask() -> llm.AsyncResponse:
            return self._ask(plan, prompt)

        response = PromptResponse(ask(), on_cancel=self.cancel, reply_model=self._reply_model)
        if self.supervisor.group is not None:
            self.supervisor.group._responses.add(response, keep=True)
        self._chain._responses.append(response)
        self._chain._tell_readers()
        response._enter_context()
        call = ModelCall(self, response, ask, self._slots, self.choice.settings)
        try:
            with turn_span(self.choice, response) if self.supervisor.traced else no_span:
                await self.interruptible(call.run)
        except Exception as error:
            response._answer(error)
            raise
        response._answer()
        self._between_turns = True
        with self.abandonable("a callback"):
            if self.result is not None:
                await self.result._succeeded()
            await response._run_callbacks()
        response._finish(None)
        cost = cost_of(response, self.choice.pricing)
        used = (*used_tokens(response), cost)
        self.supervisor.counters.count_tokens(*used)
        self._slots.hour.used(*used)
        if self.measured:
            record_usage(self.choice, response._observed, cost)
        return response

    async def _run_tools(
        self,
        plan: llm.models.AsyncChainResponse,
        response: llm.AsyncResponse,
        calls: Sequence[llm.ToolCall],
    ) -> list[llm.ToolResult]:
        observed = response._observed if isinstance(response, PromptResponse) else response

        async def run() -> list[llm.ToolResult]:
            results = await execute_tool_calls(
                observed,
                list(calls),
                before_call=plan.before_call,
                after_call=plan.after_call,
                around=tool_span if self.supervisor.traced else unobserved,
            )
            return [await self._with_types(result) for result in results]

        return await self.interruptible(run)

    async def _with_types(self, result: llm.ToolResult) -> llm.ToolResult:
        """Find the types of files that a tool points to, before llm does."""
        if not need_finding({"attachments": result.attachments}):
            return result
        found = await find_types(self.supervisor.clients_here, result.attachments)
        return replace(result, attachments=found)

    def cost(self) -> float | None:
        costs = [cost_of(response, self.choice.pricing) for response in self._chain._responses]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if known else None

    def responses(self) -> list[PromptResponse]:
        return self._chain._responses

    def finish_reasons(self, error: Exception | None) -> list[str]:
        return finish_reasons(self._chain._responses, error)

    def finish(self, error: Exception | None) -> None:
        chain = self._chain
        chain._ended = True
        chain._error = error
        chain._traceback = error.__traceback__ if error is not None else None
        for response in chain._responses:
            # Only the last one can still be open: its readers get what ended the chain.
            response._finish(error)
        chain._tell_readers()


def _next_prompt(
    first: llm.Prompt, history: Sequence[Message], results: Sequence[llm.ToolResult]
) -> llm.Prompt:
    """The prompt that carries tool results to the model: the whole history, the first prompt's settings."""
    return llm.Prompt(
        "",
        first.model,
        tools=first.tools,
        tool_results=list(results),
        messages=[*history, *tool_message(results)],
        system=first._system,
        system_fragments=first.system_fragments,
        options=first.options,
        attachments=attachments_of(results),
        hide_reasoning=first.hide_reasoning,
    )

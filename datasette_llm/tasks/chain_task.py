"""A chain: a model and its tools taking turns, as one supervised task that goes on in step with its readers.

The task starts when the chain is first read. It enters the wrappers once, runs the first turn, and then
rests until a reader asks for the next response: only then the tools of the turn run. A turn without tool
calls is the last one, and ends the chain at once.

When the last reader leaves before the end, the chain ends too: cancelled if a model call or a tool is
running, else normally, so that what was used is accounted. When its owner is about to end (a group's
block is left, the server stops), a chain that rests ends in the same way, and one that a reader runs to
its end (``text()``) goes on.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import anyio
import llm

from ..calls.attachments import find_types, need_finding
from ..calls.metrics import record_usage
from ..calls.model_call import ModelCall
from ..calls.prices import cost_of
from ..calls.tracing import no_span, tool_span, turn_span
from ..errors import PromptCancelled
from ..responses.outcome import finish_reasons, used_tokens
from ..responses.response import PromptResponse
from ..responses.tools import attachments_of, execute_tool_calls, pending_tool_calls, tool_message, unobserved
from .task import SupervisedTask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from llm.parts import Message

    from ..calls.choice import Choice
    from ..pace.slots import Slots
    from ..responses.response import Prompter
    from .chain import Chain
    from .conversation import Turn
    from .supervisor import Supervisor


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

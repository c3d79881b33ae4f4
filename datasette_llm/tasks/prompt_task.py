"""One prompt as a supervised task: the wrappers, one model call, the callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
from anyio import get_cancelled_exc_class

from ..calls.metrics import record_usage
from ..calls.prices import cost_of
from ..errors import PromptCancelled
from ..responses.outcome import finish_reasons, used_tokens
from ..responses.response import PromptResponse
from .task import SupervisedTask

if TYPE_CHECKING:
    from collections.abc import Callable

    import llm

    from ..calls.choice import Choice
    from ..pace.slots import Slots
    from ..responses.response import Prompter
    from .conversation import Turn
    from .supervisor import Supervisor


class PromptTask(SupervisedTask):
    """Run one prompt.

    Args:
        ask: makes llm's response object, for each attempt; called once at once, or (in a conversation,
            whose history it reads) when the turn has come.
        slots: bound the model calls in flight.
        reply_model: what ``response.reply()`` prompts.

    Attributes:
        on_begin: called when its model call begins.
        on_rest: called when it begins to wait between two attempts, and when it does so no more.
    """

    on_begin: Callable[[], None] | None = None
    on_rest: Callable[[bool], None] | None = None
    _started: anyio.Event | None = None

    def __init__(
        self,
        supervisor: Supervisor,
        datasette: Any,
        choice: Choice,
        ask: Callable[[], llm.AsyncResponse],
        slots: Slots,
        *,
        prompt: str | None,
        turn: Turn | None = None,
        reply_model: Prompter | None = None,
    ) -> None:
        super().__init__(supervisor, datasette, choice, prompt, turn=turn)
        self.response = PromptResponse(ask(), on_cancel=self.cancel, reply_model=reply_model)
        self._ask = ask
        self._call = supervisor.call_type(self, self.response, ask, slots, choice.settings)

    async def work(self) -> None:
        if self._turn is not None:
            # The history was not complete yet when this prompt was asked.
            self.response._restart(self._ask())
        try:
            await self.interruptible(self._call.run)
        except Exception as error:
            self.response._answer(error)
            raise
        self.response._answer()
        if self.result is not None:
            with self.abandonable("a callback"):
                await self.result._succeeded()

    def enter_context(self) -> None:
        self.response._enter_context()

    async def after(self) -> None:
        if self.response._callbacks:
            with self.abandonable("a callback"):
                await self.response._run_callbacks()

    def begin_running(self) -> None:
        super().begin_running()
        if self.on_begin is not None:
            self.on_begin()
        if self._started is not None:
            self._started.set()

    def rest(self, resting: bool) -> None:
        if self.on_rest is not None:
            self.on_rest(resting)

    def responses(self) -> list[PromptResponse]:
        return [self.response]

    def cost(self) -> float | None:
        return cost_of(self.response, self.choice.pricing)

    def count_tokens(self) -> None:
        cost = self.cost()
        used = (*used_tokens(self.response), cost)
        self.supervisor.counters.count_tokens(*used)
        self._call.slots.hour.used(*used)
        if self.measured:
            record_usage(self.choice, self.response._observed, cost)

    def finish_reasons(self, error: Exception | None) -> list[str]:
        return finish_reasons([self.response], error)

    def finish(self, error: Exception | None) -> None:
        try:
            self.response._finish(error)
            if error is not None and not isinstance(error, PromptCancelled):
                self.supervisor.watch_failure(self.response)
        finally:
            # The task, its call and its response know each other: without this only the garbage
            # collector could free them.
            del self._call
            if self._started is not None and not self._running:
                self._started.set()

    async def start(self) -> PromptResponse:
        """Have the supervisor run this task; wait until its model call starts.

        Returns:
            the response, as soon as the model call runs.

        Raises:
            Exception: what kept the model call from starting: a wrapper's own exception, or
                ``PromptCancelled``.
        """
        self._started = anyio.Event()
        self.supervisor.start(self)
        try:
            await self._started.wait()
        except get_cancelled_exc_class():
            # Nobody will ever hold the response. Until the wrappers have settled the caller stays: once
            # it has gone the event loop may end, and asyncio would interrupt them in the middle.
            self.cancel()
            with anyio.CancelScope(shield=True):
                await self.response.wait()
            raise
        if not self._running:
            self.response._raise_error()
        return self.response

    async def run_unwrapped(self, scope: anyio.CancelScope) -> None:
        """Run in the caller's task and cancel scope, for a prompt that no plugin wraps.

        With nothing to settle there is nothing to shield. Errors go to the readers; if the scope is
        cancelled, they get ``PromptCancelled``, and the caller the cancellation.
        """
        self._inner = scope
        await self._run(self._answer_unwrapped, "the prompt was cancelled")

    async def _answer_unwrapped(self) -> Exception | None:
        try:
            await self._call.run()
        except Exception as error:
            return error
        return None

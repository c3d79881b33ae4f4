"""A supervised task: what a prompt and a chain of prompts have in common, from admission to its end.

The states, in order:

1. waiting for its turn: in its conversation, and while the first prompt of its group is let in alone;
2. entering: the plugins' wrappers, one after the other;
3. working: slots, model calls, tools (the subclass says what);
4. settling: callbacks, then the wrappers are left in reverse order;
5. ended: succeeded, failed or cancelled. Only now do readers of the whole answer go on.

Only 1 and 3 can be interrupted (``interruptible``).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import llm
from anyio import get_cancelled_exc_class

from .._compat import BaseExceptionGroup
from ..calls.tracing import chain_span, describe_end, no_span, prompt_span
from ..errors import PromptCancelled
from .hook_scope import PromptResult, entered, find_wrappers, hooks_wrap_prompts
from .interruptible import Interruptible
from .interruption import misplaced, without_echo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractContextManager

    from opentelemetry.trace import Span

    from ..calls.choice import Choice
    from ..calls.standing import Standing
    from ..responses.response import PromptResponse
    from .conversation import Turn
    from .hook_scope import Wrapper
    from .supervisor import Supervisor

logger = logging.getLogger("datasette_llm")


class SupervisedTask(Interruptible, ABC):
    """A prompt or a chain, run by ``run()`` in a task that a supervisor owns.

    Args:
        supervisor: who starts, counts and cancels it.
        datasette: whose plugins wrap it.
        choice: model, purpose and actor, as hooks are told.
        prompt: the text that hooks are told.
        turn: its place in a conversation, or ``None``.
    """

    is_chain = False

    # How every task begins: in the class, since a million of them may be made.
    #: What the wrappers are given; there is none while nobody wraps the prompt.
    result: PromptResult | None = None
    begun = False
    _complete = False
    _failure: Exception | None = None
    _span: Span | None = None

    def __init__(
        self,
        supervisor: Supervisor,
        datasette: Any,
        choice: Choice,
        prompt: str | None,
        *,
        turn: Turn | None = None,
    ) -> None:
        super().__init__(supervisor, choice)
        self._datasette = datasette
        self._prompt = prompt
        self._turn = turn

    # What the subclass says

    @abstractmethod
    async def work(self) -> None:
        """Do what the wrappers are around; raise what they shall see."""

    def enter_context(self) -> None:
        """Set the context variables that the wrappers shall run with."""

    async def after(self) -> None:
        """Do what comes once the wrappers are left, callbacks of the caller for one."""

    @abstractmethod
    def responses(self) -> Sequence[PromptResponse]:
        """The responses it has got so far."""

    @abstractmethod
    def finish_reasons(self, error: Exception | None) -> list[str]:
        """Why its model stopped, each time that it was asked and says so; for a task that ends with this."""

    @abstractmethod
    def finish(self, error: Exception | None) -> None:
        """Tell the readers that it has ended."""

    @abstractmethod
    def cost(self) -> float | None:
        """Return what it cost in dollars, as far as that is known."""

    def count_tokens(self) -> None:
        """Enter what it used in the books of its owner; called when it has succeeded."""

    def wind_down(self) -> None:
        """The owner is about to end: wait for nobody outside. Returns at once."""

    def spoils_turn(self, error: Exception) -> bool:
        """Whether ending with this error means that the conversation's history is as if it never was."""
        return True

    # Life

    async def run(self) -> None:
        """Live from admission to the end. Errors go to the readers, never to the caller.

        Raises:
            BaseException: only what asks the whole program to stop (the loop's own cancellation,
                ``KeyboardInterrupt``), after the wrappers have settled.
        """
        await self._run(self._live, "the task was stopped before it could settle")
        if self._interruption is not None:
            raise self._interruption

    async def _run(self, live: Callable[[], Awaitable[Exception | None]], why_stopped: str) -> None:
        self.begun = True
        error: Exception | None = PromptCancelled(why_stopped)
        try:
            self.supervisor.counters.waiting += 1
            with self.open_span() as self._span:
                try:
                    error = await live()
                except get_cancelled_exc_class() as stop:
                    if not await self.is_misplaced(stop):
                        raise
                    error = misplaced(stop)
                finally:
                    self._end(error)
        except Exception as fault:
            # Out of the books, or of somebody's tracing. Further up it would end the siblings.
            if self.ended:
                logger.exception("The end of a prompt to %s could not be told", self.choice.model_id)
            else:
                self._end(fault)

    def open_span(self) -> AbstractContextManager[Span | None]:
        """The span that this task runs in, if anybody collects spans."""
        if not self.supervisor.traced:
            return no_span
        return chain_span(self.choice) if self.is_chain else prompt_span(self.choice)

    def never_ran(self) -> None:
        """End, because nobody runs it: its supervisor has ended, or the event loop before its first turn."""
        if self.begun:
            return
        self.begun = True
        self.supervisor.counters.waiting += 1
        self._end(PromptCancelled("the owner of this prompt has ended"))

    async def _live(self) -> Exception | None:
        try:
            if self._turn is not None:
                await self.interruptible(self._turn.wait)
            if hooks_wrap_prompts():
                with self.abandonable("a callback"):
                    await self._work_wrapped()
            else:
                # Nothing of it is made, either, if it was cancelled before it began.
                self.check()
                await self._do_work()
            if not self._complete:
                # A wrapper swallowed what ended the work; that makes no answer of it.
                return self._failure or PromptCancelled("a plugin's wrapper stopped the prompt")
            await self.after()
        except Exception as error:
            return error
        return None

    async def _do_work(self) -> None:
        try:
            await self.work()
        except Exception as error:
            self._failure = error
            raise
        self._complete = True

    async def _work_wrapped(self) -> None:
        wrappers = await find_wrappers(self._datasette, self.choice, self._prompt)
        self.check()
        if wrappers:
            await self._work_inside(wrappers)
        else:
            await self._do_work()

    async def _work_inside(self, wrappers: list[Wrapper]) -> None:
        gate = self.supervisor.gate
        alone = gate is not None and not gate.open and await self.interruptible(gate.first)
        result = self.result = PromptResult(
            purpose=self.choice.purpose, group=self.supervisor.group, is_chain=self.is_chain
        )
        self.enter_context()
        admitted = False

        async def enter(index: int) -> None:
            """Enter a wrapper and, inside of it, those that follow; then do the work."""
            nonlocal admitted
            self.check()
            if index < len(wrappers):
                with self.abandonable("a wrapper"):
                    try:
                        async with entered(wrappers[index], result):
                            await enter(index + 1)
                    except BaseExceptionGroup as group:
                        error = without_echo(group, self._failure)
                        if error is group:
                            raise
                        raise error from error.__cause__
                return
            if gate is not None and alone:
                admitted = True
                gate.admitted()
            await self._do_work()

        try:
            await enter(0)
        finally:
            if gate is not None and alone and not admitted:
                gate.refused()

    def _end(self, error: Exception | None) -> None:
        self.ended = True
        try:
            for close in (self._close_accounts, self._close_span, self._close_turn, self._close_counters):
                try:
                    close(error)
                except Exception as fault:
                    # Whatever is wrong with our books, no reader may wait for ever; and none may take the
                    # answer for one that is accounted.
                    error = self._faulty(fault, error)
        finally:
            try:
                self.finish(error)
            except Exception:
                logger.exception("The end of a prompt to %s could not be told", self.choice.model_id)
            finally:
                self.supervisor.forget(self)

    def _faulty(self, fault: Exception, error: Exception | None) -> Exception:
        if error is None:
            return fault
        logger.error("The books of a prompt to %s could not be closed", self.choice.model_id, exc_info=fault)
        return error

    def _close_accounts(self, error: Exception | None) -> None:
        if error is None:
            self.count_tokens()

    def _close_span(self, error: Exception | None) -> None:
        span, self._span = self._span, None
        if span is not None:
            describe_end(span, error, self.responses(), self.finish_reasons(error), self.cost())

    def _close_turn(self, error: Exception | None) -> None:
        if self._turn is None:
            return
        try:
            if error is not None and self.spoils_turn(error):
                self._turn.undo()
        finally:
            self._turn.give_up()

    def _close_counters(self, error: Exception | None) -> None:
        counters = self.supervisor.counters
        self.leave_phase(counters)
        if error is None or isinstance(error, llm.PauseChain):
            counters.succeeded += 1
        elif isinstance(error, PromptCancelled):
            counters.cancelled += 1
        else:
            counters.failed += 1
            self.supervisor.prompt_failed(error)

    @property
    def measured(self) -> bool:
        """Whether anybody collects metrics of its model calls."""
        return self.supervisor.measured

    # Which of the two kinds of unfinished it is, for the statistics

    _running = False

    def begin_attempt(self, response: llm.AsyncResponse) -> None:
        """Tell wrappers and statistics that the model is about to be called."""
        if self.result is not None:
            self.result._attempt(response)
        self.begin_running()

    def count_retry(self) -> None:
        """The model is about to be called again for the same answer."""
        self.supervisor.counters.retries += 1

    def rest(self, resting: bool) -> None:
        """The model call begins, or ends, to wait between two attempts: it is not in flight."""

    def standing(self, key: str | None) -> Standing | None:
        """What the provider's refusals of a key mean for this task."""
        return self.supervisor.standing(key)

    def begin_running(self) -> None:
        """A model call of this task has begun."""
        if not self._running:
            self._running = True
            self.supervisor.counters.waiting -= 1
            self.supervisor.counters.running += 1

    def leave_phase(self, counters: Any) -> None:
        """Count this task neither as waiting nor as running any more."""
        if self._running:
            counters.running -= 1
        else:
            counters.waiting -= 1

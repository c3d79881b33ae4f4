"""Who may interrupt what of a task, and when plugin code that hangs is left behind.

All of a task is shielded, and only what ``interruptible()`` awaits sits in an innermost scope, which
``cancel()`` cancels. So plugin code is never interrupted in the middle of its bookkeeping: a cancelled
prompt's wrappers see ``PromptCancelled``, an ordinary exception, at their ``yield``.

Plugin code that hangs is abandoned, but only in a cancelled task. Each wrapper, and the callbacks, sit in
a scope of their own, nested like the wrappers, and it gets its deadline when it is its turn to settle: so
neither a model that is slow to stop nor a wrapper that hangs takes the time of the wrappers outside of it.
"""

from __future__ import annotations

import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from anyio import CancelScope, get_cancelled_exc_class
from anyio.lowlevel import cancel_shielded_checkpoint

from ..backends import native_cancel
from ..errors import PromptCancelled
from .interruption import comes_of_cancellation, ends_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ..calls.choice import Choice
    from .supervisor import Supervisor

T = TypeVar("T")

logger = logging.getLogger("datasette_llm")


class Interruptible:
    """The part of a task that ``cancel()`` reaches.

    Args:
        supervisor: on whose event loop it runs, and how long plugin code may take to settle.
        choice: what it is about, for the log.
    """

    # In the class, since a million of them may be made.
    cancelled = False
    ended = False
    _patience: CancelScope | None = None
    _inner: CancelScope | None = None
    #: What asks the whole program to stop; it is passed on once the wrappers have settled.
    _interruption: BaseException | None = None

    def __init__(self, supervisor: Supervisor, choice: Choice) -> None:
        self.supervisor = supervisor
        self.choice = choice

    def cancel(self) -> None:
        """Interrupt the work, or what is waited for; wrappers then have the grace period to settle.

        What is complete already stays complete. Returns at once; idempotent.
        """
        if self.ended:
            return
        self.cancelled = True
        self.supervisor.at_home(self._interrupt)

    def _interrupt(self) -> None:
        if self._inner is not None:
            self._inner.cancel()
        else:
            self._begin_grace()

    def _begin_grace(self) -> None:
        if self._patience is not None and self._patience.deadline == math.inf:
            self._patience.deadline = self.supervisor.now() + self.supervisor.grace_seconds

    @contextmanager
    def abandonable(self, what: str) -> Iterator[None]:
        """Run plugin code inside: never interrupted, abandoned when the task is cancelled and it hangs.

        Raises:
            PromptCancelled: it was abandoned.
        """
        outer = self._patience
        # Only the outermost keeps others out: a timeout that a wrapper opens around its yield counts.
        with CancelScope(shield=outer is None) as patience:
            self._patience = patience
            if self.cancelled:
                self._begin_grace()
            try:
                yield
            finally:
                self._patience = outer
                if self.cancelled:
                    self._begin_grace()
        if patience.cancelled_caught:
            seconds = self.supervisor.grace_seconds
            logger.warning(
                "Abandoned %s of a cancelled prompt to %s: it took more than %g s",
                what,
                self.choice.model_id,
                seconds,
            )
            raise PromptCancelled(f"the prompt was cancelled, and {what} did not end within {seconds:g} s")

    def check(self) -> None:
        """Raise ``PromptCancelled`` if somebody has cancelled this task."""
        if self.cancelled:
            raise PromptCancelled("the prompt was cancelled")

    async def interruptible(self, function: Callable[[], Awaitable[T]]) -> T:
        """Await ``function()`` so that ``cancel()`` interrupts it.

        Raises:
            PromptCancelled: it was interrupted, or failed because it was.
            Exception: its own; also when the task was cancelled in the same moment.
        """
        self.check()
        # Inside of plugin code that is shielded by itself, a timeout that it opens around its yield counts.
        scope = self._inner = CancelScope(shield=self._patience is None)
        try:
            with scope:
                return await function()
        except Exception as error:
            if self.cancelled and comes_of_cancellation(error):
                raise PromptCancelled("the prompt was cancelled") from error
            raise
        except get_cancelled_exc_class() as stop:
            if scope.cancel_called and native_cancel.take_back():
                # The loop ends in the very moment in which we are cancelled: the scope lets it through.
                raise PromptCancelled("the prompt was cancelled") from stop
            if not await self._owner_is_stopping(stop):
                # A scope or a timeout that a wrapper opened around its yield: its business, not ours.
                raise
            # The event loop is closing and cancels each task by itself, shield or not. The wrappers
            # get the exception they can settle with; run() then passes this one on.
            self._interruption = stop
            # While asyncio still counts it, anyio's scopes take their own deadlines for it.
            native_cancel.take_back()
            raise PromptCancelled("the event loop is closing") from stop
        except BaseException as stop:
            if not ends_program(stop):
                raise
            self._interruption = stop
            self.cancelled = True
            raise PromptCancelled("the program is being stopped") from stop
        finally:
            self._inner = None
            if self.cancelled:
                self._begin_grace()
        raise PromptCancelled("the prompt was cancelled")

    async def _owner_is_stopping(self, stop: BaseException) -> bool:
        """Whether asyncio cancels this task because the whole event loop ends.

        Then our supervisor is cancelled in the same turn of the loop, and cancels us.
        """
        if not native_cancel.is_native(stop):
            return False
        await cancel_shielded_checkpoint()
        return self.cancelled

    async def is_misplaced(self, stop: BaseException) -> bool:
        """Whether a cancellation that arrives at the top of this task was meant for something else.

        Left alone it would cancel this prompt's siblings.
        """
        if not native_cancel.is_native(stop) or await self._owner_is_stopping(stop):
            return False
        native_cancel.take_back()
        return True

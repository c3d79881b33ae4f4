"""A group: the supervisor of the prompts inside one ``async with`` block.

Who owns what: the block owns a task group; in it live a watcher (which notices that somebody outside
cancels the block), a task per ``prompt()``, and the workers of ``map()``. Leaving the block goes through
these steps, whatever the reason:

1. normally, wait until no prompt is live (a chain that rests for its reader ends now); after an exception
   or a cancellation, cancel those that are;
2. stop maps whose loop was left early;
3. close: from here on ``prompt()`` raises ``GroupClosed``; the task group ends, every task has ended;
4. every plugin's ``llm_group_exit`` hook, once, shielded and with a deadline;
5. close the HTTP clients;
6. leave with the body's exception, unwrapped, or the cancellation, or nothing.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from anyio import get_cancelled_exc_class

from .._compat import BaseExceptionGroup, ExceptionGroup
from ..backends import datasette_side, native_cancel
from ..backends.spawning import start_soon
from ..errors import PromptCancelled
from ..hookspecs import plugin_manager
from . import live
from .supervisor import GRACE_SECONDS

if TYPE_CHECKING:
    from types import TracebackType

    from .group import Group
    from .group_supervisor import GroupSupervisor

logger = logging.getLogger("datasette_llm")


class GroupBlock:
    """Enters and leaves one group; what is inside belongs to the task that runs the block."""

    def __init__(self, supervisor: GroupSupervisor) -> None:
        self.supervisor = supervisor
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> GroupSupervisor:
        supervisor = self.supervisor
        await supervisor.clients.prepare(supervisor.choice.model, supervisor.choice.key)
        await self._stack.enter_async_context(datasette_side.open_side())
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        supervisor._tasks = self._tasks
        supervisor.start_soon(self._watch)
        live.entered(supervisor)
        return supervisor

    async def _watch(self) -> None:
        """Notice a cancellation from outside even while the body does not (in a thread, say)."""
        try:
            await anyio.sleep_forever()
        finally:
            if not self.supervisor.group.closed:
                self.supervisor.cancel()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        body_error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        supervisor = self.supervisor
        stop = body_error
        try:
            if stop is None:
                for running in list(supervisor._maps):
                    running.stop()
                supervisor.wind_down()
                await supervisor.idle()
            elif isinstance(stop, PromptCancelled):
                # Whoever cancels the block from outside cancels its prompts, and the body may hear of
                # that first: the block is left with the cancellation, not with its echo.
                await anyio.lowlevel.checkpoint_if_cancelled()
        except get_cancelled_exc_class() as cancellation:
            stop = cancellation
        if stop is not None:
            supervisor.cancel()
        settling_error: Exception | None = None
        try:
            absorbed = await self._end_tasks(stop)
        finally:
            live.left(supervisor)
            supervisor.group.closed = True
            supervisor._elapsed = supervisor.now() - supervisor._began
            settling_error = await self._settle()
        if stop is not None and not absorbed and stop is not body_error:
            raise stop
        leaves = self._leave_with(body_error, absorbed)
        if settling_error is not None and (body_error is None or leaves):
            raise settling_error
        return leaves

    async def _end_tasks(self, stop: BaseException | None) -> bool:
        """Wait for the last tasks. Returns whether a cancellation was the group's own and ends here."""
        try:
            if isinstance(stop, get_cancelled_exc_class()):
                return bool(await self._tasks.__aexit__(type(stop), stop, stop.__traceback__))
            if stop is None:
                self.supervisor.group.closed = True
            # Prompts are shielded: this ends the watcher, and workers of maps that have been stopped.
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(None, None, None)
        except BaseExceptionGroup as crash:
            # KeyboardInterrupt, say, that hit a prompt's code.
            if len(crash.exceptions) == 1:
                raise crash.exceptions[0] from None
            raise
        return False

    async def _settle(self) -> Exception | None:
        """Exit hooks and clients. Returns what a hook raised: it must not hide the body's exception.

        In a task of its own: asyncio's ``Task.cancel()``, which knows no shields, reaches only ours.
        """
        supervisor = self.supervisor
        supervisor._log_unread_failures()
        failures: list[Exception] = []
        dropped: list[bool] = []

        async def settle() -> None:
            try:
                await call_exit_hooks(supervisor.datasette, supervisor.group, supervisor.grace_seconds)
            except Exception as error:
                failures.append(error)
            finally:
                with anyio.move_on_after(GRACE_SECONDS, shield=True):
                    await supervisor.clients.aclose()

        try:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    start_soon(tasks, settle, if_dropped=lambda: dropped.append(True))
        finally:
            with anyio.CancelScope(shield=True):
                if dropped:
                    await settle()
                await self._stack.aclose()
        return failures[0] if failures else None

    def _leave_with(self, body_error: BaseException | None, absorbed: bool) -> bool:
        errors = self.supervisor._errors
        if not errors:
            return absorbed
        if body_error is not None and not absorbed and not _is_made_of(body_error, errors):
            return False
        if len(errors) == 1 and body_error is errors[0]:
            return False
        error = (
            errors[0] if len(errors) == 1 else ExceptionGroup("several prompts of the group failed", errors)
        )
        context = error.__context__
        try:
            raise error
        finally:
            # Not "from None": that would lose the cause that the provider's library gave it.
            error.__context__ = context


def _is_made_of(error: BaseException, errors: list[Exception]) -> bool:
    """Whether an exception tells nothing but what the group's prompts ended with."""
    if isinstance(error, BaseExceptionGroup):
        # The body reads its responses in a task group of its own.
        return all(_is_made_of(inner, errors) for inner in error.exceptions)
    return isinstance(error, PromptCancelled) or any(error is known for known in errors)


async def call_exit_hooks(datasette: Any, group: Group, grace_seconds: float) -> None:
    """Call every plugin's ``llm_group_exit`` hook once, also if another one fails or hangs.

    Shielded: each runs to its end although the block is being cancelled, up to a deadline.

    Raises:
        Exception: the first hook's that failed, when all have run; the others are logged.
    """
    pm = plugin_manager()
    failure: Exception | None = None
    for implementation in reversed(pm.hook.llm_group_exit.get_hookimpls()):
        if implementation.wrapper or implementation.hookwrapper:
            continue
        others = [plugin for plugin in pm.get_plugins() if plugin is not implementation.plugin]
        with anyio.move_on_after(grace_seconds, shield=True) as scope:
            try:
                answers = pm.subset_hook_caller("llm_group_exit", others)(datasette=datasette, group=group)
                for answer in answers:
                    await datasette_side.resolve(answer)
            except BaseException as error:
                # The event loop ends, or the hook awaited something that was cancelled: it does not
                # keep the other plugins from settling.
                if not isinstance(error, Exception) and not native_cancel.is_native(error):
                    raise
                logger.exception("The llm_group_exit hook of %s failed", implementation.plugin_name)
                if failure is None:
                    failure = (
                        error
                        if isinstance(error, Exception)
                        else RuntimeError(
                            f"the llm_group_exit hook of {implementation.plugin_name} was cancelled"
                        )
                    )
        if scope.cancelled_caught:
            logger.error(
                "The llm_group_exit hook of %s took more than %g s and was abandoned",
                implementation.plugin_name,
                grace_seconds,
            )
    if failure is not None:
        raise failure

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
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
from anyio import get_cancelled_exc_class

from .._compat import BaseExceptionGroup, ExceptionGroup
from ..backends import datasette_side, native_cancel
from ..calls.clients import ClientPool
from ..calls.tracing import is_traced
from ..errors import GroupClosed, PromptCancelled
from ..hookspecs import plugin_manager
from ..pace.throttle import get_throttle
from .stats import GroupStats
from .supervisor import GRACE_SECONDS, Supervisor
from .task import EntryGate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from ..calls.choice import Choice
    from ..pace.policy import ConcurrencyBounds
    from ..responses.response import PromptResponse
    from .map import MapRun

logger = logging.getLogger("datasette_llm")

#: How many failed prompts a group remembers to say so if nobody reads them.
FAILURES_KEPT = 1_000
#: How many of those it logs one by one.
FAILURES_LOGGED = 10


class Responses:
    """The responses of a group, as its hooks see them.

    ``len()`` counts all prompts of the group. Those of ``prompt()`` are kept until the group is gone;
    those of ``map()`` are only counted, since there may be millions.
    """

    def __init__(self) -> None:
        self._kept: list[PromptResponse] = []
        self._uncounted = 0

    def __len__(self) -> int:
        return len(self._kept) + self._uncounted

    def __iter__(self) -> Iterator[PromptResponse]:
        return iter(self._kept)

    def __getitem__(self, index: int) -> PromptResponse:
        return self._kept[index]

    def _keep(self, response: PromptResponse) -> None:
        self._kept.append(response)

    def _count(self) -> None:
        self._uncounted += 1


class Group(Supervisor):
    """The supervisor of a group's prompts, as hooks receive it.

    Attributes:
        model_id: the model of the group.
        purpose: what its prompts are for.
        actor: who they are for.
        closed: whether the block has been left.
    """

    def __init__(
        self,
        datasette: Any,
        choice: Choice,
        *,
        concurrency: int | ConcurrencyBounds | None = None,
        on_error: Literal["collect", "cancel"] = "collect",
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        super().__init__(grace_seconds=grace_seconds)
        self.model_id = choice.model_id
        self.purpose = choice.purpose
        self.actor = choice.actor
        self.closed = False
        self.choice = choice
        self.gate = EntryGate()
        throttle = get_throttle(choice.key, choice.model_id, choice.settings)
        self.slots = throttle.slots(choice.settings.concurrency if concurrency is None else concurrency)
        self.clients = ClientPool()
        self.clients.adopt(choice.model, throttle.observe)
        self._datasette = datasette
        self._on_error = on_error
        self._responses = Responses()
        self._began = anyio.current_time()
        self._elapsed: float | None = None
        self._failed: list[PromptResponse] = []
        self._errors: list[Exception] = []
        self._maps: dict[MapRun[Any], None] = {}
        self._traced = is_traced()

    @property
    def traced(self) -> bool:
        return self._traced  # Asked once, not for each of a hundred thousand prompts.

    @property
    def stats(self) -> GroupStats:
        """What happened so far; cheap enough to read many times a second."""
        counters = self.counters
        elapsed = anyio.current_time() - self._began if self._elapsed is None else self._elapsed
        ended = counters.succeeded + counters.failed + counters.cancelled
        return GroupStats(
            waiting=counters.waiting,
            running=counters.running,
            succeeded=counters.succeeded,
            failed=counters.failed,
            cancelled=counters.cancelled,
            retries=counters.retries,
            throttled_seconds=self.slots.throttled_seconds,
            input_tokens=counters.input_tokens,
            output_tokens=counters.output_tokens,
            elapsed=elapsed,
            prompts_per_second=ended / elapsed if elapsed > 0 else 0.0,
            concurrency=self.slots.limit,
        )

    def __repr__(self) -> str:
        return f"<Group {self.model_id} purpose={self.purpose!r} prompts={len(self._responses)}>"

    def check_open(self) -> None:
        """Raise if no prompt can be asked of this group any more.

        Raises:
            GroupClosed: its block has been left.
            PromptCancelled: it has been cancelled.
        """
        if self.closed:
            raise GroupClosed("the group's block has been left; open another group for more prompts")
        if self._cancelled:
            raise PromptCancelled("the group has been cancelled")

    def cancel(self) -> None:
        super().cancel()
        for running in list(self._maps):
            running.stop()

    def prompt_failed(self, error: Exception) -> None:
        if self._on_error == "cancel" and not self._cancelled:
            self._errors.append(error)
            self.cancel()
            if self._tasks is not None:
                # The body is waiting for an answer that will not come.
                self._tasks.cancel_scope.cancel()
        elif self._on_error == "cancel":
            self._errors.append(error)

    def key_refused(self, error: Exception) -> None:
        if self.refusal is None and not self.counters.succeeded:
            logger.warning(
                "The key for %s is refused: no more prompts of this group are sent to it", self.model_id
            )
            self.refusal = error

    def watch_failure(self, response: PromptResponse) -> None:
        """Remember a failed response, to say at the end that nobody read it."""
        if len(self._failed) >= FAILURES_KEPT:
            self._failed = [kept for kept in self._failed if not kept._error_seen]
        if len(self._failed) < FAILURES_KEPT:
            self._failed.append(response)

    def _log_unread_failures(self) -> None:
        unread = [
            response
            for response in self._failed
            # Those that the block is left with are not lost.
            if not response._error_seen and response._error not in self._errors
        ]
        for response in unread[:FAILURES_LOGGED]:
            error = response._error
            logger.warning(
                "A prompt to %s failed and nobody read it: %s: %s", self.model_id, type(error).__name__, error
            )
        if len(unread) > FAILURES_LOGGED:
            logger.warning("and %d more prompts that nobody read", len(unread) - FAILURES_LOGGED)


class GroupBlock:
    """Enters and leaves one group; what is inside belongs to the task that runs the block."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Group:
        group = self.group
        await group.clients.prepare(group.choice.model, group.choice.key)
        await self._stack.enter_async_context(datasette_side.open_side())
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        group._tasks = self._tasks
        self._tasks.start_soon(self._watch)
        return group

    async def _watch(self) -> None:
        """Notice a cancellation from outside even while the body does not (in a thread, say)."""
        try:
            await anyio.sleep_forever()
        finally:
            if not self.group.closed:
                self.group.cancel()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        body_error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        group = self.group
        stop = body_error
        try:
            if stop is None:
                for running in list(group._maps):
                    running.stop()
                group.wind_down()
                await group.idle()
            elif isinstance(stop, PromptCancelled):
                # Whoever cancels the block from outside cancels its prompts, and the body may hear of
                # that first: the block is left with the cancellation, not with its echo.
                await anyio.lowlevel.checkpoint_if_cancelled()
        except get_cancelled_exc_class() as cancellation:
            stop = cancellation
        if stop is not None:
            group.cancel()
        settling_error: Exception | None = None
        try:
            absorbed = await self._end_tasks(stop)
        finally:
            group.closed = True
            group._elapsed = anyio.current_time() - group._began
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
                self.group.closed = True
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
        group = self.group
        group._log_unread_failures()
        failures: list[Exception] = []

        async def settle() -> None:
            try:
                await call_exit_hooks(group._datasette, group)
            except Exception as error:
                failures.append(error)
            finally:
                with anyio.move_on_after(GRACE_SECONDS, shield=True):
                    await group.clients.aclose()

        try:
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(settle)
        finally:
            with anyio.CancelScope(shield=True):
                await self._stack.aclose()
        return failures[0] if failures else None

    def _leave_with(self, body_error: BaseException | None, absorbed: bool) -> bool:
        errors = self.group._errors
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


async def call_exit_hooks(datasette: Any, group: Group) -> None:
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
        with anyio.move_on_after(group.grace_seconds, shield=True) as scope:
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
                group.grace_seconds,
            )
    if failure is not None:
        raise failure

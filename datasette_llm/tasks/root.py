"""The root supervisor: who owns the prompts that are in no group.

There is at most one per event loop, kept in a ``RunVar``. The first prompt starts it: as an asyncio task
or a trio system task, the one place in this package where a task is started without a parent. It ends
when it has no prompts left and its HTTP clients have been idle for a while, or when somebody drains it
(Datasette's shutdown), or with the event loop: both backends cancel it then, and prompts still running
get their grace period.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextvars import Context, copy_context
from typing import TYPE_CHECKING

import anyio
from anyio import get_cancelled_exc_class
from anyio.lowlevel import RunVar

from .._compat import BaseExceptionGroup
from ..backends import datasette_side
from .supervisor import GRACE_SECONDS, Supervisor

if TYPE_CHECKING:
    from ..pace.policy import ConcurrencyBounds
    from ..pace.slots import Slots
    from ..pace.throttle import Throttle
    from .supervisor import Child

logger = logging.getLogger("datasette_llm")

#: How long reused HTTP clients are kept after the last standalone prompt, in seconds. Providers close
#: idle connections after about a minute themselves.
IDLE_SECONDS = 30.0

_root: RunVar[RootSupervisor] = RunVar("datasette_llm_root")


class RootSupervisor(Supervisor):
    """Owns the prompts of one event loop that are in no group, and the HTTP clients they share."""

    def __init__(self) -> None:
        super().__init__()
        self._slots: dict[tuple[Throttle, int | ConcurrencyBounds, bool], Slots] = {}
        self.closing = False
        # asyncio itself would let a task be collected that nobody holds; the RunVar holds this.
        self.task: asyncio.Task[None] | None = None
        # Asked before its own task had its first turn, each with the context of whoever asked.
        self._early: list[tuple[Context, Child]] = []
        self._woken = anyio.Event()
        self._ended = anyio.Event()

    def start(self, task: Child) -> None:
        """Run a task as a child of this supervisor. Returns at once."""
        if self._tasks is None:
            self.adopt(task)
            self._early.append((copy_context(), task))
        else:
            super().start(task)
        self._woken.set()

    def slots_of(
        self, throttle: Throttle, concurrency: int | ConcurrencyBounds, *, urgent: bool = True
    ) -> Slots:
        """The slots that all standalone prompts to one model share: a fixed number bounds them together."""
        known = self._slots.get((throttle, concurrency, urgent))
        if known is None:
            known = self._slots[throttle, concurrency, urgent] = throttle.slots(concurrency, urgent=urgent)
        return known

    async def run(self) -> None:
        """Own the prompts until there are none left to own."""
        try:
            async with datasette_side.open_side(), anyio.create_task_group() as tasks:
                self._tasks = tasks
                for context, task in self._early:
                    context.run(self._spawn, task)
                self._early.clear()
                try:
                    await self._until_idle()
                except get_cancelled_exc_class():
                    self.closing = True
                    self.cancel()
                    raise
        except BaseExceptionGroup as crash:
            if crash.subgroup(KeyboardInterrupt) is None:
                raise
            # Ctrl-C hit the code of a prompt. On asyncio the loop has passed it on already; on trio it
            # belongs to the main task, and in a system task it would look like a fault of trio.
            if datasette_side.backend() == "trio":
                signal.raise_signal(signal.SIGINT)
        finally:
            self.closing = True
            with anyio.move_on_after(GRACE_SECONDS, shield=True):
                await self.clients.aclose()
            self.over()

    def over(self) -> None:
        """Nothing runs any more, or ever did: end what was asked and has not begun. Idempotent."""
        self.closing = True
        for task in list(self._live):
            task.never_ran()
        self._ended.set()

    async def _until_idle(self) -> None:
        while not self.closing:
            self._woken = anyio.Event()
            await self.idle()
            if self.clients.empty:
                break
            with anyio.move_on_after(IDLE_SECONDS):
                await self._woken.wait()
                continue
            break
        # No await between here and the end of the task group: who asks now gets a new supervisor.
        self.closing = True

    async def drain(self, seconds: float) -> None:
        """Let the prompts finish, for a while; cancel those that have not; end.

        Args:
            seconds: how long to wait before cancelling.
        """
        self.wind_down()
        with anyio.move_on_after(seconds):
            await self.idle()
        self.closing = True
        if self._live:
            logger.warning("Cancelling %d prompts that are still running at shutdown", len(self._live))
            self.cancel()
        self._woken.set()
        with anyio.move_on_after(GRACE_SECONDS + 1):
            await self._ended.wait()


def root_supervisor() -> RootSupervisor:
    """The root supervisor of the running event loop, started if there is none."""
    root = _root.get(None)
    if root is None or root.closing:
        root = RootSupervisor()
        _root.set(root)
        # In a context of its own: it outlives the request that started it, whose context variables
        # must not. Each prompt runs in the context of whoever asked.
        if datasette_side.backend() == "trio":
            import trio

            trio.lowlevel.spawn_system_task(root.run)
        else:
            loop = asyncio.get_running_loop()
            root.task = Context().run(loop.create_task, root.run(), name="datasette-llm root supervisor")
            # Where the loop ends before its first turn, asyncio drops it, and no line of run() is reached.
            root.task.add_done_callback(lambda _: root.over())
    return root


async def drain(seconds: float = GRACE_SECONDS) -> None:
    """Let the standalone prompts of this event loop finish and close what they shared.

    Args:
        seconds: how long prompts may still run before they are cancelled.
    """
    root = _root.get(None)
    if root is not None and not root.closing:
        await root.drain(seconds)

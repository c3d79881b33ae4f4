"""What every owner of prompts does: start them as tasks, count them, cancel them, wait for them."""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ..backends.collector import spare_older_objects
from ..backends.datasette_side import backend
from ..backends.loops import LoopDoor, loop_clock
from ..backends.spawning import start_soon
from ..calls.clients.pool import ClientPool
from ..calls.metrics import is_measured
from ..calls.model_call import ModelCall
from ..calls.tracing import is_traced

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskGroup

    from ..calls.standing import Standing
    from ..responses.response import PromptResponse
    from .entry_gate import EntryGate
    from .group import Group

#: How long the wrappers of a cancelled prompt may take to settle, in seconds.
GRACE_SECONDS = 5.0
#: So many at once keep the collector busy with what was there before: 245 us a prompt, 107 without that.
MANY = 32


@dataclass
class Counters:
    """What happened to the prompts of one owner so far."""

    waiting: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    retries: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None
    unpriced: int = 0

    def count_tokens(self, sent: int, received: int, cost: float | None) -> None:
        """Add what a prompt has used."""
        if cost is None:
            self.unpriced += 1
        else:
            self.cost = (self.cost or 0.0) + cost
        self.input_tokens += sent
        self.output_tokens += received


class Child(Protocol):
    """A task that a supervisor owns."""

    async def run(self) -> None: ...

    def never_ran(self) -> None: ...

    def cancel(self) -> None: ...

    def wind_down(self) -> None: ...


class Supervisor:
    """Owns tasks: each runs in its task group, and none outlives it.

    Attributes:
        counters: what happened to its prompts.
        grace_seconds: how long a cancelled prompt's wrappers may take to settle.
        group: what hooks see of the group whose prompts these are, or ``None``.
        gate: lets the first prompt of a group enter its wrappers alone.
        clients: the HTTP clients that its prompts share.
        now: the clock of the event loop that its tasks run on.
        call_type: how its prompts call their model.
    """

    call_type: type[ModelCall] = ModelCall

    group: Group | None = None
    gate: EntryGate | None = None

    def __init__(self, *, grace_seconds: float = GRACE_SECONDS) -> None:
        self.counters = Counters()
        self.grace_seconds = grace_seconds
        self._tasks: TaskGroup | None = None
        self._backend = backend()
        self._door = LoopDoor()
        self.now = loop_clock()
        self.clients = ClientPool()
        self._live: dict[Child, None] = {}
        self._cancelled = False
        self._winding_down = False
        self._idle: anyio.Event | None = None
        self._while_many = ExitStack()

    @property
    def traced(self) -> bool:
        """Whether its prompts run in spans."""
        return is_traced()

    @property
    def measured(self) -> bool:
        """Whether its prompts are measured."""
        return is_measured()

    def start(self, task: Child) -> None:
        """Run a task as a child of this supervisor, in the caller's context. Returns at once."""
        self.adopt(task)
        self.at_home(partial(self._spawn, task))

    @property
    def clients_here(self) -> ClientPool | None:
        """The shared clients, where the caller is on the side that they belong to."""
        return self.clients if backend() == self._backend else None

    def at_home(self, function: Callable[[], object]) -> None:
        """Call a function on the side that this supervisor's tasks run on: at once, or soon.

        A plugin on the hosted asyncio loop may use a group of trio's side, and the other way round.
        """
        if backend() == self._backend:
            function()
        else:
            self._door.call_soon(partial(copy_context().run, function))

    def _spawn(self, task: Child) -> None:
        try:
            self.start_soon(task.run, task.never_ran)
        except RuntimeError:
            # It has ended meanwhile.
            task.never_ran()

    def start_soon(
        self,
        function: Callable[[], Coroutine[Any, Any, None]],
        if_dropped: Callable[[], None] | None = None,
    ) -> None:
        """Run a function as a task of this supervisor; only on its own side.

        Args:
            function: an async function.
            if_dropped: called if the event loop ended before the task's first turn.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._tasks is not None
        start_soon(self._tasks, function, if_dropped)

    def standing(self, key: str | None) -> Standing | None:
        """Return what the provider's refusals of a key mean for these prompts: nothing, by default."""
        return None

    def adopt(self, task: Child) -> None:
        """Count a task as live that its caller is about to run inside this supervisor's tasks."""
        self._live[task] = None
        if len(self._live) == MANY:
            self._while_many.enter_context(spare_older_objects())
        if self._winding_down:
            task.wind_down()
        if self._cancelled:
            task.cancel()

    def forget(self, task: Child) -> None:
        """Called by a task when it has ended."""
        self._live.pop(task, None)
        if self._live:
            return
        self._while_many.close()
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    def prompt_failed(self, error: Exception) -> None:
        """Called when a task has failed of itself (not by cancellation), before it ends."""

    def watch_failure(self, response: PromptResponse) -> None:
        """Called with the response of a prompt that has failed of itself, when it has ended."""

    def cancel(self) -> None:
        """Cancel every live task, and each one that still comes. Returns at once."""
        self._cancelled = True
        for task in list(self._live):
            task.cancel()

    def wind_down(self) -> None:
        """Have no task wait for its readers any more. Returns at once."""
        self._winding_down = True
        for task in list(self._live):
            task.wind_down()

    async def idle(self) -> None:
        """Wait until no task is live."""
        while self._live:
            if self._idle is None:
                self._idle = anyio.Event()
            await self._idle.wait()

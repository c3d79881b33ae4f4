"""Which worker makes a call, and what becomes of it when that worker dies.

A fleet lives on an event loop of its own, most often in a thread of its own; whoever asks lives on another
(`seat`). A call goes to the worker that has the fewest in flight, so one that is slow or far away gets
fewer. A worker that is gone has its calls made by others, unless somebody has read a part of the answer:
that is told as a broken connection, and the prompt's own rules decide.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ...backends.loops import LoopDoor, loop_clock
from ...errors import NoWorkers, WorkersError
from ..workers import TIMEOUT_SECONDS
from .line import Line, UnfitWorker
from .suspects import CallKillsWorkers, Deaths, at_work, is_suspect, without_suspect

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from .line import Link
    from .seat import Call, Readiness

logger = logging.getLogger("datasette_llm")

#: Seconds between two looks at who is there.
LOOK_SECONDS = 0.5
#: Seconds until a worker that could not be reached is tried again.
RETRY_SECONDS = 2.0


class WorkerGone(ConnectionError):
    """The worker was gone when a part of the answer had been read."""


class Source(Protocol):
    """Where workers come from."""

    async def addresses(self) -> Collection[str]:
        """Return who is there now.

        Raises:
            WorkersError: there will never be one.
            Exception: nobody knows just now.
        """

    async def connect(self, address: str) -> Link:
        """Begin to work with a worker.

        Raises:
            UnfitWorker: it cannot work for this one.
            Exception: it cannot be reached.
        """


@dataclass(frozen=True)
class Figures:
    """What a fleet did so far.

    Attributes:
        workers: calls in flight, by worker.
        waiting: calls that wait for a worker.
        prompts: calls that were answered or have failed, by worker.
        deaths: workers that were lost.
        again: calls that were sent a second time.
    """

    workers: Mapping[str, int]
    waiting: int
    prompts: Mapping[str, int]
    deaths: int
    again: int


def in_a_line(error: Exception) -> str:
    """Return an error's words as one line."""
    return " ".join(str(error).split()) or type(error).__name__


class Fleet:
    """Workers, and the calls they have.

    Args:
        timeout: how many seconds calls wait while there is no worker.
        start: how many seconds, at least, whoever opens a group waits for the first one.
    """

    def __init__(self, timeout: float = TIMEOUT_SECONDS, *, start: float = 0.0) -> None:
        self.timeout = timeout
        self._start = max(start, timeout)
        self.lines: dict[str, Line] = {}
        self._queue: deque[Call] = deque()
        self._inbox: deque[Callable[[], object]] = deque()
        self._told = False
        self._closing = False
        self._door: LoopDoor | None = None
        self._source: Source | None = None
        self._connecting: set[str] = set()
        self._present: set[str] | None = None
        self._unfit: dict[str, str] = {}
        self._unreached: dict[str, str] = {}
        self._models: dict[str, Mapping[str, Any]] = {}
        self._waiting_since: float | None = None
        self._waiting_to_begin: set[Readiness] = set()
        self._hopeless: WorkersError | None = None
        self._over = False
        self._trouble: str | None = "the scheduler has not answered"
        self._prompts: dict[str, int] = {}
        self._deaths = Deaths()
        self.again = 0

    @property
    def figures(self) -> Figures:
        """What it did so far; may be read from any thread."""
        lines = list(self.lines.values())
        return Figures(
            {line.address: len(line.in_flight) for line in lines},
            len(self._queue),
            dict(self._prompts),
            self._deaths.count,
            self.again,
        )

    # From other threads

    def tell(self, what: Callable[[], object]) -> None:
        """Have the fleet's loop call a function soon, together with what else it is told."""
        self._inbox.append(what)
        if self._over:
            # No loop hears of it any more: whoever tells it is told that at once.
            self._hear()
        elif not self._told and self._door is not None:
            self._told = True
            self._door.call_soon(self._hear)

    def _hear(self) -> None:
        self._told = False
        while self._inbox:
            try:
                what = self._inbox.popleft()
            except IndexError:  # another thread was told of it
                return
            what()

    # On the fleet's own loop

    async def run(self, source: Source, *, started: Callable[[], object] | None = None) -> None:
        """Look after the workers until cancelled."""
        self._clock = loop_clock()
        # Made here: whoever makes the fleet may live on another kind of loop.
        self._looked = anyio.Event()
        self._source = source
        try:
            async with anyio.create_task_group() as self._tasks:
                self._door = LoopDoor()
                self._hear()
                if started is not None:
                    started()
                try:
                    self._tasks.start_soon(self._ask_who_is_there)
                    while True:
                        await anyio.sleep(LOOK_SECONDS)
                        self._look()
                finally:
                    self._closing = True
        finally:
            self._end()

    def _end(self) -> None:
        """Have everybody who still waits hear that nothing will come."""
        self._closing = self._over = True
        self._hopeless = self._hopeless or WorkersError("the workers have ended")
        self._hear()
        for readiness in self._waiting_to_begin:
            readiness.refuse(self._hopeless)
        waiting, self._queue = [*self._queue, *self._deaths.released()], deque()
        for call in waiting:
            call.fail(self._hopeless)

    async def _ask_who_is_there(self) -> None:
        """Ask again and again: on its own, since a scheduler may take its time over an answer."""
        assert self._source is not None
        while True:
            try:
                self._present = set(await self._source.addresses())
                self._trouble = None
            except WorkersError as error:
                self._hopeless = error
            except Exception as error:
                # The workers that are there go on while they answer.
                self._trouble, self._present = in_a_line(error), None
            self._look()
            await anyio.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        present = set(self.lines) if self._present is None else self._present
        for address, line in list(self.lines.items()):
            if address not in present:
                line.give_up()
        for address in present - self.lines.keys() - self._connecting - self._unfit.keys():
            self._connecting.add(address)
            self._tasks.start_soon(self._work_with, address)
        for told in (self._unfit, self._unreached):
            for address in told.keys() - present:
                del told[address]
        self._place_suspects()
        self._look_at_the_queue()
        looked, self._looked = self._looked, anyio.Event()
        looked.set()

    def _look_at_the_queue(self) -> None:
        if not self._queue or any(self._fits(line, self._queue[0]) for line in self.lines.values()):
            self._waiting_since = None
            return
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
            logger.warning("No worker is there: %d prompts wait for one", len(self._queue))
        if now - self._waiting_since >= self.timeout or self._hopeless is not None:
            error = self._hopeless or self.nobody(now - self._waiting_since)
            waiting, self._queue = self._queue, deque()
            self._waiting_since = None
            for call in waiting:
                call.fail(error)

    def nobody(self, seconds: float) -> NoWorkers:
        """Return the error for having waited so long."""
        if self._unfit:
            address, why = next(iter(self._unfit.items()))
            what = f"{address} cannot be used: {why}"
        elif refused := [(line.address, why) for line in self.lines.values() for why in line.unfit.values()]:
            what = "worker {}: {}".format(*refused[0])
        else:
            what = self._trouble or next(iter(self._unreached.values()), "the scheduler has none")
        return NoWorkers(None, what, seconds, reached=bool(self._prompts))

    async def _work_with(self, address: str) -> None:
        assert self._source is not None
        try:
            line = await self._greeted(address)
        except UnfitWorker as error:
            self._unfit[address] = str(error)
            logger.warning("The worker %s cannot be used: %s", address, error)
            return
        except Exception as error:
            logger.debug("No connection to the worker %s: %s", address, error)
            self._unreached[address] = in_a_line(error)
            await anyio.sleep(RETRY_SECONDS)
            return
        finally:
            self._connecting.discard(address)
        self.lines[address] = line
        self._unreached.pop(address, None)
        self._prompts.setdefault(address, 0)
        while self._queue and self._fits(line, self._queue[0]):
            self.submit(self._queue.popleft())
        self._look_at_the_queue()
        try:
            await line.run()
        finally:
            del self.lines[address]
            left = line.take_back()
            if not line.ended and not self._closing:
                self._deaths.note(left)
                logger.warning("The worker %s is gone; %d prompts go to another one", address, len(left))
            for call in left:
                self._lost_its_worker(call, address)
            self._place_suspects()

    async def _greeted(self, address: str) -> Line:
        assert self._source is not None
        line = Line(address, await self._source.connect(address), self)
        try:
            unfit = await line.greet()
            if unfit is not None:
                raise UnfitWorker(unfit)
            for model in self._models.values():
                await line.check(model)
        except BaseException:
            await line.say_goodbye()
            raise
        return line

    def _lost_its_worker(self, call: Call, address: str) -> None:
        if call.heard:
            call.fail(WorkerGone(f"the worker {address} is gone in the middle of its answer"))
        elif self._deaths.is_fault_of(call):
            call.fail(
                CallKillsWorkers(f"{call.deaths} workers that were given this prompt died, one after another")
            )
        else:
            self.again += 1
            self.submit(call)

    def submit(self, call: Call) -> None:
        """Give a call to the worker that has the fewest, or let it wait for one."""
        if call.over:
            return
        if self._over:
            call.fail(self._hopeless or WorkersError("the workers have ended"))
            return
        fitting = [line for line in self.lines.values() if self._fits(line, call)]
        if call.deaths:
            fitting = at_work(fitting, self._prompts)
        if fitting and is_suspect(call):
            fitting = without_suspect(fitting)
            if not fitting:
                call.let_wait(True)
                self._deaths.waiting.append(call)
                return
        best = min(fitting, key=lambda line: len(line.in_flight), default=None)
        if best is None:
            call.let_wait(True)
            self._queue.append(call)
            self._look_at_the_queue()
        else:
            call.let_wait(False)
            best.put(call)

    def withdraw(self, call: Call) -> None:
        """Cancel a call that is not wanted any more."""
        if call.line is not None:
            call.line.cancel(call)
        else:
            for waiting in (self._queue, self._deaths.waiting):
                if call in waiting:
                    waiting.remove(call)

    def answered(self, line: Line, call: Call) -> None:
        """Count a call that has come to its end."""
        self._prompts[line.address] = self._prompts.get(line.address, 0) + 1
        self._deaths.answered(call)
        if is_suspect(call):
            self._place_suspects()

    def _place_suspects(self) -> None:
        """Give those that wait for it to workers that have no suspect now."""
        for call in self._deaths.released():
            self.submit(call)

    @staticmethod
    def _fits(line: Line, call: Call) -> bool:
        return not line.closing and call.model_id not in line.unfit

    def prepare(self, readiness: Readiness) -> None:
        """See that calls to a model can be made, and tell when that is known."""
        if self._over:
            readiness.refuse(self._hopeless or WorkersError("the workers have ended"))
            return
        self._models[readiness.model["id"]] = readiness.model
        self._waiting_to_begin.add(readiness)
        self._tasks.start_soon(self._prepare, readiness)

    async def _prepare(self, readiness: Readiness) -> None:
        began = self._clock()
        while not await self._is_decided(readiness):
            left = began + self._start - self._clock()
            if left <= 0:
                readiness.refuse(self.nobody(self._clock() - began))
                break
            with anyio.move_on_after(left):
                await self._looked.wait()
        # Not when this breaks off: then `_end()` tells it.
        self._waiting_to_begin.discard(readiness)

    async def _is_decided(self, readiness: Readiness) -> bool:
        """Ask the workers that are there. One that does not answer says nothing about the others."""
        differences: list[str] = []
        fit = False
        for line in list(self.lines.values()):
            try:
                why = await line.check(readiness.model)
                if why is None and readiness.key is not None:
                    why = await line.offer(readiness.key)
            except Exception as error:
                logger.debug("The worker %s did not answer: %s", line.address, error)
                line.give_up()
                continue
            fit = fit or why is None
            if why is not None:
                differences.append(f"worker {line.address}: {why}")
        if fit:
            for difference in differences:
                logger.warning("Not used for %s: %s", readiness.model["id"], difference)
            readiness.accept()
        elif differences:
            readiness.refuse(WorkersError("; ".join(differences[:3])))
        elif self._hopeless is not None:
            readiness.refuse(self._hopeless)
        elif self._unfit and not self._connecting and not self.lines:
            readiness.refuse(WorkersError(str(self.nobody(0.0).what)))
        else:
            return False
        return True

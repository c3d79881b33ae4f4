"""The asyncio loop that trio-asyncio hosts inside a trio run, and how trio tasks use it.

Which loop, for a trio task that needs one:

1. the one the program opened around that task itself (``trio_asyncio.open_loop()``), else
2. one loop per trio run, owned by one trio system task (`_Host.serve`): started by the first who
   needs it, and left when trio, whose main task is done, cancels the system tasks and the last
   holder has let go (a call under way, or a supervisor that still settles its prompts).

A loop per call or per group would cost more, and would cancel what Datasette and plugins have
started in the background. Imported on trio only, by `datasette_side`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import anyio
import trio

from datasette_llm._compat import BaseExceptionGroup

from .trio_loop import fit, trio_asyncio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from types import TracebackType

T = TypeVar("T")

logger = logging.getLogger("datasette_llm")

# How long the loop outlives trio's main task for those who still hold it: longer than the grace
# period of a supervisor (5 s) and its exit hooks, yet no stuck plugin keeps the process for ever.
LINGER_SECONDS = 20.0

# asyncio cancels once, which code may swallow or hang after; trio's deadlines must end it all the same.
# Long enough for the cleanup of code that means well.
CANCEL_AGAIN_SECONDS = 1.0

_host: trio.lowlevel.RunVar[_Host | None] = trio.lowlevel.RunVar("datasette_llm hosted loop", default=None)


async def run(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Run ``await function(*args)`` as one asyncio task on the hosted loop, and wait for its end."""
    async with held() as loop:
        task = loop.create_task(_in_loop(loop, function, args))
        try:
            raise_cancel = await _wait_for(task, task)
            if task.cancelled():
                _raise_cancelled(raise_cancel)
            return task.result()
        finally:
            del task  # it holds the exception, whose traceback holds this frame


@asynccontextmanager
async def held() -> AsyncIterator[asyncio.AbstractEventLoop]:
    """Yield the loop to use here, started if need be; it stays open while inside."""
    loop = trio_asyncio.current_loop.get()
    if loop is not None and loop.is_running():
        await fit(loop)
        yield loop
        return
    with kept() as host:
        yield await host.started()


@contextmanager
def kept() -> Iterator[_Host]:
    """Have the run's own loop stay open while inside, once somebody has started it."""
    host = _host.get()
    if host is None:
        host = _Host()
        _host.set(host)
    host.holders += 1
    try:
        yield host
    finally:
        host.holders -= 1
        if not host.holders:
            host.idle.set()


class _Host:
    """The run's own loop, and who holds it. States: not needed yet, starting, open, lingering, gone."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: trio.lowlevel.Task | None = None
        self.holders = 0
        self.ready = trio.Event()
        self.idle = trio.Event()

    async def started(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the first caller starts it."""
        if self.task is None:
            self.task = trio.lowlevel.spawn_system_task(self.serve, name="datasette_llm hosted asyncio loop")
        await self.ready.wait()
        if self.loop is None:
            raise RuntimeError("trio-asyncio could not start its loop; the log says why")
        return self.loop

    async def serve(self) -> None:
        """Own the loop, from the first holder until the end of the run. Never raises an error."""
        try:
            async with trio_asyncio.open_loop() as loop:
                # trio-asyncio would end the loop over an asyncio task whose error nobody retrieved.
                loop.set_exception_handler(asyncio.BaseEventLoop.default_exception_handler)
                await fit(loop)
                self.loop = loop
                self.ready.set()
                try:
                    await loop.wait_stopped()
                finally:
                    await self._linger(loop)
        except trio.Cancelled:
            raise
        except BaseException as error:  # in a system task it would take the whole program down
            rest = error.split(trio.Cancelled)[1] if isinstance(error, BaseExceptionGroup) else error
            if rest is not None:
                # SystemExit, say, which asyncio lets through its loop. Its task has it as well.
                logger.error("The hosted asyncio loop has ended early", exc_info=rest)
        finally:
            self._retire()
            self.ready.set()

    async def _linger(self, loop: asyncio.AbstractEventLoop) -> None:
        with trio.move_on_after(LINGER_SECONDS, shield=True):
            while self.holders and loop.is_running():
                self.idle = trio.Event()
                await self.idle.wait()
        if self.holders and loop.is_running():
            logger.warning(
                "Datasette code still ran %g s after the end of the program and is cancelled", LINGER_SECONDS
            )
        self._retire()

    def _retire(self) -> None:
        if _host.get() is self:
            _host.set(None)


class ManagerTask(AbstractAsyncContextManager[T]):
    """An asyncio context manager around a trio block, entered and left in one asyncio task.

    States: entering, waiting for the block, leaving, done. If something cancels the asyncio task
    while it waits (a timeout that the manager opened around its ``yield``), the block is cancelled
    and the manager is left with that very ``CancelledError``, which its timeout recognises.
    """

    def __init__(self, factory: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._factory = factory
        self._held = held()
        self._block = trio.CancelScope()
        self._error: BaseException | None = None
        self._interrupted: asyncio.CancelledError | None = None

    async def __aenter__(self) -> T:
        loop = await self._held.__aenter__()
        try:
            self._entered: asyncio.Future[T] = loop.create_future()
            self._block_left = asyncio.Event()
            self._task = loop.create_task(_in_loop(loop, self._live, ()))
            # An entry that failed also ends the wait for it.
            self._task.add_done_callback(lambda _: self._entered.cancel())
            raise_cancel = await _wait_for(self._entered, self._task)
            if self._entered.cancelled():
                if self._task.cancelled():
                    _raise_cancelled(raise_cancel)
                self._task.result()
        except BaseException as error:
            await self._held.__aexit__(type(error), error, error.__traceback__)
            raise
        self._block.__enter__()
        return self._entered.result()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        error, absorbed = exc, False
        try:
            absorbed = self._block.__exit__(exc_type, exc, traceback)
        except BaseException as rest:  # what is left of a group without the block's own cancellation
            error = rest
        # Did the manager's side end the block, rather than the block itself or someone outside?
        interrupted = self._interrupted if absorbed or error is None else None
        if interrupted is not None:
            self._error = interrupted
        elif isinstance(error, trio.Cancelled):
            self._error = self._interrupted or asyncio.CancelledError()
        else:
            self._error = error
        self._block_left.set()
        try:
            raise_cancel = await _wait_for(self._task, self._task)
        finally:
            await self._held.__aexit__(None, None, None)
        if self._task.cancelled():
            if interrupted is None and isinstance(error, trio.Cancelled):
                return False
            _raise_cancelled(raise_cancel)
        if self._task.result():
            return True
        if interrupted is not None:
            _raise_cancelled(raise_cancel)
        if error is not None and error is not exc:
            raise error
        return False

    async def _live(self) -> bool:
        """Enter the manager, wait for the block, leave the manager; return what its exit returned."""
        manager = self._factory()
        self._entered.set_result(await manager.__aenter__())
        try:
            await self._block_left.wait()
        except asyncio.CancelledError as interrupted:
            self._interrupted = interrupted
            self._block.cancel()
            with anyio.CancelScope(shield=True):
                await self._block_left.wait()
        error = self._error
        if error is None:
            return bool(await manager.__aexit__(None, None, None))
        return bool(await manager.__aexit__(type(error), error, error.__traceback__))


async def _in_loop(
    loop: asyncio.AbstractEventLoop, function: Callable[..., Awaitable[T]], args: tuple[Any, ...]
) -> T:
    trio_asyncio.current_loop.set(loop)  # in this task's context: for `trio_asyncio.trio_as_aio`
    return await function(*args)


async def _wait_for(future: asyncio.Future[Any], task: asyncio.Task[Any]) -> Callable[[], NoReturn] | None:
    """Wait until ``future`` is done; if the caller is cancelled, cancel ``task`` and wait on.

    Returns:
        How to raise the caller's cancellation, if there was one.
    """
    caller = trio.lowlevel.current_task()
    raise_cancel: Callable[[], NoReturn] | None = None

    def abort(raise_it: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
        nonlocal raise_cancel
        raise_cancel = raise_it
        # Behind what is queued already: the task starts (so no coroutine is dropped unawaited), or
        # takes the block's exception, before it is cancelled.
        task.get_loop().call_soon(_cancel_until_done, task)
        return trio.lowlevel.Abort.FAILED

    if future.done():
        return None
    future.add_done_callback(lambda _: trio.lowlevel.reschedule(caller))
    await trio.lowlevel.wait_task_rescheduled(abort)
    return raise_cancel


def _cancel_until_done(task: asyncio.Task[Any]) -> None:
    if not task.done():
        task.cancel()
        task.get_loop().call_later(CANCEL_AGAIN_SECONDS, _cancel_until_done, task)


def _raise_cancelled(raise_cancel: Callable[[], NoReturn] | None) -> NoReturn:
    if raise_cancel is not None:
        raise_cancel()
    # asyncio's CancelledError would be no cancellation to trio, but a stray BaseException.
    raise RuntimeError("The asyncio code was cancelled, and not by its caller")

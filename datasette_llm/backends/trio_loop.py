"""trio-asyncio, fitted to what Datasette, its plugins and anyio expect of an event loop."""

from __future__ import annotations

import asyncio
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator
    from concurrent.futures import Executor

T = TypeVar("T")

# Enough to save most trips through trio's scheduler; a trio task waits for so many at most.
CALLBACKS_PER_CHECKPOINT = 20


def _import_trio_asyncio() -> Any:
    """Import trio-asyncio, but leave asyncio's own loops to asyncio.

    Once imported it answers every ``asyncio.new_event_loop()`` of the process, and so every later
    ``asyncio.run()``, with a loop of its own that runs on trio: half as fast, and with less in it.
    A program that imported it before us has chosen so.
    """
    chosen = "trio_asyncio" in sys.modules
    new_event_loop = asyncio.new_event_loop
    with warnings.catch_warnings():
        # It derives from asyncio's child watchers, deprecated since Python 3.12.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import trio_asyncio
        except AttributeError as error:
            raise RuntimeError(
                f"The installed trio-asyncio does not work on Python {sys.version_info[0]}."
                f"{sys.version_info[1]} ({error}); use the asyncio backend here"
            ) from error
    if not chosen:
        asyncio.new_event_loop = asyncio.events.new_event_loop = new_event_loop
    return trio_asyncio


trio_asyncio = _import_trio_asyncio()


async def fit(loop: Any) -> None:
    """Teach a hosted loop what Datasette and anyio expect of a loop and trio-asyncio lacks (once).

    - Older Datasettes (1.0a23) hand the loop a thread pool of their own, as plugins do.
    - asyncio's C code must see the loop running while its steps run. trio-asyncio replaces
      ``asyncio.get_running_loop`` when it is imported; who took that name earlier, as anyio's
      asyncio backend does in a process that uses both backends, would see no loop at all.
    - Callbacks that are ready run in one go (measured: 30 callers at once, a query each: 110 us
      instead of 180); trio-asyncio makes a timeout scope and a trip through trio's scheduler of each.
    """
    if "run_in_executor" in vars(loop):
        return
    hosted_run_in_executor = loop.run_in_executor

    def run_in_executor(executor: Executor | None, function: Callable[..., T], *args: Any) -> Awaitable[T]:
        if executor is None or isinstance(executor, trio_asyncio.TrioExecutor):
            answer: Awaitable[T] = hosted_run_in_executor(executor, function, *args)
            return answer
        return asyncio.wrap_future(executor.submit(function, *args), loop=loop)

    loop.run_in_executor = run_in_executor

    step: Callable[[bool], Coroutine[Any, Any, None]] = loop._main_loop_one

    @types.coroutine
    def announced_step(no_wait: bool = False) -> Generator[Any, Any, None]:
        if not no_wait:
            try:
                for _ in range(CALLBACKS_PER_CHECKPOINT):
                    yield from _announced(loop, step(True))
            except trio.WouldBlock:
                pass
        yield from _announced(loop, step(no_wait))

    loop._main_loop_one = announced_step
    await loop.synchronize()  # the step under way is still an unannounced one


def _announced(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, None]
) -> Generator[Any, Any, None]:
    """Await ``coroutine``; while it runs, and not while it waits, ``loop`` is the running one."""
    resume: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        asyncio._set_running_loop(loop)
        try:
            trap = resume(value)
        except StopIteration:
            return
        finally:
            asyncio._set_running_loop(None)
        try:
            value = yield trap
            resume = coroutine.send
        except BaseException as error:
            value = error
            resume = coroutine.throw

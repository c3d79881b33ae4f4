"""Datasette's side: where asyncio code of Datasette and of its plugins runs, whichever the backend.

On asyncio that is the running loop, and everything here passes straight through. On trio it is an
asyncio loop that trio-asyncio hosts inside the trio run (see `hosted_loop`). Code that already runs
on a hosted loop, such as a plugin's hook that calls this package, counts as asyncio.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from types import ModuleType

T = TypeVar("T")


def backend() -> Literal["asyncio", "trio"]:
    """Return the flavour of the code that is running now."""
    # Each trio step, and each callback of a hosted loop, sets this thread-local that trio depends on.
    # Where trio never ran there may be no sniffio at all.
    sniffio = sys.modules.get("sniffio")
    return "trio" if sniffio is not None and sniffio.thread_local.name == "trio" else "asyncio"


async def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` on Datasette's side, and await what it returns if that can be awaited.

    Its exceptions arrive bare. Cancelling the caller cancels it, and waits until it has ended.

    Raises:
        RuntimeError: on trio without trio-asyncio, or if the function was cancelled by asyncio code.
    """
    if backend() == "asyncio":
        value = function(*args, **kwargs)
        return (await value) if inspect.isawaitable(value) else value
    return await _hosted_loop().run(_call, function, args, kwargs)


async def resolve(value: Any) -> Any:
    """Return ``value``, awaited on Datasette's side if it can be awaited."""
    if not inspect.isawaitable(value):
        return value
    if backend() == "asyncio":
        return await value
    try:
        return await _hosted_loop().run(_resolve, value)
    finally:
        if inspect.iscoroutine(value):
            value.close()  # only if there was no loop to run it on; else it has ended by now


@asynccontextmanager
async def open_side() -> AsyncIterator[None]:
    """Keep Datasette's side open while inside, also beyond the end of trio's main task.

    Blocks may overlap in any order and in any tasks, and cost next to nothing: what is kept open is
    started by the first call that needs it. Does nothing on asyncio, and without trio-asyncio.
    """
    if backend() == "asyncio":
        yield
        return
    try:
        kept = _hosted_loop().kept()
    except RuntimeError:  # The first call will say so, if there ever is one.
        yield
        return
    with kept:
        yield


def context_manager(factory: Callable[[], AbstractAsyncContextManager[T]]) -> AbstractAsyncContextManager[T]:
    """Return a context manager that enters and leaves ``factory()`` on Datasette's side.

    On trio one asyncio task enters and leaves it, so it may reset context variables and open cancel
    scopes around its ``yield``; such a scope cancels the block when it expires. It sees the block's
    exception as raised (a trio cancellation as ``asyncio.CancelledError``); what it raises or
    swallows holds for the block.
    """
    return factory() if backend() == "asyncio" else _hosted_loop().ManagerTask(factory)


async def _call(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    return (await value) if inspect.isawaitable(value) else value


async def _resolve(value: Any) -> Any:
    return await value


def _hosted_loop() -> ModuleType:
    # Imported when trio first needs it: trio-asyncio replaces functions of asyncio as it is imported.
    try:
        from . import hosted_loop
    except ImportError as error:
        raise RuntimeError(
            "Datasette's own code needs asyncio; to run it under trio: pip install 'datasette-llm[trio]'"
        ) from error
    return hosted_loop

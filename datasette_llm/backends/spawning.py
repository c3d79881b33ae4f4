"""Starting a task in a task group, so that somebody hears of it if it never has its first turn."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from .datasette_side import backend

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from anyio.abc import TaskGroup


def start_soon(
    tasks: TaskGroup,
    function: Callable[[], Coroutine[Any, Any, object]],
    if_dropped: Callable[[], object] | None = None,
) -> None:
    """Run ``function()`` as a task of this group.

    When an asyncio loop ends it cancels all tasks. Of one that has not had its first turn no line is run
    then, and no ``finally``: whoever waits for what it was to do would wait for ever.

    Args:
        tasks: the group, of the side that runs now.
        function: an async function.
        if_dropped: called, soon, if the task was dropped like that.

    Raises:
        RuntimeError: the group has ended.
    """
    if backend() == "trio":
        tasks.start_soon(function)
        return
    begun = False

    async def first_turn() -> None:
        nonlocal begun
        begun = True
        await function()

    made: list[Coroutine[Any, Any, None]] = []

    def make() -> Coroutine[Any, Any, None]:
        made.append(first_turn())
        return made[0]

    def look() -> None:
        if begun:
            return
        if inspect.getcoroutinestate(made[0]) == inspect.CORO_CREATED:
            made[0].close()  # else Python warns that nobody awaited it
        if if_dropped is not None:
            if_dropped()

    tasks.start_soon(make, name=getattr(function, "__qualname__", None))
    # The queue of a loop is in order: this comes right behind the first turn.
    asyncio.get_running_loop().call_soon(look)

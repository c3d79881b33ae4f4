"""asyncio's own cancellation (``Task.cancel()``), which knows no scopes and no shields.

It reaches a prompt's task in three ways: the event loop ends and cancels every task; a wrapper's
``asyncio.timeout()`` around its ``yield`` expires; or code that a model or a plugin calls raises
``CancelledError`` although nobody cancelled this task (it awaited another one that was cancelled).
On trio there is none of this.
"""

from __future__ import annotations

import asyncio

from .datasette_side import backend


def is_native(error: BaseException) -> bool:
    """Say whether an exception is asyncio's own cancellation, not that of a cancel scope.

    anyio's scopes say so in the message they cancel a task with.
    """
    if not isinstance(error, asyncio.CancelledError) or backend() != "asyncio":
        return False
    found: BaseException | None = error
    while isinstance(found, asyncio.CancelledError):
        if str(found).startswith(("Cancelled by cancel scope", "Cancelled via cancel scope")):
            return False
        # A library may have caught it and raised another one.
        found = found.__context__
    return True


def is_stray(error: BaseException) -> bool:
    """Say whether nobody cancelled the running task, although ``error`` looks like it.

    Python counts the requests since 3.11; before that nothing is known to be stray.
    """
    if not is_native(error):
        return False
    task = asyncio.current_task()
    return task is not None and hasattr(task, "cancelling") and not task.cancelling()


def take_back() -> bool:
    """Forget one ``Task.cancel()`` of the running task, where Python counts them; say if there was one."""
    if backend() != "asyncio":
        return False
    task = asyncio.current_task()
    if task is None or not hasattr(task, "uncancel") or not task.cancelling():
        return False
    task.uncancel()
    return True

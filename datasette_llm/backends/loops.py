"""What this package asks of the event loop itself, past anyio: its clock, and a way in from a finalizer."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token

from .datasette_side import backend

if TYPE_CHECKING:
    from collections.abc import Callable


def loop_clock() -> Callable[[], float]:
    """Return the clock of the running event loop.

    The same time as ``anyio.current_time()``, which looks for the backend at each call: that is more than
    all the rest of taking a free slot.
    """
    if backend() == "trio":
        from trio.lowlevel import current_clock

        return current_clock().current_time
    return asyncio.get_running_loop().time


def loop_end() -> Callable[[], bool]:
    """Return a function, for any thread, that tells whether the running event loop has ended since.

    Trio does not tell of its own; its clock can be read for ever.
    """
    if backend() == "trio":
        return lambda: False
    return asyncio.get_running_loop().is_closed


class LoopDoor:
    """Lets any thread, at any moment, have the event loop that made it call a function soon.

    Python calls ``__del__`` at any point of any thread. What it has to say to tasks must wait until the
    event loop comes to it: in the middle of somebody's bookkeeping nothing may change.
    """

    def __init__(self) -> None:
        native: Any = current_token().native_token
        if hasattr(native, "call_soon_threadsafe"):
            # In the context of this loop: the caller's may say that it is trio which runs here.
            self._call_soon: Callable[[Callable[[], object]], object] = partial(
                native.call_soon_threadsafe, context=copy_context()
            )
        else:
            self._call_soon = native.run_sync_soon

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the loop call ``function``. If the loop has ended there is nothing left to tell."""
        try:
            self._call_soon(function)
        except RuntimeError:
            pass

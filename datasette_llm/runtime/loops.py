"""Reaching the event loop from a finalizer.

Python calls ``__del__`` at any point of any thread. What it has to say to tasks must wait until the
event loop comes to it: in the middle of somebody's bookkeeping nothing may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token

if TYPE_CHECKING:
    from collections.abc import Callable


class LoopDoor:
    """Lets any thread, at any moment, have the event loop that made it call a function soon."""

    def __init__(self) -> None:
        token: Any = current_token()
        # Before anyio 4.11 the token is the native one itself.
        native = getattr(token, "native_token", token)
        self._call_soon: Callable[[Callable[[], None]], object] = getattr(
            native, "call_soon_threadsafe", None
        ) or getattr(native, "run_sync_soon")  # noqa: B009 - it is one of two kinds of object

    def call_soon(self, function: Callable[[], None]) -> None:
        """Have the loop call ``function``. If the loop has ended there is nothing left to tell."""
        try:
            self._call_soon(function)
        except RuntimeError:
            pass

"""An event that one side sets and any side waits for."""

from __future__ import annotations

import anyio


class Signal:
    """An event for tasks of either side of a trio run, whoever made it and whoever sets it.

    ``anyio.Event`` belongs to the side that makes it: a task on the hosted asyncio loop can't wait for one of
    trio's, nor the other way round. Here each who waits brings an event of its own side.
    """

    __slots__ = ("_set", "_waiters")

    def __init__(self) -> None:
        self._set = False
        self._waiters: set[anyio.Event] = set()

    def set(self) -> None:
        """Let all who wait go on, and all who come later. Returns at once; idempotent."""
        self._set = True
        for event in self._waiters:
            event.set()

    def is_set(self) -> bool:
        """Say whether it has been set."""
        return self._set

    async def wait(self) -> None:
        """Wait until it is set; at once if it is."""
        if self._set:
            return
        event = anyio.Event()
        self._waiters.add(event)
        try:
            await event.wait()
        finally:
            self._waiters.discard(event)

"""The first prompt of a group enters its wrappers alone."""

from __future__ import annotations

from contextvars import ContextVar

import anyio

_entering: ContextVar[EntryGate | None] = ContextVar("datasette_llm_entering", default=None)


class EntryGate:
    """Lets the first prompt of a group enter its wrappers alone, and the others once it is in.

    Plugins make per-group state (a budget reservation) when they see a group's first prompt, with an
    ``await`` between their look and their note. If the first prompt is refused, the next one is first.
    """

    def __init__(self) -> None:
        self.open = False
        self._lock = anyio.Lock()

    async def first(self) -> bool:
        """Wait until it is this task's turn to enter.

        Returns:
            whether it must enter alone, and say ``admitted()`` or ``refused()`` afterwards.
        """
        if self.open or _entering.get() is self:
            return False
        await self._lock.acquire()
        if self.open:
            self._lock.release()
            return False
        # A prompt that a wrapper sends while it is being entered would wait for itself.
        _entering.set(self)
        return True

    def admitted(self) -> None:
        """The first prompt is in: open for everybody."""
        self.open = True
        self.refused()

    def refused(self) -> None:
        """The first prompt was not let in: the next one is first."""
        _entering.set(None)
        self._lock.release()

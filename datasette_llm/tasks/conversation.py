"""Turns of a conversation: one at a time, in the order in which they were asked for."""

from __future__ import annotations

from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ..backends.signal import Signal

if TYPE_CHECKING:
    import llm

#: The turn that this code is a part of: its tools, wrappers and callbacks.
_current: ContextVar[Turn | None] = ContextVar("datasette_llm_turn", default=None)


class Turns:
    """The queue of a conversation. Its head is the turn that may go on."""

    def __init__(self, conversation: llm.AsyncConversation) -> None:
        self._conversation = conversation
        self._queue: deque[Turn] = deque()

    def ask(self) -> Turn:
        """Take the next place in the queue. Whoever takes one must ``give_up()`` it, whatever happens.

        Raises:
            RuntimeError: a part of the turn that goes on (a tool, say) asks; it would wait for itself.
        """
        current = _current.get()
        if current is not None and current in self._queue:
            raise RuntimeError(
                "this is part of a turn of the conversation, and the next turn begins when it has ended:"
                " prompt another conversation, or the model itself"
            )
        turn = Turn(self._conversation, self._queue)
        self._queue.append(turn)
        return turn


class Turn:
    """A place in the queue of a conversation."""

    def __init__(self, conversation: llm.AsyncConversation, queue: deque[Turn]) -> None:
        self._conversation = conversation
        self._queue = queue
        self._come = Signal()
        self._length: int | None = None
        self._loaded: list[object] | None = None

    async def wait(self) -> None:
        """Wait until every earlier turn has been given up. This task then is part of the turn."""
        if self._queue[0] is not self:
            await self._come.wait()
        _current.set(self)
        self._length = len(self._conversation.responses)
        self._loaded = getattr(self._conversation, "loaded_messages", None)

    def undo(self) -> None:
        """Make the history what it was before this turn."""
        if self._length is not None:
            del self._conversation.responses[self._length :]
            if self._loaded is not None:
                self._conversation.loaded_messages = self._loaded

    def give_up(self) -> None:
        """Let the next one go on; or, before its time has come, stand back from the queue. Idempotent."""
        if self not in self._queue:
            return
        self._queue.remove(self)
        if self._queue:
            self._queue[0]._come.set()

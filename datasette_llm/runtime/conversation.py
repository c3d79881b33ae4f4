"""Turns of a conversation: one at a time, in the order in which they were asked for."""

from __future__ import annotations

from collections import deque

import anyio


class Turns:
    """The queue of a conversation. Its head is the turn that may go on."""

    def __init__(self) -> None:
        self._queue: deque[Turn] = deque()

    def ask(self) -> Turn:
        """Take the next place in the queue. Whoever takes one must ``give_up()`` it, whatever happens."""
        turn = Turn(self._queue)
        self._queue.append(turn)
        return turn


class Turn:
    """A place in the queue of a conversation."""

    def __init__(self, queue: deque[Turn]) -> None:
        self._queue = queue
        self._come = anyio.Event()

    async def wait(self) -> None:
        """Wait until every earlier turn has been given up."""
        if self._queue[0] is not self:
            await self._come.wait()

    def give_up(self) -> None:
        """Let the next one go on; or, before its time has come, stand back from the queue. Idempotent."""
        if self not in self._queue:
            return
        self._queue.remove(self)
        if self._queue:
            self._queue[0]._come.set()

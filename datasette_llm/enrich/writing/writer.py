"""Results on their way into the table: many small transactions, none of them lost.

A result is buffered when it arrives and written with the others that came within half a second, at
most fifty to a transaction. So a process that is killed loses what half a second brought, and a
writer elsewhere never waits long for the database.

States of a `Writer`: open (results are added, `run` writes them), closed (what is buffered is still
written), finished (`run` has returned). `run` belongs to one task; when that is cancelled, what has
been buffered is written under a shield before the cancellation goes on.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import anyio

from ..database import LOCKED_SECONDS, write
from .landing import Landing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..plan import Plan
    from .landing import Outcome, Result

TRANSACTION_ROWS = 50
# Half of what is promised: a killed process has paid in vain for what this brings, and four commits a
# second are nothing to a disk.
TRANSACTION_SECONDS = 0.25
# More than this waiting to be written, and no more prompts are started: the database is locked.
BUFFER_ROWS = 500
# How long a locked database is waited for when the job is being stopped and somebody waits for it.
LOCKED_SECONDS_AT_END = 20.0


class Writer:
    """Writes the results of one job.

    Attributes:
        seconds: how long writes have been under way.
    """

    def __init__(self, plan: Plan, model_id: str, on_settled: Callable[[Outcome], None]) -> None:
        self._database = plan.database
        self._landing = Landing(plan, model_id)
        self._on_settled = on_settled
        self._buffer: list[Result] = []
        self._closed = False
        self._some = anyio.Event()
        self._enough = anyio.Event()
        self._room = anyio.Event()
        self.seconds = 0.0

    async def add(self, result: Result) -> None:
        """Buffer a result; waits while the database cannot keep up.

        The result is in the buffer before anything here can be cancelled.
        """
        self._buffer.append(result)
        self._some.set()
        if len(self._buffer) >= TRANSACTION_ROWS:
            self._enough.set()
        while len(self._buffer) >= BUFFER_ROWS:
            if self._room.is_set():
                self._room = anyio.Event()
            await self._room.wait()

    def close(self) -> None:
        """Say that no more results will come; `run` returns when all are written."""
        self._closed = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        """Write what is added until closed.

        Raises:
            EnrichError: the database stayed locked, or cannot be written.
        """
        try:
            while not (self._closed and not self._buffer):
                await self._some.wait()
                with anyio.move_on_after(TRANSACTION_SECONDS):
                    await self._enough.wait()
                # What comes while this is written waits its turn: otherwise each answer or two would have
                # a transaction of its own, one after the other, and Datasette's readers no chance between.
                await self._write_batch(LOCKED_SECONDS)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._write_buffered(LOCKED_SECONDS_AT_END)
            raise

    async def _write_buffered(self, patience_seconds: float) -> None:
        while self._buffer:
            await self._write_batch(patience_seconds)

    async def _write_batch(self, patience_seconds: float) -> None:
        batch = self._buffer[:TRANSACTION_ROWS]
        began = anyio.current_time()
        try:
            outcome = await write(
                self._database, partial(self._landing.land, batch), patience_seconds=patience_seconds
            )
        finally:
            self.seconds += anyio.current_time() - began
        # Nothing awaits between the write and here, so a batch is either still buffered or settled.
        del self._buffer[: len(batch)]
        if len(self._buffer) < BUFFER_ROWS:
            self._room.set()
        self._on_settled(outcome)
        self._renew_events()

    def _renew_events(self) -> None:
        if self._closed:
            return
        if not self._buffer:
            self._some = anyio.Event()
        if len(self._buffer) < TRANSACTION_ROWS:
            self._enough = anyio.Event()

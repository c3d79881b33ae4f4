"""Results on their way into the table: many small transactions, none of them lost.

A result is buffered when it arrives and written with the others that came within half a second, at
most fifty to a transaction. So a process that is killed loses what half a second brought, and a
writer elsewhere never waits long for the database.

States of a `Writer`: open (results are added, `run` writes them), closed (what is buffered is still
written), finished (`run` has returned). `run` belongs to one task; when that is cancelled, what has
been buffered is written under a shield before the cancellation goes on.

While the database cannot be written the writer tries again and again, and `ready` holds the job back.
What waits for longer than a second is copied to the side file, so that a process that is killed then
loses no more than at other times. When the patience is used up the writer has *given up*: what it holds
and what still comes stays in the side file, for the next run.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import anyio

from ..database import LOCKED_PAUSE_SECONDS, write_once
from ..errors import DatabaseError
from ..trouble import Watch
from .landing import Landing
from .results import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..plan import Plan
    from .recorder import Recorder
    from .results import Result
    from .side_file import SideFile

logger = logging.getLogger("datasette_llm")

TRANSACTION_ROWS = 50
# Half of what is promised: a killed process has paid in vain for what this brings, and four commits a
# second are nothing to a disk.
TRANSACTION_SECONDS = 0.25
# More than this waiting to be written, and no more prompts are started.
BUFFER_ROWS = 500
# How long the database is waited for when the job is cancelled and somebody waits for it.
PATIENCE_AT_END = 5.0
# How long answers wait in memory alone, and how often those that came since are copied.
COPY_SECONDS = 1.0
# At the end, when connections have been closed: the side file may have lacked a descriptor before.
LAST_TRIES = 10


class Writer:
    """Writes the results of one job.

    The columns that the table lacks are added with the first results: a job that gets none leaves the file
    as it was.

    Attributes:
        plan: the plan, for the table as it is by now.
        seconds: how long writes have been under way.
        watch: what keeps the database from being written, if something does.
    """

    def __init__(
        self,
        plan: Plan,
        model_id: str,
        side_file: SideFile,
        on_settled: Callable[[Outcome], None],
        on_given_up: Callable[[str], None],
        *,
        patience_seconds: float,
        recorder: Recorder | None = None,
    ) -> None:
        """Prepare to write.

        Args:
            side_file: for what cannot be written.
            on_settled: called with what became of each batch.
            on_given_up: called once, with the reason, when no more is written.
            patience_seconds: how long a database that cannot be written is waited for.
            recorder: keeps the record of the run.
        """
        self._database = plan.database
        self.plan = plan
        self._model_id = model_id
        self._landing: Landing | None = None
        self._recorder = recorder
        self._overwrite = plan.spec.replaces
        self._side_file = side_file
        self._on_settled = on_settled
        self._on_given_up = on_given_up
        self._buffer: list[Result] = []
        # So many of the first in the buffer are in the side file too.
        self._copied = 0
        self._copied_at = 0.0
        self._has_lines = False
        self._given_up = False
        self._closed = False
        self._some = anyio.Event()
        self._enough = anyio.Event()
        self._room = anyio.Event()
        self._empty: anyio.Event | None = None
        self.seconds = 0.0
        self.watch = Watch(patience_seconds)

    def add(self, result: Result) -> None:
        """Buffer a result."""
        self._buffer.append(result)
        self._some.set()
        if len(self._buffer) >= TRANSACTION_ROWS:
            self._enough.set()

    async def ready(self) -> None:
        """Wait until another prompt is worth paying for: its answer could be written."""
        await self.watch.passed()
        while len(self._buffer) >= BUFFER_ROWS and not self._given_up:
            if self._room.is_set():
                self._room = anyio.Event()
            await self._room.wait()

    async def drained(self) -> None:
        """Wait until everything that was added is written, or in the side file."""
        while self._buffer:
            if self._empty is None:
                self._empty = anyio.Event()
            await self._empty.wait()

    def close(self) -> None:
        """Say that no more results will come; `run` returns when all are written."""
        self._closed = True
        self._some.set()
        self._enough.set()

    async def run(self) -> None:
        """Write what is added until closed."""
        try:
            while not (self._closed and not self._buffer):
                await self._some.wait()
                with anyio.move_on_after(TRANSACTION_SECONDS):
                    await self._enough.wait()
                # What comes while this is written waits its turn: otherwise each answer or two would have
                # a transaction of its own, one after the other, and Datasette's readers no chance between.
                await self._write_batch()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                self.watch.hurry(PATIENCE_AT_END)
                self.close()
                while self._buffer:
                    await self._write_batch()
            raise

    async def _write_batch(self) -> None:
        if self._given_up:
            await self._set_aside()
            return
        batch = self._buffer[:TRANSACTION_ROWS]
        if not batch:
            return  # Closed without a result: nothing is touched.
        outcome = await self._try(batch)
        # Nothing awaits between the write and here, so a batch is either still buffered or settled.
        if isinstance(outcome, DatabaseError):
            await self._wait_or_give_up(outcome)
            return
        self._settle(len(batch), outcome)
        self.watch.end()
        if self._has_lines and not self._buffer:
            await self._remove_copies()

    async def _try(self, batch: list[Result]) -> Outcome | DatabaseError:
        began = anyio.current_time()
        outcome: Outcome | DatabaseError
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_copying)
                try:
                    landing = await self._prepare()
                    outcome = await write_once(self._database, partial(landing.land, batch))
                except DatabaseError as error:
                    outcome = error
                tasks.cancel_scope.cancel()
        self.seconds += anyio.current_time() - began
        return outcome

    async def _prepare(self) -> Landing:
        if self._landing is None:
            self.plan = await self.plan.with_columns(write_once)
            self._landing = Landing(self.plan, self._model_id, recorder=self._recorder)
        return self._landing

    async def _keep_copying(self) -> None:
        """Copy what waits, while a write goes on and on: behind another one's, or because of a lock."""
        while True:
            await anyio.sleep(COPY_SECONDS)
            if self.watch.trouble is None:
                self.watch.begin("the database does not take a write")
            await self._copy()

    def _settle(self, count: int, outcome: Outcome) -> None:
        del self._buffer[:count]
        self._copied = max(0, self._copied - count)
        if len(self._buffer) < BUFFER_ROWS:
            self._room.set()
        self._on_settled(outcome)
        if self._empty is not None and not self._buffer:
            self._empty.set()
            self._empty = None
        if self._closed:
            return
        if not self._buffer:
            self._some = anyio.Event()
        if len(self._buffer) < TRANSACTION_ROWS:
            self._enough = anyio.Event()

    async def _wait_or_give_up(self, error: DatabaseError) -> None:
        watch = self.watch
        if error.trouble is not None:
            watch.begin(error.trouble)
            if not watch.is_over:
                now = anyio.current_time()
                if watch.waited >= COPY_SECONDS and now - self._copied_at >= COPY_SECONDS:
                    self._copied_at = now
                    await self._copy()
                await anyio.sleep(LOCKED_PAUSE_SECONDS)
                return
        self._given_up = True
        self._on_given_up(f"{watch.trouble} for {watch.waited:.0f} s" if watch.trouble else str(error))
        watch.end()
        self._room.set()

    async def _set_aside(self) -> None:
        """Leave what is buffered in the side file; what that does not take is lost, but at the end only."""
        copied = await self._copy()
        tries = 1
        while self._closed and not copied and tries < LAST_TRIES:
            await anyio.sleep(LOCKED_PAUSE_SECONDS)
            copied = await self._copy()
            tries += 1
        if not copied and not self._closed:
            await anyio.sleep(LOCKED_PAUSE_SECONDS)
            return  # The loop of `run` brings us here again.
        # More may have come meanwhile: that is for the next time.
        batch = self._buffer[: self._copied if copied else len(self._buffer)]
        outcome = Outcome()
        for position, result in enumerate(batch):
            if result.error is not None:
                outcome.failed.append(result)
            elif position < self._copied:
                outcome.set_aside.append(result)
            else:
                outcome.lost.append(result)
        self._settle(len(batch), outcome)

    async def _copy(self) -> bool:
        """Have the side file hold everything that is buffered; say whether it does."""
        results = self._buffer[self._copied :]
        if results:
            append = partial(self._side_file.append, results, model=self._model_id, overwrite=self._overwrite)
            try:
                await anyio.to_thread.run_sync(append)
            except OSError as error:
                logger.debug("The side file cannot be written: %s", error)
                return False
            self._has_lines = True
            self._copied += len(results)
        return True

    async def _remove_copies(self) -> None:
        self._has_lines = False
        try:
            await anyio.to_thread.run_sync(self._side_file.forget)
        except OSError as error:
            logger.warning("Answers that are in the table could not be removed from the side file: %s", error)

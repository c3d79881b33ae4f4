"""Results on their way into the table: many small transactions, none of them lost.

A result is buffered when it arrives and written with the others that came within half a second, at
most fifty to a transaction. So a process that is killed loses what half a second brought, and a
writer elsewhere never waits long for the database.

States of a `Writer`: open (results are added, `run` writes them), closed (what is buffered is still
written), finished (`run` has returned). `run` belongs to one task; when that is cancelled, what has
been buffered is written under a shield before the cancellation goes on.

What decides whether a value lands, in the statement that writes it: the row still exists under its
key; its output columns are still empty (unless they are to be overwritten); and the columns that the
prompt was made from still have the values that it was made from. An answer to a question that is no
longer asked is dropped, and counted as ``changed``.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import anyio

from ..database import LOCKED_SECONDS, write
from ..reading.table import quote
from . import failures

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..plan import Plan
    from ..reading.selection import Row
    from ..reading.table import SQLValue

TRANSACTION_ROWS = 50
# Half of what is promised: a killed process has paid in vain for what this brings, and four commits a
# second are nothing to a disk.
TRANSACTION_SECONDS = 0.25
# More than this waiting to be written, and no more prompts are started: the database is locked.
BUFFER_ROWS = 500
# How long a locked database is waited for when the job is being stopped and somebody waits for it.
LOCKED_SECONDS_AT_END = 20.0


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one row: values for its output columns, or an error."""

    row: Row
    values: tuple[SQLValue, ...] | None
    error: Exception | None = None
    kind: str = ""
    message: str = ""
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one transaction did.

    Attributes:
        written: rows that have their values now.
        failed: rows that have a record of their failure now.
        changed: rows that are gone, were edited, or got a value from somebody else.
    """

    written: list[Result]
    failed: list[Result]
    changed: list[Result]


class Writer:
    """Writes the results of one job.

    Attributes:
        seconds: how long writes have been under way.
    """

    def __init__(self, plan: Plan, model_id: str, on_settled: Callable[[Outcome], None]) -> None:
        table, outputs = plan.table, plan.outputs
        self._database = plan.database
        self._table = table
        self._label = outputs.label
        self._model_id = model_id
        self._on_settled = on_settled
        self._buffer: list[Result] = []
        self._closed = False
        self._some = anyio.Event()
        self._enough = anyio.Event()
        self._room = anyio.Event()
        self.seconds = 0.0

        assignments = ", ".join(f"{quote(output.name)} = ?" for output in outputs.columns)
        self._keys = [f"{table.sql_name}.{key} is ?" for key in table.key]
        empty = [] if plan.spec.overwrite else [f"{table.sql_column(name)} is null" for name in outputs.marks]
        self._update = f"update {table.sql_name} set {assignments} where {' and '.join(self._keys + empty)}"

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
                self._database, partial(self._transaction, batch), patience_seconds=patience_seconds
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

    def _transaction(self, batch: list[Result], conn: sqlite3.Connection) -> Outcome:
        """Write one batch; runs in Datasette's write thread."""
        outcome = self._attempt(conn, batch)
        if outcome is not None:
            return outcome
        # A trigger of the table rolled everything back (RAISE(ROLLBACK)): find out for which row.
        outcome = Outcome([], [], [])
        for result in batch:
            alone = self._attempt(conn, [result]) or self._attempt(conn, [_rolled_back(result)])
            if alone is not None:
                outcome.written.extend(alone.written)
                outcome.failed.extend(alone.failed)
                outcome.changed.extend(alone.changed)
        return outcome

    def _attempt(self, conn: sqlite3.Connection, batch: list[Result]) -> Outcome | None:
        """Write a batch in one transaction, or return ``None`` if something in it ended that."""
        outcome = Outcome([], [], [])
        conn.execute("begin immediate")
        records = failures.Records(conn, self._table.name, self._label, self._model_id)
        for result in batch:
            if result.error is None:
                try:
                    landed = self._update_row(conn, result)
                except (
                    sqlite3.IntegrityError,
                    sqlite3.DataError,
                    sqlite3.InterfaceError,
                    sqlite3.ProgrammingError,
                    OverflowError,
                    UnicodeError,
                ) as error:
                    if not conn.in_transaction:
                        return None
                    result = _refused(result, error)
                else:
                    (outcome.written if landed else outcome.changed).append(result)
                    if landed:
                        records.clear(result.row.key)
                    continue
            if self._exists(conn, result):
                records.add(result.row.key, f"{result.kind}: {result.message}", result.attempts)
                outcome.failed.append(result)
            else:
                outcome.changed.append(result)
        conn.commit()
        return outcome

    def _update_row(self, conn: sqlite3.Connection, result: Result) -> bool:
        sql, parameters = self._update, [*(result.values or ()), *result.row.key]
        for name, value in result.row.values.items():
            if isinstance(value, str) and "\ufffd" in value:
                continue  # Read from bytes that are not UTF-8: what was read is not what is stored.
            sql += f" and {self._table.sql_column(name)} collate binary is ?"
            parameters.append(value)
        return conn.execute(sql, parameters).rowcount > 0

    def _exists(self, conn: sqlite3.Connection, result: Result) -> bool:
        sql = f"select 1 from {self._table.sql_name} where {' and '.join(self._keys)}"
        return conn.execute(sql, result.row.key).fetchone() is not None


def _refused(result: Result, error: Exception) -> Result:
    message = f"the table refuses the answer: {error}"
    return Result(result.row, None, error, type(error).__name__, message, result.attempts)


def _rolled_back(result: Result) -> Result:
    return _refused(result, sqlite3.IntegrityError("a trigger rolled the transaction back"))

"""The batch that is being written: its file on disk, its rows in the record.

Lines go to a file beside the database, rows to the record a few hundred at a time: memory holds neither. Only
when the file is complete and on the disk the batch counts.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import anyio

from ..database import write
from ..errors import EnrichError
from ..record.batches import add_rows, begin_batch, change_batch, release_rows

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from ..record.runs import RunId
    from ..sql import SQLValue
    from ..writing.recorder import Recorder

#: Rows that are recorded in one transaction.
ROWS_AT_ONCE = 500
#: What a line of a batch has for each token: four characters, in what is mostly English.
BYTES_A_TOKEN = 4


def file_of(database: Any, reference: str) -> Path:
    """Return where the file of a batch is while it is written and sent."""
    path = Path(database.path)
    return path.with_name(f"{path.name}-llm-batch-{reference}.jsonl")


def in_transaction(
    function: Callable[[sqlite3.Connection], Any],
) -> Callable[[sqlite3.Connection], Any]:
    """Return a function that runs another in a transaction of its own."""

    def run(conn: sqlite3.Connection) -> Any:
        conn.execute("begin immediate")
        result = function(conn)
        conn.commit()
        return result

    return run


class Outbox:
    """One batch on its way to be complete.

    Attributes:
        id: its number in the record.
        reference: what it is found by at the provider.
        requests: how many lines it has.
        size: their bytes.
        rows: how many rows are in it: more, where some ask the same.
    """

    def __init__(self, database: Any, run: RunId, number: int, reference: str, file: BinaryIO) -> None:
        self._database = database
        self._run = run
        self._file = file
        self._rows: list[tuple[Sequence[SQLValue], bytes, int]] = []
        self._flushing = anyio.Lock()
        self.id = number
        self.reference = reference
        self.requests = 0
        self.size = 0
        self.rows = 0

    @property
    def tokens(self) -> int:
        """About how many tokens are sent with it."""
        return self.size // BYTES_A_TOKEN

    def add(self, line: bytes) -> None:
        """Put in a request."""
        try:
            self._file.write(line + b"\n")
        except OSError as error:
            raise _cannot_write(error) from error
        self.requests += 1
        self.size += len(line) + 1

    def add_row(self, key: Sequence[SQLValue], question: bytes) -> None:
        """Put in a row whose question is one of the requests."""
        self._rows.append((key, question, self.id))
        self.rows += 1

    @property
    def crowded(self) -> bool:
        """Whether many rows are not recorded yet."""
        return len(self._rows) >= ROWS_AT_ONCE

    async def flush(self) -> None:
        """Record the rows that were put in; returns when all of them are recorded."""
        async with self._flushing:
            rows, self._rows = self._rows, []
            if rows:
                add = partial(add_rows, job=self._run.job, rows=rows)
                await write(self._database, in_transaction(add))

    async def seal(self) -> None:
        """Complete the file and the record: from here on it is a batch."""
        await self.flush()
        try:
            await anyio.to_thread.run_sync(_sync_and_close, self._file)
        except OSError as error:
            raise _cannot_write(error) from error

        def change(conn: sqlite3.Connection) -> None:
            change_batch(conn, self.id, state="prepared", requests=self.requests, tokens=self.tokens)

        await write(self._database, in_transaction(change))

    async def discard(self) -> None:
        """Forget it: its rows wait again."""
        with suppress(OSError):  # What is written on closing: the disk may be full.
            self._file.close()
        await discard(self._database, self.id, self.reference)


async def open_outbox(
    database: Any, recorder: Recorder, *, asked: str, provider: str, model: str
) -> tuple[Outbox, RunId]:
    """Begin a batch; the run begins with it if need be."""
    reference = uuid.uuid4().hex

    def begin(conn: sqlite3.Connection) -> tuple[RunId, int]:
        run = recorder.begin(conn)
        return run, begin_batch(conn, run, reference=reference, asked=asked, provider=provider, model=model)

    run, number = await write(database, in_transaction(begin))
    recorder.committed(run)
    try:
        file = file_of(database, reference).open("wb")
    except OSError as error:
        raise _cannot_write(error) from error
    return Outbox(database, run, number, reference, file), run


async def discard(database: Any, number: int, reference: str, *, state: str = "failed", **why: Any) -> int:
    """Take the rows out of a batch that is not at the provider; return how many wait again."""

    def forget(conn: sqlite3.Connection) -> int:
        released = release_rows(conn, number)
        change_batch(conn, number, state=state, **why)
        return released

    released: int = await write(database, in_transaction(forget))
    remove_file(database, reference)
    return released


def remove_file(database: Any, reference: str) -> None:
    """Remove the file of a batch that need not be sent any more."""
    with suppress(OSError):
        file_of(database, reference).unlink(missing_ok=True)


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _cannot_write(error: OSError) -> EnrichError:
    return EnrichError(f"The file of a batch cannot be written beside the database: {error}")

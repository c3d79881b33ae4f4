"""Results into rows: each line of a batch's results is replayed to the model, and what it says is written.

A line that cannot be read costs its row, never the batch: what has no answer at the end waits again.
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import anyio

from datasette_llm.calls.batches.offline import Exchange
from datasette_llm.calls.batches.protocol import BatchError
from datasette_llm.secrecy import redacted

from ..asking import Asked
from ..database import read, write
from ..errors import RowError
from ..record.batches import change_batch, release_rows, rows_of, settle_rows
from ..record.keys import key_of
from .outbox import in_transaction

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncGenerator

    from datasette_llm.calls.batches.offline import Reply, Request
    from datasette_llm.calls.batches.protocol import Batch, BatchProtocol, Value

    from ..asking import Asking
    from ..ground import Ground
    from ..plan import Plan
    from ..reading.selection import Row
    from ..record.batches import BatchRecord
    from ..record.runs import RunId
    from ..sql import SQLValue

logger = logging.getLogger("datasette_llm")

#: Lines whose rows are looked up in one go.
PAGE_LINES = 100
#: How often results are fetched that break off.
TRIES = 3
PAUSE_SECONDS = 2.0


class _Result(NamedTuple):
    question: bytes
    value: Value


class Collection:
    """Takes the results of batches into the table.

    Args:
        plan: whose rows are all rows, those in batches among them.

    Attributes:
        returned: rows whose batch did not answer them.
        odd: lines that could not be used.
    """

    def __init__(self, ground: Ground, plan: Plan, asking: Asking, protocol: BatchProtocol, job: int) -> None:
        self._ground = ground
        self._plan = plan
        self._asking = asking
        self._protocol = protocol
        self._job = job
        self._values: dict[bytes, Value] = {}
        self.returned = 0
        self.odd = 0

    async def take(self, record: BatchRecord, batch: Batch) -> bool:
        """Take the results of a batch; say whether all of them are taken.

        What is missing afterwards was not answered: those rows wait again.
        """
        for tries in range(TRIES):
            if tries:
                await anyio.sleep(PAUSE_SECONDS)
            lines = _Lines(self._protocol, batch)
            try:
                await self._replay(record, lines)
            except BatchError as error:
                # What came before is in the table when the results are read again.
                await self._ground.writer.drained()
                logger.warning("The results of a batch broke off: %s", redacted(str(error)))
                continue
            if self._is_stopped:
                return False
            if lines.count >= batch.answered:
                await self._close(record, batch)
                self.odd += lines.odd
                return True
            logger.warning(
                "The results of a batch have %d lines, the provider says %d", lines.count, batch.answered
            )
        if lines.complete:
            await self._close(record, batch)
            return True
        return False

    @property
    def _is_stopped(self) -> bool:
        return self._ground.ledger.stopping is not None

    async def _replay(self, record: BatchRecord, lines: _Lines) -> None:
        pairs = self._ground.model.map(self._work(record, lines), self._to_prompt, **self._asking.keywords)
        async with aclosing(pairs):
            async for asked, response in pairs:
                self._values.pop(asked.question, None)
                await self._asking.take(asked, response)
        await self._ground.writer.drained()

    def _to_prompt(self, asked: Asked) -> str:
        value = self._values[asked.question]

        def reply(request: Request) -> Reply:
            return self._protocol.reply(value, request)

        Exchange(reply).use()
        return asked.prompt

    async def _work(self, record: BatchRecord, lines: _Lines) -> AsyncGenerator[Asked, None]:
        """Yield the rows that have an answer, the rows that ask the same one after the other."""
        seen: set[bytes] = set()
        async with aclosing(lines.pages()) as pages:
            async for page in pages:
                if self._is_stopped:
                    return
                # Of a line that is there twice the first counts.
                new = {each.question: each.value for each in reversed(page) if each.question not in seen}
                seen.update(new)
                find = partial(self._rows, batch=record.id, questions=set(new))
                found, gone = await read(self._plan.database, find)
                await self._drop(gone)
                for question, value in new.items():
                    for row in found.get(question, ()):
                        await self._ground.writer.ready()
                        self._values[question] = value
                        asked = await self._asked(row, question)
                        if asked is None:
                            await self._drop([row.key])
                        elif await self._asking.is_to_send(asked):
                            yield asked

    async def _asked(self, row: Row, question: bytes) -> Asked | None:
        """Return a row and its question, or ``None`` if it would be another one now."""
        try:
            if self._plan.attachments:  # Files are read.
                prompt, now = await anyio.to_thread.run_sync(self._plan.question, row)
            else:
                prompt, now = self._plan.question(row)
        except RowError:
            return None
        return Asked(row, prompt, question) if now == question else None

    def _rows(
        self, conn: sqlite3.Connection, batch: int, questions: set[bytes]
    ) -> tuple[dict[bytes, list[Row]], list[tuple[SQLValue, ...]]]:
        """Return the rows of these questions, and the keys of those that are gone, or have a value."""
        rows, width = self._plan.rows, len(self._plan.table.key)
        found: dict[bytes, list[Row]] = {}
        gone: list[tuple[SQLValue, ...]] = []
        for question in questions:
            for noted in rows_of(conn, self._job, batch, question):
                key = key_of(noted, width)
                if key is None:
                    continue
                row = rows.by_key(conn, key)
                if row is None:
                    gone.append(key)
                else:
                    found.setdefault(question, []).append(row)
        return found, gone

    async def _drop(self, keys: list[tuple[SQLValue, ...]]) -> None:
        """Rows were deleted, edited or filled meanwhile: their answers are dropped, as those of live runs."""
        if not keys:
            return
        job = self._job

        def settle(conn: sqlite3.Connection) -> None:
            settle_rows(conn, job, keys)

        await write(self._plan.database, in_transaction(settle))
        self._ground.report.changed += len(keys)

    async def _close(self, record: BatchRecord, batch: Batch) -> None:
        """A batch is over: what is left in it has no answer."""

        def close(conn: sqlite3.Connection) -> int:
            left = release_rows(conn, record.id)
            change_batch(conn, record.id, state="collected", says=batch.says, answered=batch.answered)
            return left

        self.returned += await write(self._plan.database, in_transaction(close))


class _Lines:
    """The lines of a batch's results, read as they come.

    Attributes:
        count: how many there were.
        odd: how many of them say nothing that can be used.
        complete: whether the end was reached.
    """

    def __init__(self, protocol: BatchProtocol, batch: Batch) -> None:
        self._protocol = protocol
        self._batch = batch
        self.count = 0
        self.odd = 0
        self.complete = False

    async def pages(self) -> AsyncGenerator[list[_Result], None]:
        """Yield the answers, some at a time."""
        page: list[_Result] = []
        async with aclosing(self._protocol.results(self._batch)) as lines:
            async for line in lines:
                self.count += 1
                result = self._read(line)
                if result is not None:
                    page.append(result)
                if len(page) >= PAGE_LINES:
                    yield page
                    page = []
        self.complete = True
        if page:
            yield page

    def _read(self, text: bytes) -> _Result | None:
        try:
            line = self._protocol.read(text)
            question = bytes.fromhex(line.custom_id)
        except (ValueError, BatchError, RecursionError):
            self.odd += 1
            return None
        return None if line.reply is None else _Result(question, line.reply)


def settle_submitted(conn: sqlite3.Connection, run: RunId, keys: list[tuple[SQLValue, ...]]) -> None:
    """Take rows out of their batches in the transaction that writes what came of them."""
    settle_rows(conn, run.job, keys)

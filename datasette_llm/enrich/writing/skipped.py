"""Rows with nothing to ask about: no failures, and what was recorded of them as such is forgotten.

Earlier versions recorded them in ``_llm_enrich_errors``, on every run.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from ..database import read, write
from ..errors import DatabaseError
from ..record import failures

if TYPE_CHECKING:
    import sqlite3

    from ..plan import Plan
    from ..sql import SQLValue

# So many are looked up and forgotten in one short transaction.
TRANSACTION_ROWS = 500


class Forgetter:
    """Forgets the recorded failures of rows that are skipped; costs nothing where there are none."""

    def __init__(self, plan: Plan) -> None:
        self._database = plan.database
        self._table = plan.table.name
        self._label = plan.outputs.label
        self._keys: list[tuple[SQLValue, ...]] = []
        self._any: bool | None = None

    async def add(self, key: tuple[SQLValue, ...]) -> None:
        """Have the record of a row forgotten, now or soon."""
        if self._any is None:
            try:
                self._any = await read(self._database, lambda conn: self._records(conn).any)
            except DatabaseError:
                return  # Whoever reads rows or writes answers will say so. This can wait for the next run.
        if self._any:
            self._keys.append(key)
            if len(self._keys) >= TRANSACTION_ROWS:
                await self.flush()

    async def flush(self) -> None:
        """Forget what has been added, unless the database cannot be written: then the next run does."""
        if self._keys:
            keys, self._keys = self._keys, []
            with suppress(DatabaseError):
                await write(self._database, partial(self._forget, keys))

    def _forget(self, keys: list[tuple[SQLValue, ...]], conn: sqlite3.Connection) -> None:
        conn.execute("begin immediate")
        records = self._records(conn)
        for key in keys:
            records.clear(key)
        conn.commit()

    def _records(self, conn: sqlite3.Connection) -> failures.Records:
        return failures.Records(conn, self._table, self._label, None)

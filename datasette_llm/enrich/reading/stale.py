"""Rows whose value answers a question that would now be another one.

The row was edited, or the prompt, the model, its options or the schema have changed. What a value answers is
on record; one that is not on record, such as a value typed in by somebody, is never taken for stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RowError
from ..record.answers import has_no_value_sql, question_sql
from .selection import PAGE_BYTES, PAGE_ROWS, Narrowed, Row, size_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from ..sql import SQLValue


@dataclass(frozen=True)
class StaleSelection(Narrowed):
    """The stale rows of a selection.

    Attributes:
        rows: all rows that the user's condition allows.
        outputs: the existing output columns.
        job: whose record tells what was asked.
        question: returns the prompt of a row, empty if there is nothing to ask, and its hash.
    """

    outputs: tuple[str, ...]
    job: int
    question: Callable[[Row], tuple[str, bytes]]

    def page(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None, size: int = PAGE_ROWS
    ) -> tuple[list[Row], tuple[SQLValue, ...] | None]:
        """Return the stale ones of the next rows that are done, and the key to go on from."""
        key = [f"{self.rows.table.sql_name}.{name}" for name in self.rows.table.key]
        values = [f"{self.rows.table.sql_column(name)} is not null" for name in self.outputs]
        done = f"({' or '.join([*values, has_no_value_sql(self.job, key)])})"
        rows: list[Row] = []
        looked_at = held = 0
        last: tuple[SQLValue, ...] | None = None
        for row, asked in self.rows.with_expression(conn, question_sql(self.job, key), done, after, size):
            looked_at += 1
            last = row.key
            held += size_of(row)
            if asked is not None and self._is_stale(row, asked):
                rows.append(row)
            if held >= PAGE_BYTES:
                return rows, last
        return rows, last if looked_at == size else None

    def _is_stale(self, row: Row, asked: object) -> bool:
        try:
            prompt, question = self.question(row)
        except RowError:
            return False  # There is no question now that the value could fail to answer.
        return bool(prompt) and question != asked

"""Answers that earlier runs have put into the table, found again by the hash of their questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..record.answers import find_answered
from ..record.keys import key_of
from ..reuse import Answer
from ..sql import quote

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from .table import Table


def find_answers(
    conn: sqlite3.Connection, job: int, table: Table, columns: Sequence[str], questions: Iterable[bytes]
) -> dict[bytes, Answer]:
    """Return the values that rows of the table have for these questions.

    A value is what stands in the table now: one that somebody has corrected is given as it was corrected, one
    that somebody has taken away is not given.
    """
    select = ", ".join(f"{table.sql_name}.{quote(column)}" for column in columns)
    match = " and ".join(f"{table.sql_name}.{name} is ?" for name in table.key)
    found: dict[bytes, Answer] = {}
    for question in questions:
        answered = find_answered(conn, job, question)
        if answered is None:
            continue
        noted, *tokens = answered
        key = key_of(noted, len(table.key))
        if key is None:
            continue
        values = conn.execute(f"select {select} from {table.sql_name} where {match}", key).fetchone()
        if values is not None and any(value is not None for value in values):
            found[question] = Answer(tuple(values), *tokens)
    return found

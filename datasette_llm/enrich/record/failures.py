"""The rows that failed, kept beside the table in ``_llm_enrich_errors`` until they succeed.

One record per table, row and output column: a row that fails again replaces its error and adds to
its attempts, a row that succeeds is removed. The table is made when the first row fails.

``pk`` is the value of the key itself where the key is one column, so that it joins; the values of a
compound key are a JSON array.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from ..sql import SQLValue

ERRORS_TABLE = "_llm_enrich_errors"

# An error can quote a whole prompt; this keeps what a person reads.
ERROR_CHARACTERS = 2_000

_CREATE = f"""
create table if not exists {ERRORS_TABLE} (
    "table" text not null,
    pk not null,
    "column" text not null,
    model text,
    error text not null,
    attempts integer not null,
    "when" text not null,
    unique ("table", "column", pk)
)
"""

_UPSERT = f"""
insert into {ERRORS_TABLE} ("table", pk, "column", model, error, attempts, "when")
values (?, ?, ?, ?, ?, ?, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'))
on conflict ("table", "column", pk) do update set
    model = excluded.model, error = excluded.error,
    attempts = attempts + excluded.attempts, "when" = excluded."when"
"""


def stored_key(key: Sequence[SQLValue]) -> SQLValue:
    """Return a row's key as it is kept in ``pk``."""
    if len(key) == 1:
        return key[0]
    return json.dumps(
        [
            {"$base64": True, "encoded": base64.b64encode(value).decode()}
            if isinstance(value, bytes)
            else value
            for value in key
        ],
        ensure_ascii=False,
    )


def key_from_stored(stored: SQLValue, width: int) -> tuple[SQLValue, ...] | None:
    """Return the key that a ``pk`` stands for, or ``None`` if it is not of this table's shape."""
    if width == 1:
        return (stored,)
    try:
        values = json.loads(cast("str", stored))
    except (TypeError, ValueError):
        return None
    if not isinstance(values, list) or len(values) != width:
        return None
    return tuple(base64.b64decode(value["encoded"]) if isinstance(value, dict) else value for value in values)


class Records:
    """The records of one table and output column, inside a transaction that is under way."""

    def __init__(self, conn: sqlite3.Connection, table: str, label: str, model: str | None) -> None:
        self._conn = conn
        self._table = table
        self._label = label
        self._model = model
        # Asked once per transaction: most jobs have no failure, and then nothing is to be cleared.
        self._made = has_errors_table(conn)
        self._any = self._made and self._exists()

    def _exists(self) -> bool:
        sql = f'select 1 from {ERRORS_TABLE} where "table" = ? and "column" = ? limit 1'
        return self._conn.execute(sql, (self._table, self._label)).fetchone() is not None

    @property
    def any(self) -> bool:
        """Whether a failure is recorded for this table and column."""
        return self._any

    def add(self, key: Sequence[SQLValue], error: str, attempts: int) -> None:
        """Record one failed row; its record of an earlier run is replaced."""
        if not self._made:
            self._conn.execute(_CREATE)
            self._made = True
        shown = error if len(error) <= ERROR_CHARACTERS else error[:ERROR_CHARACTERS] + " ..."
        # A lone surrogate in a provider's message cannot be stored as UTF-8.
        shown = shown.encode("utf-8", "replace").decode()
        self._conn.execute(_UPSERT, (self._table, stored_key(key), self._label, self._model, shown, attempts))
        self._any = True

    def clear(self, key: Sequence[SQLValue]) -> None:
        """Forget a row's failure: it has succeeded, or there is nothing to ask about it."""
        if self._any:
            sql = f'delete from {ERRORS_TABLE} where "table" = ? and "column" = ? and pk is ?'
            self._conn.execute(sql, (self._table, self._label, stored_key(key)))


def has_errors_table(conn: sqlite3.Connection) -> bool:
    sql = "select 1 from sqlite_master where type = 'table' and name = ?"
    return conn.execute(sql, (ERRORS_TABLE,)).fetchone() is not None

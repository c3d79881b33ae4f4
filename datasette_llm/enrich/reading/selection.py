"""Which rows a job asks about, page by page in the order of their key.

A page is one short query on a read connection (``key > last`` and a limit), so no transaction stays
open, rows may come and go meanwhile, and memory holds one page: at most `PAGE_ROWS` rows, fewer when
they are big. Rows that are added behind the current key are for the next run.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..errors import EnrichInputError
from ..record.failures import ERRORS_TABLE, has_errors_table, key_from_stored
from ..sql import quote
from ..trouble import is_locked
from .table import ROWID_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..sql import SQLValue
    from .table import Table

# Small first, so that the first prompts leave at once; then large enough that a query per page is
# no cost worth counting.
FIRST_PAGE_ROWS = 50
PAGE_ROWS = 500
# A page is cut here, whatever its number of rows: a table of 10 MB texts must fit into memory too.
PAGE_BYTES = 4_000_000
# Rows that are looked at in one go when counting: a few milliseconds.
COUNT_ROWS = 20_000


class Source(Protocol):
    """Rows that a job is about: read a page at a time, counted a stretch at a time."""

    def page(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None, size: int = PAGE_ROWS
    ) -> tuple[list[Row], tuple[SQLValue, ...] | None]: ...

    def count(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None
    ) -> tuple[int, tuple[SQLValue, ...] | None]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was when it was read: its key, and the columns that the prompt uses."""

    key: tuple[SQLValue, ...]
    values: dict[str, SQLValue]


@dataclass(frozen=True)
class Selection:
    """The rows of a table that a job is about.

    Attributes:
        columns: the columns to read.
        outputs: existing output columns; a row in which one of them has a value is done.
        where: an SQL condition of the user, or ``None``.
        overwrite: rows that are done count too.
        done: an SQL condition for rows that are done although they have no value, or ``None``.
        left: an SQL condition for rows that are somebody else's, or ``None``.
    """

    table: Table
    columns: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    where: str | None = None
    overwrite: bool = False
    done: str | None = None
    left: str | None = None
    _what: str = field(init=False, repr=False)
    _select: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        columns = [f"{self.table.sql_name}.{key}" for key in self.table.key]
        columns += [self.table.sql_column(name) for name in self.columns]
        what = ", ".join(columns)
        object.__setattr__(self, "_what", what)
        object.__setattr__(self, "_select", f"select {what} from {self.table.sql_name} where ")

    def condition(self) -> str:
        """Return the SQL condition on a row: not done yet, and as the user asked."""
        parts = []
        if not self.overwrite:
            parts += [f"{self.table.sql_column(name)} is null" for name in self.outputs]
            parts += [f"not {self.done}"] if self.done is not None else []
        parts += [f"not {self.left}"] if self.left is not None else []
        if self.where and self.where.strip():
            # The newline ends an SQL comment of the user's.
            parts.append(f"({self.where}\n)")
        return " and ".join(parts) or "1"

    def check(self, conn: sqlite3.Connection) -> None:
        """Have SQLite read the condition once.

        Raises:
            EnrichInputError: the user's condition is no SQL expression over this table.
        """
        try:
            conn.execute(f"explain {self._select} {self.condition()}").fetchone()
        except sqlite3.Error as error:
            if is_locked(error):
                raise
            raise EnrichInputError(f"The condition {self.where!r} is not valid here: {error}") from None

    def count(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None
    ) -> tuple[int, tuple[SQLValue, ...] | None]:
        """Count the rows in the next stretch of the table; return the key where it ends.

        A stretch at a time, since a reader of a whole big table keeps others from writing.
        """
        keys = ", ".join(f"{self.table.sql_name}.{key}" for key in self.table.key)
        begin, parameters = self._beyond(after)
        stretch = f"where {begin} order by {keys} limit 1 offset {COUNT_ROWS}"
        end = conn.execute(f"select {keys} from {self.table.sql_name} {stretch}", parameters).fetchone()
        condition = f"{self.condition()} and {begin}"
        if end is not None:
            condition += f" and not {self._beyond(tuple(end))[0]}"
            parameters += tuple(end)
        found = conn.execute(f"select count(*) from {self.table.sql_name} where {condition}", parameters)
        return int(found.fetchone()[0]), None if end is None else tuple(end)

    def page(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None, size: int = PAGE_ROWS
    ) -> tuple[list[Row], tuple[SQLValue, ...] | None]:
        """Return the rows after a key, and the key to go on from (``None``: there are no more)."""
        keys = [f"{self.table.sql_name}.{key}" for key in self.table.key]
        beyond, parameters = self._beyond(after)
        sql = f"{self._select} {self.condition()} and {beyond} order by {', '.join(keys)} limit {size}"
        rows: list[Row] = []
        held = 0
        cursor = conn.execute(sql, parameters)
        try:
            for record in cursor:
                rows.append(self._row(tuple(record)))
                held += size_of(rows[-1])
                if held >= PAGE_BYTES:
                    return rows, rows[-1].key
        finally:
            cursor.close()
        return rows, rows[-1].key if len(rows) == size else None

    def with_expression(
        self,
        conn: sqlite3.Connection,
        expression: str,
        condition: str,
        after: tuple[SQLValue, ...] | None,
        size: int,
    ) -> Iterator[tuple[Row, SQLValue]]:
        """Yield the rows after a key that meet another condition, each with the value of an expression."""
        keys = [f"{self.table.sql_name}.{key}" for key in self.table.key]
        beyond, parameters = self._beyond(after)
        condition = f"{self.condition()} and {condition} and {beyond}"
        sql = f"select {self._what}, {expression} from {self.table.sql_name} where {condition}"
        sql += f" order by {', '.join(keys)} limit {size}"
        cursor = conn.execute(sql, parameters)
        try:
            for record in cursor:
                *values, extra = tuple(record)
                yield self._row(tuple(values)), extra
        finally:
            cursor.close()

    def by_key(self, conn: sqlite3.Connection, key: Sequence[SQLValue]) -> Row | None:
        """Return one row, if it still exists and is still to be done."""
        match = " and ".join(f"{self.table.sql_name}.{name} is ?" for name in self.table.key)
        record = conn.execute(f"{self._select} {match} and {self.condition()}", tuple(key)).fetchone()
        return None if record is None else self._row(tuple(record))

    def named(
        self, conn: sqlite3.Connection, columns: Sequence[str], values: Sequence[SQLValue]
    ) -> list[Row]:
        """Return the rows that have these values and are still to be done: one, if the columns are a key."""
        match = " and ".join(f"{self._named_column(column)} is ?" for column in columns)
        found = conn.execute(f"{self._select} {match} and {self.condition()}", tuple(values))
        return [self._row(tuple(record)) for record in found]

    def _named_column(self, name: str) -> str:
        if self.table.find_column(name) is None and name in ROWID_NAMES:
            return f"{self.table.sql_name}.{name}"  # No declared column, so it must not be quoted.
        return self.table.sql_column(name)

    def _beyond(self, after: tuple[SQLValue, ...] | None) -> tuple[str, tuple[SQLValue, ...]]:
        if after is None:
            return "1", ()
        keys = [f"{self.table.sql_name}.{key}" for key in self.table.key]
        if len(keys) == 1:
            return f"{keys[0]} > ?", after
        return f"({', '.join(keys)}) > ({', '.join('?' for _ in after)})", after

    def from_key(self, key: Sequence[SQLValue], *, included: bool) -> str:
        """Return the condition for the rows from a key on, as text that a person can run."""
        sign = ">=" if included else ">"
        names, values = ", ".join(self.table.key), ", ".join(literal(value) for value in key)
        condition = f"{names} {sign} {values}" if len(key) == 1 else f"({names}) {sign} ({values})"
        if not self.where:
            return condition
        # The newline ends an SQL comment of the user's.
        end = "\n" if "--" in self.where else ""
        return f"({self.where}{end}) and {condition}"

    def _row(self, record: tuple[SQLValue, ...]) -> Row:
        width = len(self.table.key)
        return Row(record[:width], dict(zip(self.columns, record[width:], strict=True)))


@dataclass(frozen=True)
class Narrowed:
    """Those rows of a selection that something else than a condition tells; to count them is to read them."""

    rows: Selection

    def check(self, conn: sqlite3.Connection) -> None:
        self.rows.check(conn)

    def count(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None
    ) -> tuple[int, tuple[SQLValue, ...] | None]:
        rows, last = self.page(conn, after)
        return len(rows), last

    def page(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None, size: int = PAGE_ROWS
    ) -> tuple[list[Row], tuple[SQLValue, ...] | None]:
        """Like `Selection.page`; what ``after`` is, each kind says."""
        raise NotImplementedError


@dataclass(frozen=True)
class FailedSelection(Narrowed):
    """The rows of a selection that are recorded as failed, read by way of their records."""

    label: str

    def page(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None, size: int = PAGE_ROWS
    ) -> tuple[list[Row], tuple[SQLValue, ...] | None]:
        """Like `Selection.page`; here ``after`` is the rowid of a record of a failure."""
        if not has_errors_table(conn):
            return [], None
        last: SQLValue = after[0] if after else 0
        rows: list[Row] = []
        held = 0
        table = self.rows.table
        records = conn.execute(
            f'select rowid, pk from {quote(ERRORS_TABLE)} where "table" = ? and "column" = ? and rowid > ?'
            f" order by rowid limit {size}",
            (table.name, self.label, last),
        ).fetchall()
        for rowid, stored in records:
            key = key_from_stored(stored, len(table.key))
            row = self.rows.by_key(conn, key) if key is not None else None
            last = rowid
            if row is not None:
                rows.append(row)
                held += size_of(row)
                if held >= PAGE_BYTES:
                    return rows, (last,)
        return rows, (last,) if len(records) == size else None


@dataclass(frozen=True)
class NamedSelection(Narrowed):
    """Those rows of a selection that somebody else has named, such as one page of a table.

    Attributes:
        columns: the columns by whose values rows are named: those of the primary key, or the rowid.
        keys: the values, one tuple a row.
    """

    columns: tuple[str, ...]
    keys: tuple[tuple[SQLValue, ...], ...]

    def page(
        self, conn: sqlite3.Connection, after: tuple[SQLValue, ...] | None, size: int = PAGE_ROWS
    ) -> tuple[list[Row], tuple[SQLValue, ...] | None]:
        """Like `Selection.page`; here ``after`` is how many of the keys have been looked at."""
        begin = int(after[0] or 0) if after else 0
        rows: list[Row] = []
        held = 0
        for position, key in enumerate(self.keys[begin : begin + size], begin + 1):
            found = self.rows.named(conn, self.columns, key)
            rows += found
            held += sum(map(size_of, found))
            if held >= PAGE_BYTES and position < len(self.keys):
                return rows, (position,)
        end = begin + size
        return rows, (end,) if end < len(self.keys) else None


def size_of(row: Row) -> int:
    """Return about how many bytes a row takes."""
    return sum(len(value) for value in row.values.values() if isinstance(value, (str, bytes)))


def literal(value: SQLValue) -> str:
    """Return a value as SQL text."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"x'{value.hex()}'"
    if isinstance(value, str):
        if "\x00" in value:
            return f"cast(x'{value.encode().hex()}' as text)"
        return "'" + value.replace("'", "''") + "'"
    return repr(value)

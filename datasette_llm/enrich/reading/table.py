"""What a table is: how its rows are named in SQL, and which columns may receive an answer.

A row is found again by its *key*: the declared primary key, or the rowid where there is none. In a
rowid table SQLite allows NULL in a primary key that is not a lone INTEGER; where such rows exist the
rowid is the key, so that no row is out of reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import EnrichInputError
from ..sql import quote
from ..telling.words import nearest

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

Affinity = Literal["INTEGER", "TEXT", "BLOB", "REAL", "NUMERIC"]

# What this package keeps about the tables of a database is in tables whose names begin so.
OWN_PREFIX = "_llm_"

ROWID_NAMES = ("rowid", "_rowid_", "oid")


@dataclass(frozen=True, slots=True)
class Column:
    """One column as SQLite declares it.

    Attributes:
        name: its name, unquoted.
        type: the declared type, possibly empty.
        generated: computed by SQLite, so it can be read and never written.
        key_position: 1 for the first column of the primary key, ..., 0 for the other columns.
    """

    name: str
    type: str
    generated: bool = False
    key_position: int = 0

    @property
    def affinity(self) -> Affinity:
        """The storage class this column prefers, by SQLite's own five rules."""
        declared = self.type.upper()
        if "INT" in declared:
            return "INTEGER"
        if any(word in declared for word in ("CHAR", "CLOB", "TEXT")):
            return "TEXT"
        if not declared or "BLOB" in declared:
            return "BLOB"
        if any(word in declared for word in ("REAL", "FLOA", "DOUB")):
            return "REAL"
        return "NUMERIC"


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose rows can be found again.

    Attributes:
        name: as SQLite spells it.
        columns: in declared order, generated ones included.
        key: SQL expressions (already quoted) that together name a row.
        key_names: the same for people: column names, or ``("rowid",)``.
    """

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    key_names: tuple[str, ...]

    @property
    def sql_name(self) -> str:
        return quote(self.name)

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def find_column(self, name: str) -> Column | None:
        """Find a column as SQLite would: without regard to ASCII case."""
        for column in self.columns:
            if column.name.lower() == name.lower():
                return column
        return None

    def sql_column(self, name: str) -> str:
        """Qualify a column: a bare quoted name that is gone would silently read as a string."""
        return f"{self.sql_name}.{quote(name)}"


def read_table(conn: sqlite3.Connection, name: str) -> Table:
    """Look at a table.

    Raises:
        EnrichInputError: there is no such table, or it cannot be written row by row.
    """
    kinds = {
        str(row[0]): (str(row[1]), str(row[2] or ""))
        for row in conn.execute("select name, type, sql from sqlite_master where type in ('table', 'view')")
    }
    found = name if name in kinds else {other.lower(): other for other in kinds}.get(name.lower())
    if found is None:
        tables = [table for table, (kind, _) in kinds.items() if kind == "table" and table[0] != "_"]
        raise EnrichInputError(f"There is no table {name!r}: {nearest(name, sorted(tables))}")
    if found.lower().startswith(OWN_PREFIX):
        raise EnrichInputError(
            f"{found!r} is a table of this program's own, about the other tables: enrich one of those"
        )
    kind, sql = kinds[found]
    if kind == "view":
        raise EnrichInputError(
            f"{found!r} is a view, which has no rows of its own to write to: "
            "enrich the table that it selects from, with --where if only some rows are meant"
        )
    if sql.lower().startswith("create virtual table") or found.lower().startswith("sqlite_"):
        raise EnrichInputError(f"{found!r} is a table that SQLite manages itself: it cannot get a new column")
    columns = tuple(
        Column(str(row[1]), str(row[2] or ""), generated=row[6] in (2, 3), key_position=int(row[5]))
        for row in conn.execute(f"pragma table_xinfo({quote(found)})")
        if row[6] != 1
    )
    key, key_names = _key_of(conn, found, columns)
    return Table(found, columns, key, key_names)


def _key_of(
    conn: sqlite3.Connection, table: str, columns: Sequence[Column]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    declared = sorted((c for c in columns if c.key_position), key=lambda column: column.key_position)
    names = tuple(column.name for column in declared)
    quoted = tuple(quote(column_name) for column_name in names)
    rowid = _rowid_name(conn, table, columns)
    if declared:
        is_rowid_alias = len(declared) == 1 and declared[0].type.upper() == "INTEGER"
        if rowid is None or is_rowid_alias:
            return quoted, names
        any_null = " or ".join(f"{column} is null" for column in quoted)
        if not conn.execute(f"select 1 from {quote(table)} where {any_null} limit 1").fetchone():
            return quoted, names
    if rowid is None:
        raise EnrichInputError(
            f"The rows of {table!r} cannot be told apart: it has no primary key, and columns named "
            "rowid, _rowid_ and oid hide the one that SQLite gives it"
        )
    return (rowid,), ("rowid",)


def _rowid_name(conn: sqlite3.Connection, table: str, columns: Sequence[Column]) -> str | None:
    """Return a name by which the rowid can be read, or ``None`` (WITHOUT ROWID, or all three taken)."""
    taken = {column.name.lower() for column in columns}
    for name in ROWID_NAMES:
        if name not in taken:
            try:
                conn.execute(f"select {name} from {quote(table)} limit 0")
            except Exception:  # "no such column": a WITHOUT ROWID table, under each of the names
                return None
            return name
    return None


def check_output_column(table: Table, name: str) -> Column | None:
    """Return the existing column that answers go to, or ``None`` if it has to be added.

    Raises:
        EnrichInputError: the column exists and must not be written.
    """
    if not name.strip() or "\x00" in name:
        raise EnrichInputError(f"{name!r} is no name for a column")
    column = table.find_column(name)
    if column is None:
        if name.lower() in ROWID_NAMES:
            raise EnrichInputError(f"A column named {name!r} would hide the key of the table's rows")
        return None
    if column.generated:
        raise EnrichInputError(f"{column.name!r} is a generated column: SQLite computes its values")
    if column.key_position:
        raise EnrichInputError(f"{column.name!r} is part of the primary key: an answer must not replace it")
    return column

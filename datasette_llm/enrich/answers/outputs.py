"""From an answer's text to the values of the columns that it belongs in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AnswerError, EnrichInputError
from ..reading.table import check_output_column
from ..sql import quote
from .schema import AnswerCheck
from .whole import beginning, fenced, spoken

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from ..reading.table import Affinity, Column, Table
    from ..sql import SQLValue

_SQL_TYPES = {"integer": "INTEGER", "boolean": "INTEGER", "number": "REAL"}
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Output:
    """One column that receives a part of the answer.

    Attributes:
        name: its name, as the table spells it if it exists.
        sql_type: the type it is added with, if it does not exist.
        affinity: what it prefers to hold.
        exists: it is in the table now.
    """

    name: str
    sql_type: str
    affinity: Affinity
    exists: bool


class Outputs:
    """The output columns of one job, and how an answer becomes their values.

    Without a schema the answer's text is the value of one column; if that column exists and is an
    INTEGER or REAL one, the text has to be such a number. With a schema each property is a column of
    its own, typed; a column given as well receives the whole answer as JSON.

    Attributes:
        columns: the columns, in the order of the values that `parse` returns.
        label: what the job's column is called where one name is needed.
    """

    def __init__(
        self,
        table: Table,
        column: str | None,
        schema: Mapping[str, Any] | None,
        *,
        allow_empty: bool = False,
        extract: bool | Literal["last"] = False,
    ) -> None:
        """Check the columns against the table.

        Args:
            table: the table that has them, or will have them.
            column: receives the answer.
            schema: what the answer has to be.
            allow_empty: a text answer may be empty.
            extract: only the first fenced block of an answer counts, or the last, if it has any.

        Raises:
            EnrichInputError: no column is given, or an existing one cannot hold such answers.
        """
        self._check = AnswerCheck(schema) if schema is not None else None
        self._properties: dict[str, Any] = dict(schema["properties"]) if schema is not None else {}
        if column is None and schema is None:
            raise EnrichInputError("Say which column the answers go to (it is added if it does not exist)")
        names = [name for name in (column, *self._properties) if name is not None]
        doubled = {name for name in names if [other.lower() for other in names].count(name.lower()) > 1}
        if doubled:
            raise EnrichInputError(f"Two outputs would share the column {sorted(doubled)[0]!r}")
        self._column = column
        self._allow_empty = allow_empty
        self._extract = extract
        outputs = []
        for name in names:
            kind = None if name == column else _kind(self._properties[name])
            outputs.append(_output(table, name, kind, whole=schema is None))
        self.columns: tuple[Output, ...] = tuple(outputs)
        self.label = ", ".join(output.name for output in self.columns) if column is None else outputs[0].name

    @property
    def existing(self) -> tuple[str, ...]:
        return tuple(output.name for output in self.columns if output.exists)

    @property
    def marks(self) -> tuple[str, ...]:
        """The existing columns that say whether a row is done: the column given, else all of them."""
        return (
            self.existing if self._column is None else tuple(c for c in self.existing[:1] if c == self.label)
        )

    def add_columns(self, conn: sqlite3.Connection, table: Table) -> None:
        """Add the columns that the table lacks."""
        for output in self.columns:
            if not output.exists:
                sql = f"alter table {table.sql_name} add column {quote(output.name)} {output.sql_type}"
                conn.execute(sql)

    def parse(self, text: str) -> tuple[SQLValue, ...]:
        """Return the values for the columns.

        Raises:
            AnswerError: the answer is empty, or does not fit them.
        """
        said = spoken(text)
        if self._extract and said:
            text = said = fenced(said, last=self._extract == "last")
        if not said and not (self._allow_empty and self._check is None):
            reasoned = " (all of it is reasoning)" if text.strip() else ""
            remedy = "" if self._check is not None else "; --allow-empty accepts that"
            raise AnswerError(f"the answer is empty{reasoned}{remedy}", kind="empty")
        if self._check is None:
            return (_number(said, self.columns[0]),)
        answer = self._check.parse(text)
        values = [_stored(answer.get(name)) for name in self._properties]
        if self._column is not None:
            return (_stored(json.dumps(answer, ensure_ascii=False)), *values)
        if not any(name in answer for name in self._properties):
            raise AnswerError(f"the answer has no value for any column: {beginning(text)}", kind="empty")
        return tuple(values)


def _kind(part: Any) -> str | None:
    """Return the one JSON type of a property, if it has one; null does not count."""
    kinds = part.get("type") if isinstance(part, dict) else None
    if isinstance(kinds, list):
        kinds = [kind for kind in kinds if kind != "null"]
        kinds = kinds[0] if len(kinds) == 1 else None
    return kinds if isinstance(kinds, str) else None


def _output(table: Table, name: str, kind: str | None, *, whole: bool) -> Output:
    column = check_output_column(table, name)
    if column is None:
        sql_type = _SQL_TYPES.get(kind or "", "TEXT")
        return Output(name, sql_type, "TEXT" if sql_type == "TEXT" else "NUMERIC", exists=False)
    if not whole and not _fits(column, kind):
        raise EnrichInputError(
            f"The column {column.name!r} is {column.type} and the schema's {name!r} is "
            f"{kind or 'of no single type'}: name the property differently, or change its type"
        )
    return Output(column.name, column.type, column.affinity, exists=True)


def _fits(column: Column, kind: str | None) -> bool:
    if column.affinity in ("INTEGER", "REAL"):
        return kind in ("integer", "number", "boolean")
    return True


def _number(text: str, output: Output) -> SQLValue:
    """Return the text, or the number it is if that is what the existing column holds."""
    if not output.exists or output.affinity not in ("INTEGER", "REAL"):
        return _stored(text)
    kind = "an integer" if output.affinity == "INTEGER" else "a number"
    try:
        value: float = _integer(text) if output.affinity == "INTEGER" else float(text.replace("_", "x"))
    except (ValueError, OverflowError):
        raise AnswerError(
            f"the answer {beginning(text)} is not {kind}, which the existing column {output.name!r} holds",
            kind="not a number",
        ) from None
    return _stored(value)


def _integer(text: str) -> int:
    try:
        return int(text.replace("_", "x"))
    except ValueError:
        value = float(text.replace("_", "x"))
        if not value.is_integer():
            raise
        return int(value)


def _stored(value: Any) -> SQLValue:
    """Return a JSON value as SQLite keeps it."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and not -_LARGEST - 1 <= value <= _LARGEST:
        raise _cannot_be_stored(f"an integer that is too large for SQLite: {str(value)[:30]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _cannot_be_stored("a number that is not finite")
    if value is None or isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if "\x00" in text:
        # It could be stored, but SQLite's own functions take it for the end of the text.
        raise _cannot_be_stored(f"a NUL character, at which SQLite ends a text: {beginning(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _cannot_be_stored(
                f"half of a character, a surrogate ({text[error.start]!r}): {beginning(text)}"
            ) from None
    return text


def _cannot_be_stored(what: str) -> AnswerError:
    return AnswerError(f"the answer has {what}", kind="cannot be stored")

"""How one result lands in the table: in which statement, under which conditions, and what if not.

What decides whether a value lands, in the statement that writes it: the row still exists under its
key; its output columns are still empty (unless they are to be overwritten); and the columns that the
prompt was made from still have the values that it was made from. An answer to a question that is no
longer asked is dropped, and counted as ``changed``.
"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from ..errors import AnswerError
from ..record import failures
from ..record.answers import forget_answers
from ..record.runs import find_job
from ..sql import quote
from ..telling.kinds import group_of
from .results import Outcome, Result

if TYPE_CHECKING:
    from ..plan import Plan
    from .recorder import Recorder


class Landing:
    """Writes batches of results of one job, each batch in a transaction of its own."""

    def __init__(
        self,
        plan: Plan,
        model_id: str | None,
        *,
        overwrite: bool | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Prepare the statements.

        Args:
            model_id: the model that failures are recorded for.
            overwrite: also replace values; by default as the job was asked.
            recorder: keeps the record of the run, in the same transactions.
        """
        table, outputs = plan.table, plan.outputs
        self._table = table
        self._label = outputs.label
        self._columns = [output.name for output in outputs.columns]
        self._model_id = model_id
        self._recorder = recorder
        overwrite = plan.spec.replaces if overwrite is None else overwrite
        assignments = ", ".join(f"{quote(output.name)} = ?" for output in outputs.columns)
        self._keys = [f"{table.sql_name}.{key} is ?" for key in table.key]
        empty = [] if overwrite else [f"{table.sql_column(name)} is null" for name in outputs.marks]
        self._update = f"update {table.sql_name} set {assignments} where {' and '.join(self._keys + empty)}"

    def land(self, batch: list[Result], conn: sqlite3.Connection) -> Outcome:
        """Write one batch; runs in Datasette's write thread."""
        outcome = self._attempt(conn, batch)
        if outcome is not None:
            return outcome
        # A trigger of the table rolled everything back (RAISE(ROLLBACK)): find out for which row.
        outcome = Outcome()
        for result in batch:
            alone = self._attempt(conn, [result]) or self._attempt(conn, [_rolled_back(result)])
            if alone is not None:
                outcome.written.extend(alone.written)
                outcome.failed.extend(alone.failed)
                outcome.changed.extend(alone.changed)
        return outcome

    def _attempt(self, conn: sqlite3.Connection, batch: list[Result]) -> Outcome | None:
        """Write a batch in one transaction, or return ``None`` if something in it ended that."""
        outcome = Outcome()
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
                shown = f"{group_of(result.error, result.kind)}: {result.message}"
                records.add(result.row.key, shown, result.attempts)
                outcome.failed.append(result)
            else:
                outcome.changed.append(result)
        run = self._recorder.note(conn, outcome) if self._recorder is not None else None
        if self._recorder is None:
            self._forget(conn, outcome)
        conn.commit()
        if self._recorder is not None and run is not None:
            self._recorder.committed(run)
        return outcome

    def _forget(self, conn: sqlite3.Connection, outcome: Outcome) -> None:
        """Have nothing on record of values that are written without one."""
        job = find_job(conn, self._table.name, self._columns)
        if job is not None:
            forget_answers(conn, job, [result.row.key for result in outcome.written])

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
    if isinstance(error, sqlite3.IntegrityError):
        kind, message = "refused by the table", f"the table refuses the answer: {error}"
    else:
        kind, message = "cannot be stored", f"SQLite cannot store the answer: {error}"
    return Result(result.row, None, AnswerError(message, kind=kind), kind, message, result.attempts)


def _rolled_back(result: Result) -> Result:
    return _refused(result, sqlite3.IntegrityError("a trigger rolled the transaction back"))

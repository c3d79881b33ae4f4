"""The first thing that a job does: write the answers that an earlier one had to leave in the side file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import anyio

from ..database import write
from ..errors import AnswerError
from ..reading.selection import Row
from .landing import Landing
from .recorder import recorder_of
from .results import Outcome, Result
from .side_file import SideFile, fingerprint
from .writer import TRANSACTION_ROWS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from ..plan import Plan
    from ..sql import SQLValue
    from .side_file import Line

logger = logging.getLogger("datasette_llm")


@dataclass(frozen=True, slots=True)
class TakenUp:
    """What became of the answers of an earlier run.

    Attributes:
        plan: for the table as it is now.
        written: rows that have their values now.
        dropped: rows that are gone, were edited, or got a value from somebody else.
    """

    plan: Plan
    written: int = 0
    dropped: int = 0


def side_file_of(plan: Plan) -> SideFile:
    """Return the side file of a job; whoever holds the job's lock may use it."""
    names = [output.name for output in plan.outputs.columns]
    return SideFile(plan.database.path, plan.table.name, names)


async def take_up(plan: Plan, *, patience_seconds: float) -> TakenUp:
    """Write what the side file has for this table and these columns, and remove it there.

    Answers land as those of this run do. Killed in between, the next run does it again: what has landed
    is found to be there.

    Raises:
        DatabaseError: the database cannot be written; the side file is as it was.
    """
    side_file = side_file_of(plan)
    lines = await anyio.to_thread.run_sync(side_file.read)
    if not lines:
        return TakenUp(plan)
    plan = await plan.with_columns()
    written = dropped = 0
    for (overwrite, model), group in groupby(lines, lambda line: (line.overwrite, line.model)):
        some = list(group)
        recorder = recorder_of(plan, model, {}) if model is not None else None
        landing = Landing(plan, model, overwrite=overwrite, recorder=recorder)
        for start in range(0, len(some), TRANSACTION_ROWS):
            land = partial(_land, plan, landing, some[start : start + TRANSACTION_ROWS])
            outcome = await write(plan.database, land, patience_seconds=patience_seconds)
            written += len(outcome.written)
            dropped += len(outcome.changed)
        if recorder is not None:
            await write(plan.database, partial(recorder.end, outcome="taken_up"))
    try:
        await anyio.to_thread.run_sync(side_file.forget)
    except OSError as error:
        logger.warning("Answers that are in the table could not be removed from the side file: %s", error)
    return TakenUp(plan, written, dropped)


def _land(plan: Plan, landing: Landing, lines: list[Line], conn: sqlite3.Connection) -> Outcome:
    gone = []
    results = []
    for line in lines:
        row = _row_now(plan, line, conn)
        if row is None:
            gone.append(_result(plan, line, Row(line.key, {})))
        elif not _has_values(plan, line, conn):
            results.append(_result(plan, line, row))
    outcome = landing.land(results, conn) if results else Outcome()
    outcome.changed.extend(result for result in gone if result.error is None)
    return outcome


def _row_now(plan: Plan, line: Line, conn: sqlite3.Connection) -> Row | None:
    """Return the row as it is now, if its prompt would be made from the same values."""
    table = plan.table
    if len(line.key) != len(table.key) or any(table.find_column(name) is None for name in line.asked_of):
        return None
    found = _select(plan, line, line.asked_of, conn)
    if found is None or fingerprint(found) != line.fingerprint:
        return None
    return Row(line.key, dict(zip(line.asked_of, found, strict=True)))


def _has_values(plan: Plan, line: Line, conn: sqlite3.Connection) -> bool:
    """Say whether the row has these very values: it is the line that was not removed in time."""
    names = tuple(output.name for output in plan.outputs.columns)
    found = _select(plan, line, names, conn)
    if line.values is None:
        # A failure is of no interest any more when there is an answer.
        return found is not None and any(value is not None for value in found)
    return found == _ordered(plan, line.values)


def _select(
    plan: Plan, line: Line, names: tuple[str, ...], conn: sqlite3.Connection
) -> tuple[SQLValue, ...] | None:
    table = plan.table
    columns = ", ".join(["1", *(table.sql_column(name) for name in names)])
    match = " and ".join(f"{table.sql_name}.{key} is ?" for key in table.key)
    found = conn.execute(f"select {columns} from {table.sql_name} where {match}", line.key).fetchone()
    return None if found is None else tuple(found)[1:]


def _ordered(plan: Plan, values: Mapping[str, SQLValue]) -> tuple[SQLValue, ...]:
    lowered = {name.lower(): value for name, value in values.items()}
    return tuple(lowered[output.name.lower()] for output in plan.outputs.columns)


def _result(plan: Plan, line: Line, row: Row) -> Result:
    if line.values is not None:
        values = _ordered(plan, line.values)
        sent, received = line.tokens
        return Result(
            row,
            values,
            question=line.question,
            input_tokens=sent,
            output_tokens=received,
            no_value=all(value is None for value in values),
        )
    error = AnswerError(line.message, kind=line.kind)
    return Result(row, None, error, line.kind, line.message, line.attempts)

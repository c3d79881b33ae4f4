"""Runs: one row for each, from its begin to its end, and what it came to so far.

The counts are written in the transactions that write the values. A run without ``ended`` is under way, or its
process was killed: the lock of its columns tells which.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .tables import RUNS_TABLE, forget_what_is_gone, has_record, make_tables

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What is recorded of a run when it begins.

    Attributes:
        table: as SQLite spells it.
        columns: the columns that receive the answers.
        by: who asked for it: the actor's id, or the user of the command.
        spec: what else was asked (condition, limit, ...), as the command or the page needs it to repeat it.
        versions: of this package, llm and the model's plugin.
    """

    table: str
    columns: tuple[str, ...]
    model: str
    prompt: str
    by: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    schema: Mapping[str, Any] | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunNumbers:
    """What happened in one transaction of a run, to be added to what happened before."""

    written: int = 0
    reused: int = 0
    no_value: int = 0
    failed: int = 0
    skipped: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class RunId:
    """A run that is under way.

    Attributes:
        job: what runs on the same columns share, so that one knows the answers of another.
        began: seconds since the epoch.
    """

    run: int
    job: int
    began: int


def announce_run(conn: sqlite3.Connection, description: RunDescription) -> int:
    """Record a run that has no answer yet, and return its number. Runs in the caller's transaction.

    It belongs to no job until it begins: its columns may not be there yet, and then there is nothing to tell
    that they are not gone.
    """
    make_tables(conn)
    values = _values(description, int(time.time()))
    names = ", ".join(f'"{name}"' for name in values)
    marks = ", ".join("?" for _ in values)
    cursor = conn.execute(f"insert into {RUNS_TABLE} ({names}) values ({marks})", list(values.values()))
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def begin_run(
    conn: sqlite3.Connection, description: RunDescription, *, announced: int | None = None
) -> RunId:
    """Record that a run begins; makes the tables if need be. Runs in the caller's transaction.

    Args:
        announced: its number, if `announce_run` has recorded it.
    """
    make_tables(conn)
    forget_what_is_gone(conn)
    run = announce_run(conn, description) if announced is None else announced
    job = find_job(conn, description.table, description.columns) or run
    conn.execute(f"update {RUNS_TABLE} set job = ? where id = ?", (job, run))
    began = conn.execute(f"select strftime('%s', started) from {RUNS_TABLE} where id = ?", (run,)).fetchone()
    return RunId(run, job, int(began[0]))


def _values(description: RunDescription, began: int) -> dict[str, Any]:
    values = {
        "table": description.table,
        "columns": json.dumps(description.columns, ensure_ascii=False),
        "started": _moment(began),
        "by": description.by,
        "model": description.model,
        "options": json.dumps(dict(description.options), ensure_ascii=False, default=str),
        "prompt": description.prompt,
        "system": description.system,
        "schema": None if description.schema is None else json.dumps(description.schema, ensure_ascii=False),
        "spec": json.dumps(dict(description.spec), ensure_ascii=False, default=str),
        "versions": json.dumps(dict(description.versions)),
    }
    return {name: _storable(value) for name, value in values.items()}


def find_job(conn: sqlite3.Connection, table: str, columns: Sequence[str]) -> int | None:
    """Return the latest job that has filled any of these columns; ``None`` if none has."""
    if not has_record(conn):
        return None
    wanted = {name.lower() for name in columns}
    found = conn.execute(
        f'select job, "columns" from {RUNS_TABLE} where "table" = ? and job is not null order by id desc',
        (table,),
    )
    for job, noted in found:
        if wanted & {name.lower() for name in json.loads(noted)}:
            return int(job)
    return None


def smaller_runs(conn: sqlite3.Connection, job: int, columns: Sequence[str]) -> dict[int, list[str]]:
    """Return the runs of a job that did not fill all of these columns, and which of them each lacks."""
    lacking = {}
    for run, noted in conn.execute(f'select id, "columns" from {RUNS_TABLE} where job = ?', (job,)):
        filled = {name.lower() for name in json.loads(noted)}
        if missing := [name for name in columns if name.lower() not in filled]:
            lacking[int(run)] = missing
    return lacking


def add_numbers(conn: sqlite3.Connection, run: RunId, numbers: RunNumbers) -> None:
    """Add what a transaction does to the run's row, in that transaction."""
    changes = {
        each.name: getattr(numbers, each.name) for each in fields(numbers) if getattr(numbers, each.name)
    }
    if changes:
        sets = ", ".join(f'"{name}" = coalesce("{name}", 0) + ?' for name in changes)
        conn.execute(f"update {RUNS_TABLE} set {sets} where id = ?", [*changes.values(), run.run])


def end_run(
    conn: sqlite3.Connection,
    run: int,
    outcome: str,
    *,
    cost: float | None = None,
    skipped: int = 0,
    failures: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Record how a run ended: ``done``, or why it was stopped."""
    conn.execute(
        f"update {RUNS_TABLE} set ended = ?, outcome = ?, cost = ?, skipped = ?, failures = ? where id = ?",
        (
            _moment(time.time()),
            outcome,
            cost,
            skipped,
            json.dumps(list(failures), ensure_ascii=False, default=str),
            run,
        ),
    )


def list_runs(
    conn: sqlite3.Connection, *, table: str | None = None, run: int | None = None, limit: int = -1
) -> list[dict[str, Any]]:
    """Return the recorded runs, latest first, with their JSON columns read.

    Args:
        limit: how many at most; less than 0 is all.
    """
    if not has_record(conn):
        return []
    conditions = ['"table" = ?'] if table is not None else []
    conditions += ["id = ?"] if run is not None else []
    where = f"where {' and '.join(conditions)}" if conditions else ""
    parameters = [value for value in (table, run) if value is not None]
    cursor = conn.execute(
        f"select * from {RUNS_TABLE} {where} order by id desc limit ?", [*parameters, limit]
    )
    names = [column[0] for column in cursor.description]
    return [_read(dict(zip(names, tuple(record), strict=True))) for record in cursor]


_JSON_COLUMNS = ("columns", "options", "schema", "spec", "versions", "failures")


def _read(values: dict[str, Any]) -> dict[str, Any]:
    for name in _JSON_COLUMNS:
        if isinstance(values.get(name), str):
            values[name] = json.loads(values[name])
    return values


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _storable(value: Any) -> Any:
    # A lone surrogate in a prompt or a system prompt cannot be stored as UTF-8.
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

"""The tables of the record: made when the first run begins, brought up to date, and cleaned up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

RUNS_TABLE = "_llm_runs"
ANSWERS_TABLE = "_llm_answers"
QUESTION_INDEX = "_llm_answers_question"

#: Name and declaration of each column of `RUNS_TABLE`: one that a database lacks is added.
RUN_COLUMNS = {
    "id": "integer primary key",
    "job": "integer",  # the first run on these columns; null once table or columns are gone
    "table": "text not null default ''",
    "columns": "text not null default '[]'",
    "started": "text not null default ''",
    "ended": "text",
    "by": "text",
    "model": "text",
    "options": "text",
    "prompt": "text",
    "system": "text",
    "schema": "text",
    "spec": "text",  # what else was asked, as JSON
    "versions": "text",
    "written": "integer not null default 0",
    "reused": "integer not null default 0",
    "no_value": "integer not null default 0",
    "failed": "integer not null default 0",
    "skipped": "integer not null default 0",
    "input_tokens": "integer not null default 0",
    "output_tokens": "integer not null default 0",
    "cost": "real",
    "outcome": "text",
    "failures": "text",
}

# About 60 bytes for each value, its part of the index included. The index holds four bytes of the question:
# enough to tell a billion questions apart nearly always, and the whole one is compared all the same.
_ANSWERS = f"""
create table if not exists {ANSWERS_TABLE} (
    job integer not null,
    pk not null,
    run integer not null,
    question blob not null,
    input_tokens integer,
    output_tokens integer,
    seconds integer not null,
    no_value integer not null default 0,
    primary key (job, pk)
) without rowid
"""
_INDEX = f"""
create index if not exists {QUESTION_INDEX} on {ANSWERS_TABLE} (job, substr(question, 1, 4))
"""


def make_tables(conn: sqlite3.Connection) -> None:
    """Make the tables, or add the columns that an older version did not have."""
    declared = ", ".join(f'"{name}" {declaration}' for name, declaration in RUN_COLUMNS.items())
    conn.execute(f"create table if not exists {RUNS_TABLE} ({declared})")
    there = {row[1] for row in conn.execute(f"pragma table_info({RUNS_TABLE})")}
    for name, declaration in RUN_COLUMNS.items():
        if name not in there:
            conn.execute(f'alter table {RUNS_TABLE} add column "{name}" {declaration}')
    conn.execute(_ANSWERS)
    conn.execute(_INDEX)


def has_record(conn: sqlite3.Connection) -> bool:
    """Say whether any run has been recorded in this database."""
    sql = "select count(*) from sqlite_master where type = 'table' and name in (?, ?)"
    return bool(conn.execute(sql, (RUNS_TABLE, ANSWERS_TABLE)).fetchone()[0] == 2)


def forget_what_is_gone(conn: sqlite3.Connection) -> None:
    """Forget the answers of tables and columns that are no longer there.

    The runs stay as history. They belong to no job any more, so that a new table or column of the same name
    does not inherit their answers.
    """
    jobs = conn.execute(
        f'select job, "table", "columns", max(id) from {RUNS_TABLE} where job is not null group by job'
    ).fetchall()
    for job, table, columns, _ in jobs:
        there = {str(row[1]).lower() for row in conn.execute("select * from pragma_table_info(?)", (table,))}
        if not any(name.lower() in there for name in json.loads(columns)):
            conn.execute(f"delete from {ANSWERS_TABLE} where job = ?", (job,))
            conn.execute(f"update {RUNS_TABLE} set job = null where job = ?", (job,))

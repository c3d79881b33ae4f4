"""A row's page: which model gave each of its values, when, and in which run."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ...enrich.database import read
from ...enrich.errors import EnrichError
from ...enrich.reading.table import read_table
from ...enrich.record.keys import noted_key
from ...enrich.record.tables import ANSWERS_TABLE, RUNS_TABLE, has_record
from .paths import job_path

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping


async def answers_of(datasette: Any, database: str, table: str, row: Mapping[str, Any]) -> Markup | None:
    """Return HTML about the values of a row that models gave, or ``None`` if there are none."""
    db = datasette.get_database(database)
    try:
        found = await read(db, partial(_find, table=table, row=row))
    except EnrichError:  # A view, say: nothing about it is on record.
        return None
    if not found:
        return None
    for each in found:
        each["path"] = job_path(datasette, database, each["run"])
    return Markup(await datasette.render_template("_llm_row.html", {"answers": found}))


def _find(conn: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not has_record(conn):
        return []
    sql = f"""
        select runs.id, runs."columns", runs.model,
            cast(strftime('%s', runs.started) as integer) + answers.seconds
        from {ANSWERS_TABLE} as answers join {RUNS_TABLE} as runs on runs.id = answers.run
        where answers.job = ? and answers.pk = ?
    """
    jobs = conn.execute(
        f'select distinct job from {RUNS_TABLE} where "table" = ? and job is not null', (table,)
    ).fetchall()
    if not jobs:
        return []
    key = noted_key([row[name] for name in read_table(conn, table).key_names])
    found = []
    for (job,) in jobs:
        for run, columns, model, moment in conn.execute(sql, (job, key)):
            when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
            found.append({"run": run, "columns": json.loads(columns), "model": model, "when": when})
    return found

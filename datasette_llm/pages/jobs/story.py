"""What there is to tell of a run, live or on record: as data for JSON, and in words for a page."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from datasette.utils import tilde_encode

from ...enrich.database import read
from ...enrich.record.batches import batches_of_runs
from ...enrich.record.failures import ERRORS_TABLE, has_errors_table, key_from_stored
from ...enrich.record.runs import list_runs
from ...enrich.telling.stopped import STOPPED, clock_time
from ...enrich.telling.words import dollars, duration
from ...enrich.writing.lock import is_held
from . import live as jobs
from .batches import in_data, is_with_provider, summary
from .batches import in_words as batches_in_words
from .chart import draw

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from ...enrich.sql import SQLValue
    from .live import LiveJob

#: A list shows the latest ones.
LISTED = 100
#: Rows that failed, where it is not known any more how.
SHOWN_FAILURES = 20
TEXT_CHARACTERS = 200
#: Facets of more columns take long, and the page with them.
FACETS = 3

STATES = {
    "running": "Running",
    "paused": "Paused",
    "stopping": "Stopping: prompts in flight are completed",
    "elsewhere": "Running in another process",
    "submitted": "With the provider: not all batches are collected",
    "interrupted": "Interrupted: its process ended in the middle of it. What was answered is written",
    "done": "Done",
    "stopped": "Stopped early",
}


async def list_jobs(datasette: Any, database: Any) -> list[dict[str, Any]]:
    """Return the latest runs of a database."""
    return [tell(datasette, database, run) for run in await _read(database, limit=LISTED)]


async def find_run(database: Any, number: int) -> dict[str, Any] | None:
    """Return what is on record of a run."""
    found = await _read(database, run=number)
    return found[0] if found else None


async def _read(database: Any, **which: Any) -> list[dict[str, Any]]:
    """Return runs as they are on record."""
    runs = await read(database, partial(_find, **which))
    if any(_is_interrupted(database, run) for run in runs):
        # Or it has ended since: its end is on record before it lets go of its columns.
        runs = await read(database, partial(_find, **which))
    # Now: it may end while whoever asked is still being looked at.
    return [{**run, "interrupted": _is_interrupted(database, run)} for run in runs]


def _is_interrupted(database: Any, run: dict[str, Any]) -> bool:
    # Whoever fills a column holds its lock, which ends with the process: what nobody holds was interrupted.
    return run["ended"] is None and not is_held(database, run["table"], run["columns"])


def _find(conn: sqlite3.Connection, **which: Any) -> list[dict[str, Any]]:
    """Return runs as they are on record, each with its batches."""
    runs = list_runs(conn, **which)
    batches = batches_of_runs(conn, [run["id"] for run in runs])
    return [{**run, "batches": batches.get(run["id"], [])} for run in runs]


def tell(datasette: Any, database: Any, run: dict[str, Any]) -> dict[str, Any]:
    """Return what there is to tell of a run, as data.

    Args:
        run: as it is on record.
    """
    live = jobs.find(datasette, database.name, run["id"])
    state = _state(database, run, live)
    names = ("id", "table", "columns", "model", "by", "started", "ended", "written", "failed", "skipped")
    told = {name: run[name] for name in names} | {
        "state": state,
        "state_in_words": STATES[state],
        "why": STOPPED.get(run["outcome"], run["outcome"]) if state == "stopped" else None,
        "total": None,
        "done": run["written"] + run["failed"] + run["skipped"],
        "running": 0,
        "rows_per_second": None,
        "seconds_left": None,
        "waiting": None,
        "retries": None,
        "elapsed": None,
        "input_tokens": run["input_tokens"],
        "output_tokens": run["output_tokens"],
        "cost": run["cost"],
        "error": None,
        "failures": run["failures"] or [],
        "batches": in_data(run["batches"]),
        "batches_in_words": summary(run["batches"]),
    }
    return told if live is None else told | _of_live(live)


def _state(database: Any, run: dict[str, Any], live: LiveJob | None) -> str:
    if live is not None and live.state != "ended":
        return live.state
    if live is not None and run["ended"] is None and not run["interrupted"]:
        return "stopping"  # It has ended since its record was read.
    if run["ended"] is not None:
        if is_with_provider(run["batches"]):
            return "submitted"
        return "done" if run["outcome"] == "done" else "stopped"
    return "interrupted" if run["interrupted"] else "elsewhere"


def _of_live(live: LiveJob) -> dict[str, Any]:
    progress, report = live.progress, live.report
    told: dict[str, Any] = {
        "total": progress.total,
        "done": progress.done,
        "written": progress.written,
        "failed": progress.failed,
        "skipped": progress.skipped,
        "retries": progress.retries,
        "elapsed": round(progress.elapsed, 1),
        "input_tokens": progress.input_tokens,
        "output_tokens": progress.output_tokens,
        "cost": progress.cost,
        "error": live.error,
    }
    if report is not None:
        return told | {"rows_per_second": round(report.rows_per_second, 1), "why": _why(live)}
    rate = 0.0 if live.state == "paused" else live.history.rate or progress.rows_per_second
    left = None
    if progress.total is not None and progress.rows_per_second and live.state == "running":
        left = max(0.0, (progress.total - progress.done) / progress.rows_per_second)
    waiting = progress.waiting
    if progress.quota_seconds is not None:
        waiting = f"the quota is used up until {clock_time(progress.quota_seconds)}"
    return told | {
        "running": progress.running,
        "rows_per_second": round(rate, 1),
        "seconds_left": None if left is None else round(left),
        "waiting": waiting,
    }


def _why(live: LiveJob) -> str | None:
    report = live.report
    if report is None or report.stopped is None:
        return None
    return ": ".join(filter(None, (report.why_stopped, report.refusal or report.trouble)))


def in_words(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures of a run for people: what they are, and how much."""
    figures = [("Rows done", _of(told["done"], told["total"]))]
    figures += [("Written", f"{told['written']:,}"), ("Failed", f"{told['failed']:,}")]
    if told["skipped"]:
        figures.append(("Nothing to ask", f"{told['skipped']:,}"))
    if told["running"]:
        figures.append(("Being asked now", f"{told['running']:,}"))
    if told["rows_per_second"] is not None:
        figures.append(("Rows a second", f"{told['rows_per_second']:,.1f}"))
    if told["seconds_left"] is not None:
        figures.append(("Time left", duration(told["seconds_left"]) if told["seconds_left"] else "moments"))
    if told["elapsed"] is not None:
        figures.append(("Time taken", duration(told["elapsed"])))
    figures.append(("Tokens", f"{told['input_tokens']:,} in, {told['output_tokens']:,} out"))
    if told["cost"] is not None:
        figures.append(("Cost", dollars(told["cost"])))
    elif told["state"] not in ("interrupted", "elsewhere"):  # It is on record when a run has ended.
        figures.append(("Cost", "no price known"))
    if told["retries"]:
        figures.append(("Tried again", f"{told['retries']:,}"))
    return figures


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,} of {total:,}"


async def page_of(datasette: Any, database: Any, run: dict[str, Any]) -> dict[str, Any]:
    """Return what the page of a run shows."""
    told = tell(datasette, database, run)
    live = jobs.find(datasette, database.name, run["id"])
    table = run["table"]
    failures = [
        {**failure, "rows": [_row(datasette, database, table, key) for key in failure.get("rows", ())]}
        for failure in told["failures"]
    ]
    latest = list(live.latest) if live is not None else []
    is_there = await database.table_exists(table)
    return {
        "job": told,
        "figures": in_words(told),
        "percent": _percent(told),
        "chart": draw(live.history) if live is not None else None,
        "latest": [
            {
                "row": _row(datasette, database, table, each.key),
                "text": _cut(each.text),
                "failed": each.failed,
            }
            for each in reversed(latest)
        ],
        "failures": failures,
        "batches": batches_in_words(datasette, database.name, run),
        "failed_rows": []
        if failures or not is_there or not told["failed"]
        else await _failed_rows(datasette, database, run),
        "is_under_way": told["state"] in ("running", "paused", "stopping"),
        "result": result_path(datasette, database, run) if told["written"] and is_there else None,
        "has_table": is_there,
    }


def _percent(told: dict[str, Any]) -> int | None:
    if told["state"] == "done":
        return 100
    return None if not told["total"] else min(100, int(100 * told["done"] / told["total"]))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARACTERS else text[:TEXT_CHARACTERS] + "..."


def _row(datasette: Any, database: Any, table: str, key: Sequence[SQLValue]) -> dict[str, str]:
    path = ",".join(tilde_encode(str(value)) for value in key)
    return {
        "name": ", ".join(str(value) for value in key),
        "path": f"{datasette.urls.table(database.name, table)}/{path}",
    }


def result_path(datasette: Any, database: Any, run: dict[str, Any]) -> str:
    """Return the table's page with the rows that have values, sorted and faceted by the new columns."""
    columns = run["columns"]
    arguments = [(f"{columns[0]}__notnull", "1"), ("_sort", columns[0])]
    arguments += [("_facet", column) for column in columns[:FACETS]]
    return f"{datasette.urls.table(database.name, run['table'])}?{urlencode(arguments)}"


async def _failed_rows(datasette: Any, database: Any, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rows that failed, from their own records: those of a run that never came to its end."""

    def find(conn: sqlite3.Connection) -> tuple[list[tuple[Any, str]], int]:
        if not has_errors_table(conn):
            return [], 0
        keys = conn.execute("select count(*) from pragma_table_info(?) where pk", (run["table"],)).fetchone()
        sql = (
            f'select pk, error from {ERRORS_TABLE} where "table" = ? and "column" in (?, ?) and "when" >= ?'
            f" limit {SHOWN_FAILURES}"
        )
        label = ", ".join(run["columns"])
        found = conn.execute(sql, (run["table"], run["columns"][0], label, run["started"]))
        return [(pk, error) for pk, error in found], keys[0] or 1

    records, width = await read(database, find)
    shown = []
    for pk, error in records:
        key = key_from_stored(pk, width)
        if key is not None:
            row = _row(datasette, database, run["table"], key)
            shown.append({"row": row, "text": _cut(error)})
    return shown


def asked_in_words(run: dict[str, Any], words: str = "") -> list[tuple[str, str]]:
    """Return what a run was asked to do, for people."""
    spec = run["spec"] or {}
    asked = [("Prompt", run["prompt"]), ("System prompt", run["system"])]
    schema = spec.get("schema") or (json.dumps(run["schema"], ensure_ascii=False) if run["schema"] else "")
    asked.append(("Schema", schema))
    options = run["options"] or {}
    asked.append(("Options", "\n".join(f"{name} {value}" for name, value in options.items())))
    asked.append(("Only rows where", words or spec.get("where")))
    limit = spec.get("limit")
    asked.append(("At most", f"{limit:,} row{'' if limit == 1 else 's'}" if limit else ""))
    kinds = {"retry_failed": "rows that failed before", "stale": "rows whose question has changed"}
    asked += [("Only", words) for name, words in kinds.items() if spec.get(name)]
    asked.append(("Answered", "in batches, at their price" if spec.get("batch") else ""))
    return [(name, text) for name, text in asked if text]

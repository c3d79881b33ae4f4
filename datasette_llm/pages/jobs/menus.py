"""What the menus of Datasette's own pages offer of jobs."""

from __future__ import annotations

from typing import Any

from ...enrich.reading.table import OWN_PREFIX
from ...enrich.record.tables import RUNS_TABLE
from . import is_possible
from .filters import query_about_rows
from .loading import load_form_soon
from .paths import form_path, jobs_path
from .rights import may_start


async def of_table(
    datasette: Any, actor: dict[str, Any] | None, database: str, table: str, request: Any
) -> list[dict[str, str]]:
    """Return the way to a job about the rows that a table's page shows."""
    if not is_possible(datasette) or table.startswith(OWN_PREFIX):
        return []
    if await may_start(datasette, actor, database, table) is None:
        return []
    load_form_soon(datasette)
    query = query_about_rows(request.query_string or "") if request is not None else ""
    path = form_path(datasette, database, table)
    return [
        {
            "href": path + (f"?{query}" if query else ""),
            "label": "Ask a language model about these rows" if query else "Ask a language model about rows",
            "description": "Answers to a prompt made from each row fill columns of it",
        }
    ]


async def of_database(datasette: Any, actor: dict[str, Any] | None, database: str) -> list[dict[str, str]]:
    """Return the way to the jobs of a database, if there have been any."""
    if not await datasette.get_database(database).table_exists(RUNS_TABLE):
        return []
    return [
        {
            "href": jobs_path(datasette, database),
            "label": "Jobs of language models",
            "description": "What filled columns of these tables, and how it went",
        }
    ]

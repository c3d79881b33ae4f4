"""Where the pages of jobs are."""

from __future__ import annotations

from typing import Any

from datasette.utils import tilde_decode, tilde_encode
from datasette.utils.asgi import NotFound


def database_at(datasette: Any, request: Any) -> Any:
    """Return the database that an address names.

    Raises:
        NotFound: there is none.
    """
    try:
        return datasette.get_database(route=tilde_decode(request.url_vars["database"]))
    except KeyError:
        raise NotFound("There is no such database") from None


def jobs_path(datasette: Any, database: str) -> str:
    """Return the path of the list of a database's jobs."""
    return f"{datasette.urls.database(database)}/-/llm/jobs"


def job_path(datasette: Any, database: str, number: int) -> str:
    """Return the path of a job's page."""
    return f"{jobs_path(datasette, database)}/{number}"


def form_path(datasette: Any, database: str, table: str) -> str:
    """Return the path of the form that starts a job."""
    return f"{datasette.urls.database(database)}/-/llm/enrich/{tilde_encode(table)}"

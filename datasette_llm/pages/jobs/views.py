"""The pages of jobs that there are: a list, one job, and what can be done with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.utils.asgi import NotFound, Response

from ...enrich.errors import EnrichError
from ...errors import ModelNotFoundError
from ...secrecy import redacted
from . import is_possible, live
from .again import spec_again
from .loading import load_form_soon
from .paths import database_at, form_path, job_path
from .rights import check_may_see, check_may_start, may_see, may_start
from .story import asked_in_words, find_run, list_jobs, page_of, tell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .again import Again

_PRIVATE = {"cache-control": "private, no-store"}


async def list_page(datasette: Any, request: Any) -> Any:
    """Answer with the latest jobs of a database that this actor may see."""
    database = database_at(datasette, request)
    seen: dict[str, bool] = {}
    shown = []
    for job in await list_jobs(datasette, database):
        table = job["table"]
        if table not in seen:
            seen[table] = await may_see(datasette, request.actor, database.name, table)
        if seen[table]:
            shown.append(job)
    if request.url_vars.get("json"):
        return Response.json({"ok": True, "jobs": shown}, headers=_PRIVATE)
    for job in shown:
        job["path"] = job_path(datasette, database.name, job["id"])
    page = await datasette.render_template(
        "llm_jobs.html", {"database": database.name, "jobs": shown}, request=request
    )
    return Response.html(page, headers=_PRIVATE)


async def job_page(datasette: Any, request: Any) -> Any:
    """Answer with one job."""
    database, run = await seen_run(datasette, request)
    if request.url_vars.get("json"):
        told = tell(datasette, database, run)
        return Response.json({"ok": True, **told}, headers=_PRIVATE)
    return await _page(datasette, request, database, run)


async def act(datasette: Any, request: Any) -> Any:
    """Pause a job, have it go on, end it, or start it again."""
    database, run = await seen_run(datasette, request)
    if request.method != "POST":
        return Response.text("Send the form of the job's page", status=405, headers={"allow": "POST"})
    visitor = await check_may_start(datasette, request.actor, database.name, run["table"])
    action: Any = request.url_vars["action"]
    number = run["id"]
    if action in ("pause", "resume", "cancel"):
        job = live.find(datasette, database.name, number)
        if job is not None:
            {"pause": job.pause, "resume": job.go_on, "cancel": job.stop}[action]()
        return Response.redirect(job_path(datasette, database.name, number))
    columns = await database.table_columns(run["table"])
    if not set(run["columns"]) <= set(columns) and not visitor.may_add_columns:
        return await _page(datasette, request, database, run, "You may not add columns to this table.", 403)
    return await _again(datasette, request, database, run, action)


async def _again(datasette: Any, request: Any, database: Any, run: Mapping[str, Any], how: Again) -> Any:
    try:
        spec = await spec_again(database, run, how, request.actor)
        job = await live.start(datasette, spec)
    except (EnrichError, ModelNotFoundError) as error:
        return await _page(datasette, request, database, run, redacted(str(error)), 400)
    if job.number is not None:
        return Response.redirect(job_path(datasette, database.name, job.number))
    if job.error is not None:
        return await _page(datasette, request, database, run, job.error, 400)
    return await _page(datasette, request, database, run, "No row is waiting: nothing was sent.", 200)


async def _page(
    datasette: Any, request: Any, database: Any, run: Any, message: str | None = None, status: int = 200
) -> Any:
    table = run["table"]
    may = await may_start(datasette, request.actor, database.name, table) is not None
    if may:
        load_form_soon(datasette)
    base = job_path(datasette, database.name, run["id"])
    context = {
        "database": database.name,
        "table": table,
        "base": base,
        "message": message,
        "asked": asked_in_words(run),
        "may_act": may and is_possible(datasette),
        "again": f"{form_path(datasette, database.name, table)}?_run={run['id']}",
        **await page_of(datasette, database, run),
    }
    page = await datasette.render_template("llm_job.html", context, request=request)
    return Response.html(page, status=status, headers=_PRIVATE)


async def seen_run(datasette: Any, request: Any) -> tuple[Any, dict[str, Any]]:
    """Return the run that an address names, and its database.

    Raises:
        NotFound: there is none, or no such database.
        Forbidden: this actor may not see it.
    """
    database = database_at(datasette, request)
    run = await find_run(database, int(request.url_vars["number"]))
    if run is None:
        raise NotFound("No such job is on record")
    await check_may_see(datasette, request.actor, database.name, run["table"])
    return database, run

"""Who may see and start it: our checks in front of datasette-enrichments' own pages.

Those ask for the permission ``enrichments`` on the database. Here somebody also needs ``update-row`` on
the table: without it they are not offered this enrichment, and cannot open, start, pause, resume or
cancel a job of it, by whatever address. ``alter-table`` is needed to have columns added.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from datasette.resources import DatabaseResource
from datasette.utils import tilde_decode
from datasette.utils.asgi import Forbidden
from datasette_enrichments import views

from . import SLUG
from .visitor import current_visitor, find_visitor, visited_by

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .enrichment import PromptEnrichment
    from .visitor import Visitor

_TABLE = r"^/-/enrich/(?P<database>[^/]+)/(?P<table>[^/]+)"
_JOB = r"^/-/enrich/(?P<database>[^/]+)/-/jobs/(?P<job_id>[0-9]+)"

_JOB_VIEWS: dict[str, Callable[[Any, Any], Awaitable[Any]]] = {
    "": views.job_view,
    "/pause": views.pause_job_view,
    "/resume": views.resume_job_view,
    "/cancel": views.cancel_job_view,
}


@functools.cache
def _enrichment() -> PromptEnrichment:
    # Imported when somebody opens a page about it: routes are asked for at the start of every server.
    from .enrichment import PromptEnrichment

    return PromptEnrichment()


def enrichments() -> list[PromptEnrichment]:
    """Return what there is to offer to the current visitor."""
    return [_enrichment()] if current_visitor().may_edit else []


def routes() -> list[tuple[str, Callable[..., Awaitable[Any]]]]:
    """Return the routes that must come before datasette-enrichments' own."""
    pages: list[tuple[str, Callable[..., Awaitable[Any]]]] = [
        (_TABLE + "$", _picker),
        (f"{_TABLE}/(?P<enrichment>{SLUG})$", _form),
    ]
    return pages + [(_JOB + action + "$", _job_page(view)) for action, view in _JOB_VIEWS.items()]


async def _picker(datasette: Any, request: Any) -> Any:
    with visited_by(await _visitor(datasette, request, _table(request))):
        return await views.enrichment_picker(datasette, request)


async def _form(datasette: Any, request: Any) -> Any:
    visitor = await _visitor(datasette, request, _table(request))
    await _check(datasette, request, visitor)
    with visited_by(visitor):
        return await views.enrichment_view(datasette, request)


def _job_page(view: Callable[[Any, Any], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def checked(datasette: Any, request: Any) -> Any:
        table = await _table_of_job(datasette, request)
        if table is not None:
            await _check(datasette, request, await _visitor(datasette, request, table))
        return await view(datasette, request)

    return checked


def _table(request: Any) -> str:
    table: str = tilde_decode(request.url_vars["table"])
    return table


async def _table_of_job(datasette: Any, request: Any) -> str | None:
    """Return the table that a job of ours is about; other jobs are not our business."""
    db = datasette.get_database(tilde_decode(request.url_vars["database"]))
    if not await db.table_exists("_enrichment_jobs"):
        return None
    sql = "select table_name from _enrichment_jobs where id = ? and enrichment = ?"
    found = (await db.execute(sql, [request.url_vars["job_id"], SLUG])).first()
    return found[0] if found else None


async def _visitor(datasette: Any, request: Any, table: str) -> Visitor:
    return await find_visitor(datasette, request.actor, tilde_decode(request.url_vars["database"]), table)


async def _check(datasette: Any, request: Any, visitor: Visitor) -> None:
    database = tilde_decode(request.url_vars["database"])
    may_enrich = await datasette.allowed(
        action="enrichments", resource=DatabaseResource(database), actor=request.actor
    )
    if not may_enrich or not visitor.may_edit:
        raise Forbidden("Enriching this table takes the permissions enrichments and update-row")

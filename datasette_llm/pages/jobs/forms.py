"""The page of the form: opened, sent to see first, to try a few rows, or to run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasette.utils import tilde_decode
from datasette.utils.asgi import BadRequest, NotFound, Response

from ...enrich.database import find_database
from ...enrich.errors import EnrichError, EnrichInputError
from ...enrich.estimate import estimate_job
from ...enrich.job import EnrichJob
from ...enrich.trial import try_rows
from ...errors import ModelNotFoundError
from ...secrecy import redacted
from . import is_possible, live
from .again import spec_of
from .counting import rows_in_words
from .filters import Filtered, check_filtered, query_about_rows, read_filters
from .form import check, open_form, values_of
from .paths import database_at, form_path, job_path
from .rights import check_may_start
from .story import find_run

if TYPE_CHECKING:
    from ...enrich.spec import JobSpec
    from .form import Form

TRIED_ROWS = 3
#: What a person tries is over by then, or tells why not.
TRY_SECONDS = 120.0


async def form_page(datasette: Any, request: Any) -> Any:
    """Answer with the form; one that is sent, with what came of it."""
    found = database_at(datasette, request)
    database, table = found.name, tilde_decode(request.url_vars["table"])
    visitor = await check_may_start(datasette, request.actor, database, table)
    if not (await found.table_exists(table) or table in await found.view_names()):
        raise NotFound("There is no such table")
    if not is_possible(datasette):
        raise BadRequest(
            "Nothing here can own a job: serve this Datasette with ASGI's lifespan, upgrade it to 1.0a40 or "
            "newer, or use the command"
        )
    filtered, values = await _asked(datasette, request, database, table)
    sent = request.method == "POST"
    if sent:
        values = dict(await request.post_vars())
    try:
        form = await open_form(datasette, request.actor, database, table, values)
        await check_filtered(find_database(datasette, database), form.table, filtered)
    except EnrichInputError as error:
        raise BadRequest(str(error)) from None
    shown: dict[str, Any] = {}
    if sent:
        spec = await check(form, datasette, request.actor, database, filtered.where, visitor)
        if spec is not None:
            try:
                number = await _do(datasette, spec, values.get("action"), shown)
            except (EnrichError, ModelNotFoundError) as error:
                form.errors[""] = redacted(str(error))
            else:
                if number is not None:
                    # To the page of the job, so that going back or reloading starts no second one.
                    return Response.redirect(job_path(datasette, database, number))
    return await _rendered(datasette, request, database, form, filtered, shown)


async def _asked(datasette: Any, request: Any, database: str, table: str) -> tuple[Filtered, dict[str, str]]:
    """Return the rows that the address names, and the form's values: of an earlier run, or none."""
    number = request.args.get("_run")
    if number is None:
        return await read_filters(datasette, request, database, table), {}
    known = re.fullmatch("[0-9]{1,15}", number)
    run = await find_run(datasette.get_database(database), int(number)) if known else None
    if run is None or run["table"] != table:
        raise NotFound(f"No run {number} of this table is on record")
    try:
        spec = spec_of(run, database, request.actor)
    except EnrichInputError as error:
        raise BadRequest(str(error)) from None
    return Filtered(spec.where, spec.where or ""), values_of(spec, run)


async def _do(datasette: Any, spec: JobSpec, action: str | None, shown: dict[str, Any]) -> int | None:
    """Do what a form asks for; returns the number of a run that has begun."""
    import anyio

    if action == "preview":
        shown["preview"] = await EnrichJob(datasette, replace(spec, dry_run=True)).run()
        shown["estimate"] = (await estimate_job(datasette, spec)).line()
    elif action == "try":
        with anyio.move_on_after(TRY_SECONDS) as scope:
            shown["trial"] = await try_rows(datasette, spec, TRIED_ROWS)
        if scope.cancelled_caught:
            raise EnrichInputError(f"No answer to the rows tried came within {TRY_SECONDS:.0f} seconds")
    elif action == "run":
        job = await live.start(datasette, spec)
        if job.error is not None and job.number is None:
            raise EnrichInputError(job.error)
        shown["nothing"] = job.number is None
        return job.number
    return None


async def _rendered(
    datasette: Any, request: Any, database: str, form: Form, filtered: Filtered, shown: dict[str, Any]
) -> Any:
    context = {
        "database": database,
        "table": form.table.name,
        "form": form,
        "rows": await rows_in_words(find_database(datasette, database), form.table, filtered),
        "filtered": filtered,
        # As it came, so that the rows stay the same: of a filter, or of an earlier run.
        "action": form_path(datasette, database, form.table.name)
        + (f"?{request.query_string}" if request.query_string else ""),
        "back": _back(datasette, request, database, form.table.name),
        **shown,
    }
    page = await datasette.render_template("llm_job_form.html", context, request=request)
    status = 400 if form.errors else 200
    return Response.html(page, status=status, headers={"cache-control": "private, no-store"})


def _back(datasette: Any, request: Any, database: str, table: str) -> str:
    query = query_about_rows(request.query_string or "")
    return str(datasette.urls.table(database, table)) + (f"?{query}" if query else "")

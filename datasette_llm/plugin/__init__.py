"""What Datasette calls: hook implementations that hand over to the modules that do the work.

Datasette looks for ``templates/`` and ``static/`` in the package that its entry point names: they are here.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker

from ..access.purposes import ENRICHMENTS
from ..hookspecs import Purpose, plugin_manager

if TYPE_CHECKING:
    import click
    from datasette.app import Datasette

hookimpl = HookimplMarker("datasette")
PLUGIN_NAME = "datasette-llm"

plugin_manager()  # From here on Datasette knows the hooks, before any plugin's implementation is called.


@hookimpl
def startup(datasette: Datasette) -> None:
    """Stop on a wrong configuration; what is less urgent is done when the server is up."""
    if hasattr(datasette, "add_background_task"):  # Datasette 1.0a40 and later
        datasette.add_background_task(_collect_batches, name="datasette-llm: collect batches")
    if datasette.plugin_config(PLUGIN_NAME) is None:
        return
    from ..access.starting import check_now, prepare, warn

    check_now(datasette)
    if hasattr(datasette, "add_background_task"):
        datasette.add_background_task(prepare, name="datasette-llm: prepare for prompts")
    else:
        warn(datasette)


async def _collect_batches(datasette: Datasette) -> None:
    from ..pages.jobs.collecting import keep_collecting

    await keep_collecting(datasette)


@hookimpl(optionalhook=True)  # Datasette 1.0a40 and later
def shutdown(datasette: Datasette) -> Any:
    """Let the prompts that are still running settle, and close the connections."""
    return _end_all(datasette)


async def _end_all(datasette: Datasette) -> None:
    from ..tasks.root import drain

    if "datasette_llm.pages.enrichments.runs" in sys.modules:
        from ..pages.enrichments.runs import end_runs

        await end_runs(datasette)
    if "datasette_llm.pages.jobs.live" in sys.modules:
        from ..pages.jobs.live import end_jobs

        await end_jobs(datasette)
    await drain()


@hookimpl
def asgi_wrapper(datasette: Datasette) -> Any:
    """Let jobs know of pages; and have the lifespan own jobs where Datasette owns no background tasks."""
    from ..backends.pages_first import watching_pages
    from ..pages.jobs.owner import owns_tasks, with_lifespan

    if owns_tasks(datasette):
        return watching_pages
    return lambda app: with_lifespan(datasette, watching_pages(app), partial(_end_all, datasette))


@hookimpl
def register_secrets(datasette: Datasette) -> list[Any]:
    """Offer a secret for each provider of the installed models, and for each key the configuration names."""
    from datasette_secrets import Secret

    from ..access.keys import secret_names

    return [Secret(name, description) for name, description in secret_names(datasette).items()]


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add ``datasette llm``."""
    from ..cli import register

    register(cli)


@hookimpl(trylast=True)
def register_llm_purposes(datasette: Datasette) -> list[Purpose]:
    """Name what our own prompts are for, where a server runs any: in datasette-enrichments' pages."""
    from ..pages.enrichments import is_possible

    return [ENRICHMENTS] if is_possible() else []


@hookimpl
def permission_resources_sql(datasette: Datasette, actor: dict[str, Any] | None, action: str) -> Any:
    """Keep tables that quote from others from those who may not see the others."""
    if action != "view-table":
        return None
    from ..pages.own_tables import hidden_tables

    return hidden_tables(datasette, actor)


@hookimpl(optionalhook=True)  # A hook of datasette-enrichments.
def register_enrichments(datasette: Datasette) -> list[Any]:
    """Offer bulk enrichment in the table's own page."""
    from ..pages.enrichments.versions import outdated

    if outdated():
        return []
    from ..pages.enrichments.routes import enrichments

    return enrichments()


@hookimpl
def register_actions(datasette: Datasette) -> list[Any]:
    """Name the permissions that our pages ask for."""
    from datasette.permissions import Action

    from ..pages.status import PERMISSION

    return [Action(name=PERMISSION, description="See the state of language models, and send a test prompt")]


@hookimpl
def menu_links(datasette: Datasette, actor: dict[str, Any] | None) -> Any:
    """Link the server's state for those who may see it."""
    if actor is None:
        return None

    async def links() -> list[dict[str, str]]:
        from ..pages.status.routes import may_see

        if not await may_see(datasette, actor):
            return []
        return [{"href": datasette.urls.path("/-/llm"), "label": "Language models"}]

    return links


@hookimpl(tryfirst=True)
def register_routes(datasette: Datasette) -> list[Any]:
    """Show the server's state and jobs, and check permissions in front of datasette-enrichments' pages."""
    from ..pages.jobs.routes import routes as jobs
    from ..pages.status.routes import routes as status

    return [*status(), *jobs(), *_routes_before_enrichments()]


def _routes_before_enrichments() -> list[Any]:
    from ..pages.enrichments import is_possible

    if not is_possible():
        return []
    from ..pages.enrichments import versions

    if problem := versions.outdated():
        return versions.routes(problem)
    from ..pages.enrichments.routes import routes

    return routes()


@hookimpl
def table_actions(datasette: Datasette, actor: Any, database: str, table: str, request: Any) -> Any:
    """Offer a job about the rows that a table's page shows."""

    async def links() -> list[dict[str, str]]:
        from ..pages.jobs.menus import of_table

        return await of_table(datasette, actor, database, table, request)

    return links


@hookimpl
def database_actions(datasette: Datasette, actor: Any, database: str) -> Any:
    """Offer the list of a database's jobs, if it has any."""

    async def links() -> list[dict[str, str]]:
        from ..pages.jobs.menus import of_database

        return await of_database(datasette, actor, database)

    return links


@hookimpl
def top_row(datasette: Datasette, database: str, table: str, row: Any) -> Any:
    """Say on a row's page which model gave which value."""

    async def html() -> Any:
        from ..pages.jobs.row import answers_of

        return await answers_of(datasette, database, table, row)

    return html

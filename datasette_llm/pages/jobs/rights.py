"""Who may see jobs of a table, and who may start, pause and end them.

To see one is to see the table. To start one takes what it does: ``update-row``, and ``alter-table`` where it
adds a column; ``enrichments`` too where datasette-enrichments is installed, since that is what guards models
there. A job of a table that is gone is for those who may see the table that the runs are recorded in.
"""

from __future__ import annotations

from typing import Any

from datasette.resources import DatabaseResource, TableResource
from datasette.utils.asgi import Forbidden

from ...enrich.record.tables import RUNS_TABLE
from ..enrichments import is_possible
from ..enrichments.visitor import Visitor, find_visitor


async def may_see(datasette: Any, actor: dict[str, Any] | None, database: str, table: str) -> bool:
    """Say whether somebody may see jobs of a table."""
    if not await datasette.get_database(database).table_exists(table):
        table = RUNS_TABLE
    resource = TableResource(database, table)
    return bool(await datasette.allowed(action="view-table", resource=resource, actor=actor))


async def may_start(
    datasette: Any, actor: dict[str, Any] | None, database: str, table: str
) -> Visitor | None:
    """Return what somebody may do with a table, or ``None`` if they may not start jobs on it."""
    if not datasette.get_database(database).is_mutable:
        return None
    visitor = await find_visitor(datasette, actor, database, table)
    if not visitor.may_edit or not await may_see(datasette, actor, database, table):
        return None
    if is_possible() and not await datasette.allowed(
        action="enrichments", resource=DatabaseResource(database), actor=actor
    ):
        return None
    return visitor


async def check_may_start(datasette: Any, actor: dict[str, Any] | None, database: str, table: str) -> Visitor:
    """Return what somebody may do with a table on which they may start jobs.

    Raises:
        Forbidden: they may not.
    """
    visitor = await may_start(datasette, actor, database, table)
    if visitor is None:
        needed = "update-row and enrichments" if is_possible() else "update-row"
        raise Forbidden(f"A job of a language model on this table takes {needed}")
    return visitor


async def check_may_see(datasette: Any, actor: dict[str, Any] | None, database: str, table: str) -> None:
    """Check that somebody may see jobs of a table.

    Raises:
        Forbidden: they may not.
    """
    if not await may_see(datasette, actor, database, table):
        raise Forbidden("Jobs of a table are for those who may see the table")

"""Who may see the tables that this package keeps in a database: those who may see every other one there.

Such a table (its name begins with ``_llm_``) quotes from the rows of others: an error that quotes an answer,
say. So it is no more visible than any of them, whichever rows it has now and whichever it had of a table
that is gone. Whoever may run SQL of their own on a database can read all of it anyway; Datasette's
``execute-sql`` decides about that.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from datasette.permissions import PermissionSQL

from ..enrich.reading.table import OWN_PREFIX
from ..enrich.record.failures import ERRORS_TABLE

# Finding out what else somebody may see asks the same hook.
_asking: ContextVar[bool] = ContextVar("datasette_llm_asking", default=False)


async def hidden_tables(datasette: Any, actor: dict[str, Any] | None) -> PermissionSQL | None:
    """Return a rule that denies the tables of ours that tell more than this actor may see."""
    if _asking.get():
        return None
    tables: dict[str, set[str]] = {}
    own: dict[str, set[str]] = {}
    for database, name in await _catalog(datasette):
        (own if name.lower().startswith(OWN_PREFIX) else tables).setdefault(database, set()).add(name)
    rules: list[tuple[str, str]] = []
    for database in datasette.databases:
        # It may be newer than the catalog; and a rule about a table that does not exist does no harm.
        names = own.get(database, set()) | {ERRORS_TABLE}
        if not tables.get(database, set()) <= await _visible(datasette, actor, database):
            rules += [(database, name) for name in sorted(names)]
    if not rules:
        return None
    parameters: dict[str, Any] = {}
    selects = []
    for number, (database, name) in enumerate(rules):
        parameters |= {f"llm_parent_{number}": database, f"llm_child_{number}": name}
        selects.append(
            f"select :llm_parent_{number} as parent, :llm_child_{number} as child, 0 as allow, "
            "'it tells of tables that are not visible' as reason"
        )
    return PermissionSQL(sql=" union all ".join(selects), params=parameters)


async def _catalog(datasette: Any) -> list[tuple[str, str]]:
    internal = datasette.get_internal_database()
    # An older Datasette makes its catalog with the first page of its own.
    known: set[str] = set()
    if await internal.table_exists("catalog_databases"):
        listed = await internal.execute("select database_name from catalog_databases")
        known = {row[0] for row in listed.rows}
    if not set(datasette.databases) <= known:
        await datasette.refresh_schemas()  # Nothing is known of a new database yet.
    found = await internal.execute("select database_name, table_name from catalog_tables")
    return [(row[0], row[1]) for row in found.rows]


async def _visible(datasette: Any, actor: dict[str, Any] | None, database: str) -> set[str]:
    token = _asking.set(True)
    try:
        page = await datasette.allowed_resources("view-table", actor, parent=database, limit=1000)
        return {resource.child async for resource in page.all()}
    finally:
        _asking.reset(token)

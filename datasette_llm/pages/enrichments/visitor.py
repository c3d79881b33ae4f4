"""Who is asking for a page: datasette-enrichments does not tell an enrichment."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasette.resources import TableResource

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Visitor:
    """Somebody who asks for a page about a table.

    Attributes:
        actor: as Datasette knows them.
        may_edit: they may change the rows of this table.
        may_add_columns: they may add columns to it.
    """

    actor: dict[str, Any] | None
    may_edit: bool
    may_add_columns: bool


#: Code that starts jobs by itself is trusted, as it is with any other enrichment.
TRUSTED = Visitor(actor=None, may_edit=True, may_add_columns=True)

_visitor: ContextVar[Visitor] = ContextVar("datasette_llm_enrich_visitor", default=TRUSTED)


def current_visitor() -> Visitor:
    """Return who the page is for that is being made right now."""
    return _visitor.get()


@contextmanager
def visited_by(visitor: Visitor) -> Iterator[None]:
    """Make a page for this visitor inside of the block."""
    token = _visitor.set(visitor)
    try:
        yield
    finally:
        _visitor.reset(token)


async def find_visitor(datasette: Any, actor: dict[str, Any] | None, database: str, table: str) -> Visitor:
    """Ask Datasette what somebody may do with a table."""
    resource = TableResource(database, table)

    async def may(action: str) -> bool:
        return bool(await datasette.allowed(action=action, resource=resource, actor=actor))

    return Visitor(actor, may_edit=await may("update-row"), may_add_columns=await may("alter-table"))

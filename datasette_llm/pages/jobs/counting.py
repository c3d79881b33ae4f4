"""How many rows a page has to do with, told at once: counted up to a bound, and not for long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.database import QueryInterrupted

if TYPE_CHECKING:
    from ...enrich.reading.table import Table
    from .filters import Filtered

#: Beyond that it is "more than".
BOUND = 10_000
MILLISECONDS = 100


async def rows_in_words(database: Any, table: Table, filtered: Filtered) -> str:
    """Return how many rows of a table there are, as ``1,204 rows`` or ``more than 10,000 rows``."""
    where = filtered.where or "1"
    sql = f"select count(*) from (select 1 from {table.sql_name} where {where} limit {BOUND + 1})"
    try:
        found = await database.execute(sql, custom_time_limit=MILLISECONDS)
    except QueryInterrupted:
        return "rows that take long to count"
    rows = int(found.rows[0][0])
    if rows > BOUND:
        return f"more than {BOUND:,} rows"
    return "1 row" if rows == 1 else f"{rows:,} rows"

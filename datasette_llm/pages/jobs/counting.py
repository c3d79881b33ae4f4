"""How many rows a page has to do with, told at once: counted up to a bound, and not for long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasette.database import QueryInterrupted
from datasette.utils.sqlite import sqlite3

if TYPE_CHECKING:
    from ...enrich.reading.table import Table
    from .filters import Filtered

#: Beyond that it is "more than".
BOUND = 10_000
MILLISECONDS = 100


async def rows_in_words(database: Any, table: Table, filtered: Filtered) -> str:
    """Return how many rows of a table there are, as ``1,204 rows`` or ``more than 10,000 rows``."""
    # The newline ends an SQL comment of somebody's own condition.
    where = f"({filtered.where}\n)" if filtered.where else "1"
    sql = f"select count(*) from (select 1 from {table.sql_name} where {where} limit {BOUND + 1})"
    try:
        found = await database.execute(sql, custom_time_limit=MILLISECONDS)
    except QueryInterrupted:
        return "rows that take long to count"
    except sqlite3.Error:  # A value that a filter of JSON cannot read: the job will say of which kind.
        return "rows that cannot be counted"
    rows = int(found.rows[0][0])
    if rows > BOUND:
        return f"more than {BOUND:,} rows"
    return "1 row" if rows == 1 else f"{rows:,} rows"

"""Reading the rows of a job from Datasette's database, a page or a stretch at a time."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ..database import read
from .selection import FIRST_PAGE_ROWS, PAGE_ROWS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ..sql import SQLValue
    from ..trouble import Watch
    from .selection import Row, Source


async def read_pages(
    database: Any, source: Source, *, watch: Watch | None = None
) -> AsyncGenerator[list[Row], None]:
    """Yield the rows in the order of their keys, some at a time. Nothing is held open between two pages.

    Raises:
        DatabaseError: the database cannot be read, and ``watch`` has no more patience.
    """
    after: tuple[SQLValue, ...] | None = None
    size = FIRST_PAGE_ROWS
    while True:
        rows, after = await read(database, partial(source.page, after=after, size=size), watch=watch)
        if rows:
            yield rows
        if after is None:
            return
        size = min(size * 3, PAGE_ROWS)


async def first_rows(database: Any, source: Source, size: int) -> list[Row]:
    """Return the first few rows."""
    if size < 1:
        return []
    rows, after = await read(database, partial(source.page, after=None, size=size))
    looked_at = FIRST_PAGE_ROWS
    while len(rows) < size and after is not None:
        # A page may hold fewer rows than there are: those it looked at need not be to do any more.
        more, after = await read(database, partial(source.page, after=after, size=looked_at))
        rows += more
        looked_at = min(looked_at * 3, PAGE_ROWS)
    return rows[:size]


async def count_rows(database: Any, source: Source) -> int:
    """Count the rows that are to do, in steps that are over soon."""
    total = 0
    after: tuple[SQLValue, ...] | None = None
    while True:
        found, after = await read(database, partial(source.count, after=after))
        total += found
        if after is None:
            return total

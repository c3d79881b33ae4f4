"""Reading and writing one of Datasette's databases, patiently.

Datasette's write thread prints whatever is raised there to stderr, so errors come back as values.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio

from datasette_llm.backends.datasette_side import call

from .errors import EnrichError, EnrichInputError
from .reading.table import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# For all the tries together. Longer than a backup of a large file takes, shorter than a night of doing
# nothing.
LOCKED_SECONDS = 120.0
# For one try. A writer that waits for a reader to end keeps new readers out meanwhile: with SQLite's
# usual five seconds one forgotten cursor would keep Datasette's pages waiting that long.
LOCKED_SECONDS_PER_TRY = 0.25
# Between two tries, so that a program that takes the lock often is not the only one that gets it.
LOCKED_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class _Failed:
    error: sqlite3.Error


def find_database(datasette: Any, name: str) -> Any:
    """Return a database that can be written.

    Raises:
        EnrichInputError: there is none of that name, or it is immutable.
    """
    database = datasette.databases.get(name)
    if database is None:
        raise EnrichInputError(f"There is no database {name!r}: {nearest(name, datasette.databases)}")
    if not database.is_mutable and database.path is not None:
        raise EnrichInputError(f"The database {name!r} is immutable: answers cannot be written to it")
    return database


async def read(database: Any, function: Callable[[sqlite3.Connection], T]) -> T:
    """Run ``function`` on a read connection, without Datasette's time limit for queries.

    A locked database is waited for.

    Raises:
        EnrichError: it stayed locked, or SQLite refuses.
    """
    began = anyio.current_time()
    while True:
        try:
            return cast("T", await call(database.execute_fn, function))
        except sqlite3.Error as error:
            if not is_locked(error):
                raise EnrichError(f"The database {database.name!r} cannot be read: {error}") from error
        await _wait_for_lock(database, began, LOCKED_SECONDS)


async def recover(database: Any) -> None:
    """Have SQLite undo what a killed program left half written: only a connection that may write can."""
    await write(database, lambda conn: conn.execute("select count(*) from sqlite_master").fetchone())


async def write(
    database: Any, function: Callable[[sqlite3.Connection], T], *, patience_seconds: float = LOCKED_SECONDS
) -> T:
    """Run ``function`` on the write connection; it begins and ends its own transaction.

    A locked database is waited for, in short tries. A try that has begun is never cancelled, since the
    write thread would finish it all the same; the waits in between can be, and then nothing was written.

    Raises:
        EnrichError: it stayed locked, or SQLite refuses.
    """

    def attempt(conn: sqlite3.Connection) -> T | _Failed:
        usual = conn.execute("pragma busy_timeout").fetchone()[0]
        conn.execute(f"pragma busy_timeout = {int(LOCKED_SECONDS_PER_TRY * 1000)}")
        try:
            return function(conn)
        except sqlite3.Error as error:
            if conn.in_transaction:
                conn.rollback()
            return _Failed(error)
        finally:
            conn.execute(f"pragma busy_timeout = {usual}")

    began = anyio.current_time()
    while True:
        with anyio.CancelScope(shield=True):
            outcome = await call(database.execute_write_fn, attempt, transaction=False)
        if not isinstance(outcome, _Failed):
            return cast("T", outcome)
        if not is_locked(outcome.error):
            raise EnrichError(f"The database {database.name!r} cannot be written: {outcome.error}")
        await _wait_for_lock(database, began, patience_seconds)


def is_locked(error: Exception) -> bool:
    """Say whether SQLite gave up because another connection holds a lock."""
    text = str(error)
    return isinstance(error, sqlite3.OperationalError) and ("locked" in text or "busy" in text)


async def _wait_for_lock(database: Any, began: float, patience_seconds: float) -> None:
    waited = anyio.current_time() - began
    if waited >= patience_seconds:
        raise EnrichError(
            f"Another program has kept the database {database.name!r} locked for {waited:.0f} seconds: "
            "close what holds it and run this again"
        )
    await anyio.sleep(LOCKED_PAUSE_SECONDS)

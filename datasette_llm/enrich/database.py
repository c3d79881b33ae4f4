"""Reading and writing one of Datasette's databases, patiently.

Datasette's write thread prints whatever is raised there to stderr, so errors come back as values.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import anyio

from datasette_llm.backends.datasette_side import call

from .errors import DatabaseError, EnrichInputError
from .telling.words import nearest
from .trouble import Watch, is_locked, trouble_of

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# For all the tries together. Longer than a backup of a large file takes, shorter than a night of doing
# nothing.
LOCKED_SECONDS = 60.0
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


async def read(
    database: Any, function: Callable[[sqlite3.Connection], T], *, watch: Watch | None = None
) -> T:
    """Run ``function`` on a read connection, without Datasette's time limit for queries.

    Trouble that may pass is waited for, as long as ``watch`` says.

    Raises:
        DatabaseError: it did not pass, or SQLite refuses.
    """
    watch = watch or Watch(LOCKED_SECONDS)
    while True:
        try:
            value = cast("T", await call(database.execute_fn, function))
        except sqlite3.Error as error:
            trouble = trouble_of(error, database)
            if trouble is None:
                raise DatabaseError(f"The database {database.name!r} cannot be read: {error}") from error
            watch.begin(trouble)
            if watch.is_over:
                raise _gave_up(database, error, watch) from error
        else:
            watch.end()
            return value
        await anyio.sleep(LOCKED_PAUSE_SECONDS)


async def recover(database: Any, *, patience_seconds: float | None = None) -> None:
    """Have SQLite undo what a killed program left half written: only a connection that may write can."""

    def look(conn: sqlite3.Connection) -> None:
        conn.execute("select count(*) from sqlite_master").fetchone()

    await write(database, look, patience_seconds=patience_seconds)


async def write(
    database: Any, function: Callable[[sqlite3.Connection], T], *, patience_seconds: float | None = None
) -> T:
    """Run ``function`` on the write connection; it begins and ends its own transaction.

    A locked database is waited for (`LOCKED_SECONDS` by default), in short tries. The waits in between can
    be cancelled, and then nothing was written.

    Raises:
        DatabaseError: it stayed locked, or SQLite refuses.
    """
    watch = Watch(LOCKED_SECONDS if patience_seconds is None else patience_seconds)
    while True:
        outcome = await _try_to_write(database, function)
        if not isinstance(outcome, _Failed):
            return outcome
        if not is_locked(outcome.error):
            raise _refused(database, outcome.error)
        watch.begin("")
        if watch.is_over:
            raise _gave_up(database, outcome.error, watch)
        await anyio.sleep(LOCKED_PAUSE_SECONDS)


async def write_once(database: Any, function: Callable[[sqlite3.Connection], T]) -> T:
    """Run ``function`` on the write connection, as `write` does, in one short try.

    Raises:
        DatabaseError: SQLite refuses; its ``trouble`` says what that is, if it may pass.
    """
    outcome = await _try_to_write(database, function)
    if isinstance(outcome, _Failed):
        raise _refused(database, outcome.error)
    return outcome


async def _try_to_write(database: Any, function: Callable[[sqlite3.Connection], T]) -> T | _Failed:
    done: list[T] = []

    def attempt(conn: sqlite3.Connection) -> T | _Failed:
        usual = None
        try:
            usual = conn.execute("pragma busy_timeout").fetchone()[0]
            conn.execute(f"pragma busy_timeout = {int(LOCKED_SECONDS_PER_TRY * 1000)}")
            done.append(function(conn))
            return done[0]
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # A disk that fails may fail here as well.
                if conn.in_transaction:
                    conn.rollback()
            return _Failed(error)
        finally:
            if usual is not None:
                conn.execute(f"pragma busy_timeout = {usual}")

    # Never cancelled: the write thread would finish it all the same.
    with anyio.CancelScope(shield=True):
        try:
            outcome = await call(database.execute_write_fn, attempt, transaction=False)
        except sqlite3.Error as error:
            # There is no connection; or a hook that Datasette calls before and after failed. What it calls
            # after comes too late: that was committed.
            outcome = done[0] if done else _Failed(error)
    return cast("T | _Failed", outcome)


def _refused(database: Any, error: sqlite3.Error) -> DatabaseError:
    message = f"The database {database.name!r} cannot be written: {error}"
    return DatabaseError(message, trouble_of(error, database))


def _gave_up(database: Any, error: sqlite3.Error, watch: Watch) -> DatabaseError:
    if not is_locked(error):
        return DatabaseError(f"The database {database.name!r} cannot be read: {error}", watch.trouble)
    return DatabaseError(
        f"Another program has kept the database {database.name!r} locked for {watch.waited:.0f} seconds: "
        "close what holds it and run this again",
        watch.trouble,
    )

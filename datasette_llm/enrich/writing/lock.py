"""One job at a time per output column, also across processes.

The lock is the operating system's, on a small file beside the database: it ends with the process
that holds it, however that ends, so a job that was killed leaves nothing to clean up by hand. The
file says who holds it, for the message that a second job gets. It is removed when the job ends;
what a killed one leaves behind is empty of meaning and reused by the next.

A database in memory belongs to one process: there a set of names does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AlreadyRunning

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logging.getLogger("datasette_llm")

_held_in_memory: set[tuple[str, str, str]] = set()


@contextmanager
def only_job(database: Any, table: str, columns: Iterable[str]) -> Iterator[None]:
    """Hold the right to write these columns of a Datasette database's table.

    Raises:
        AlreadyRunning: another job holds it for one of them.
    """
    with ExitStack() as stack:
        # In one order for everybody, so that of two jobs with two columns in common one goes on.
        for column in sorted(columns, key=str.lower):
            if database.path is None:
                name = database.memory_name or str(id(database))
                stack.enter_context(_lock_in_memory(name, table, column))
            else:
                stack.enter_context(_lock_file(Path(database.path).resolve(), table, column))
        yield


def is_held(database: Any, table: str, columns: Iterable[str]) -> bool:
    """Say whether a job, of whichever process, is filling one of these columns now."""
    try:
        with only_job(database, table, columns):
            return False
    except AlreadyRunning:
        return True


@contextmanager
def _lock_in_memory(database: str, table: str, column: str) -> Iterator[None]:
    key = (database, table.lower(), column.lower())
    if key in _held_in_memory:
        raise _running(table, column, "in this process")
    _held_in_memory.add(key)
    try:
        yield
    finally:
        _held_in_memory.discard(key)


@contextmanager
def _lock_file(database: Path, table: str, column: str) -> Iterator[None]:
    digest = hashlib.sha256(f"{table.lower()}\0{column.lower()}".encode()).hexdigest()[:12]
    path = database.with_name(f"{database.name}-llm-{digest}.lock")
    try:
        with hold_lock(path, table=table, column=column):
            yield
    except Held as held:
        raise _running(table, column, held.holder) from None


class Held(Exception):
    """Somebody else holds a lock.

    Attributes:
        holder: who, in words.
    """

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextmanager
def hold_lock(path: Path, **about: str) -> Iterator[None]:
    """Hold the lock that this file stands for; where there can be no such file, warn and go on without.

    Args:
        about: what the file says beside who holds it.

    Raises:
        Held: somebody else has it.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            _warn_of_no_lock(error)
            yield
            return
        try:
            locked = _try_lock(descriptor)
            if not locked:
                raise Held(_holder(descriptor))
            # The holder before may have removed the file between our open and our lock: then this
            # is a lock on a file that nobody else will ever see.
            if _same_file(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        _write_holder(descriptor, about)
        yield
    finally:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    if sys.platform == "win32":  # pragma: no cover - the tests run on Unix
        return True  # Windows does not remove a file that is open, and we never remove it there.
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    if sys.platform == "win32":  # pragma: no cover - the tests run on Unix
        import msvcrt

        try:
            # Far behind the text, so that others can read who holds it.
            os.lseek(descriptor, 1_000_000, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _warn_of_no_lock(error)
    return True


def _warn_of_no_lock(error: OSError) -> None:
    # Some network file systems have no locks, some directories take no files: better a job than none.
    logger.warning("Nothing keeps a second job from the same column: %s", error)


def _write_holder(descriptor: int, about: dict[str, str]) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        **about,
    }
    # The lock holds without: on a full disk nobody learns who has it, that is all.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(descriptor: int) -> str:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = json.loads(os.read(descriptor, 4096))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, OSError):
        return "another process"


def _running(table: str, column: str, holder: str) -> AlreadyRunning:
    return AlreadyRunning(
        f"Another job is already filling the column {column!r} of {table!r} ({holder}). "
        "Nothing was sent. Wait for it, or stop it: its results stay, and this command goes on from there"
    )

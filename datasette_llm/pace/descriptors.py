"""As many connections as this process may have files open.

A prompt in flight has a socket, and sockets count as open files (``ulimit -n``: 256 on macOS). When they use
them all up, SQLite cannot open the journal of a database, and answers that have been paid for cannot be
written.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .policy import ConcurrencyBounds

logger = logging.getLogger("datasette_llm")

# For what is opened while prompts run: SQLite's journals, connections of Datasette's threads to each of its
# databases, certificates, the pipes of a loop.
RESERVED = 24
# However few there are, something has to be in flight.
LEAST = 2


def raise_limit() -> None:
    """Raise the number of files that this process may have open as far as it may do that itself."""
    if sys.platform == "win32":  # pragma: no cover - the tests run on Unix
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft == hard:
        return
    # macOS takes no more than 10,240 for "as many as there are".
    for wanted in (hard, 10_240, 4_096, 1_024):
        if wanted != resource.RLIM_INFINITY and wanted <= soft:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            continue
        return


def fitting(concurrency: int | ConcurrencyBounds) -> int | ConcurrencyBounds:
    """Return so much of a concurrency as there are descriptors for; say so once, if that is less."""
    limit = _limit()
    if limit is None:
        return concurrency
    most = concurrency if isinstance(concurrency, int) else concurrency.max
    room = _room(limit)
    if most <= room:
        return concurrency
    _say(room, limit)
    if isinstance(concurrency, int):
        return room
    return replace(concurrency, start=min(concurrency.start, room), min=min(concurrency.min, room), max=room)


def _limit() -> int | None:
    if sys.platform == "win32":  # pragma: no cover - the tests run on Unix
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


@functools.cache
def _room(limit: int) -> int:
    """Return how many connections fit; measured once, since groups with one bound share one limit."""
    return max(LEAST, limit - RESERVED - _open())


def _open() -> int:
    for directory in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(directory))
        except OSError:
            continue
    return RESERVED


@functools.cache
def _say(room: int, limit: int) -> None:
    logger.warning(
        "At most %d prompts are in flight at once: this process may have no more than %d files open "
        "(ulimit -n), and each prompt has a connection",
        room,
        limit,
    )

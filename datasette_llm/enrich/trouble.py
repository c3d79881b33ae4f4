"""What keeps a database from being read or written for a while, and how long it is waited for.

Such trouble is of this machine: another program has locked the file, the disk is full, the process has
no file descriptor left. It may pass without anybody touching the job.
"""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any

import anyio

# By SQLite's own words: Python 3.10 does not tell its error codes.
_WORDS = (
    (("locked", "busy"), "another program has locked {file}"),
    (("is full",), "the disk that {file} is on is full"),
    (("unable to open",), "SQLite cannot open {file} or a file beside it: too many files are open, perhaps"),
    (("disk i/o error",), "the disk that {file} is on reports an error"),
    (("readonly",), "{file} cannot be written just now: it is read-only"),
)


def is_locked(error: Exception) -> bool:
    """Say whether SQLite gave up because another connection holds a lock."""
    text = str(error)
    return isinstance(error, sqlite3.OperationalError) and ("locked" in text or "busy" in text)


def trouble_of(error: Exception, database: Any) -> str | None:
    """Return what is in the way, in words, if an error is of the kind that may pass."""
    if not isinstance(error, sqlite3.OperationalError):
        return None
    text = str(error).lower()
    file = database.name if database.path is None else Path(database.path).name
    for signs, words in _WORDS:
        if any(sign in text for sign in signs):
            return words.format(file=file)
    return None


class Watch:
    """Whether a database can be used just now, as one reader or writer of it sees that.

    Attributes:
        trouble: what is in the way, in words; ``None`` while nothing is.
    """

    def __init__(self, patience_seconds: float) -> None:
        """Prepare to wait.

        Args:
            patience_seconds: how long one trouble is waited for.
        """
        self.trouble: str | None = None
        self._patience_seconds = patience_seconds
        self._since = 0.0
        self._give_up_at = math.inf
        self._passed = anyio.Event()
        self._passed.set()

    @property
    def waited(self) -> float:
        """How many seconds the trouble has lasted."""
        return 0.0 if self.trouble is None else anyio.current_time() - self._since

    @property
    def is_over(self) -> bool:
        """Whether it has lasted as long as anybody is willing to wait."""
        return self.waited >= self._patience_seconds or (
            self.trouble is not None and anyio.current_time() >= self._give_up_at
        )

    def begin(self, trouble: str) -> None:
        """Take note of trouble, or that it goes on."""
        if self.trouble is None:
            self._since = anyio.current_time()
            self._passed = anyio.Event()
        self.trouble = trouble

    def end(self) -> None:
        """Take note that it has passed, or that nobody waits for that any more."""
        self.trouble = None
        self._passed.set()

    def hurry(self, seconds: float) -> None:
        """Wait for so long from now at most: somebody waits for the job to end."""
        self._give_up_at = min(self._give_up_at, anyio.current_time() + seconds)

    async def passed(self) -> None:
        """Wait until nothing is in the way."""
        await self._passed.wait()

    def __str__(self) -> str:
        return "" if self.trouble is None else f"{self.trouble}, {self.waited:.0f} s"

"""What a person is told while a provider cannot be reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .stopped import clock_time
from .words import duration

if TYPE_CHECKING:
    from ...pace.outage import Away


def away_in_words(away: Away) -> str:
    """Return since when there is no connection, and when the next one is tried."""
    next_try = math.ceil(away.next_try)
    tried = f"next try in {next_try} s" if next_try else "trying now"
    return f"no connection to {away.address or 'the provider'} since {clock_time(-away.seconds)}, {tried}"


class Unanswered:
    """Notices that a job is answered no longer, and nobody knows why: no time left is known then."""

    #: Seconds without an answer that are nothing yet, and so many times as long as each one took before.
    LEAST_SECONDS, TIMES = 60.0, 10.0

    def __init__(self) -> None:
        self._done = 0
        self._since = 0.0

    def look(self, done: int, elapsed: float) -> str | None:
        """Say for how long nothing was answered, once that is unusual.

        Args:
            done: rows that are done.
            elapsed: seconds since the job began.
        """
        if done != self._done:
            self._done, self._since = done, elapsed
        silent = elapsed - self._since
        if not done or silent < max(self.LEAST_SECONDS, self.TIMES * self._since / done):
            return None
        return f"no answer for {duration(silent)}"

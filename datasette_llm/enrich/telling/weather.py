"""What a person is told while a provider cannot be reached."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .stopped import clock_time

if TYPE_CHECKING:
    from ...pace.throttle import Away


def away_in_words(away: Away) -> str:
    """Return since when there is no connection, and when the next one is tried."""
    next_try = math.ceil(away.next_try)
    tried = f"next try in {next_try} s" if next_try else "trying now"
    return f"no connection to {away.address or 'the provider'} since {clock_time(-away.seconds)}, {tried}"

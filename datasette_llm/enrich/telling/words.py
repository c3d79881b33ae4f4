"""Numbers and times as people read them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number of things: 1 row, 1,204 rows, 2 retries."""
    if number == 1:
        return f"1 {one}"
    return f"{number:,} {many or one + 's'}"


def duration(seconds: float) -> str:
    """Return a time for people: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def dollars(cost: float) -> str:
    """Return an amount of money for people: $12.34, and $0.0012 where cents say nothing."""
    if cost == 0 or cost >= 0.99995:
        return f"${cost:,.2f}"
    if cost < 0.000001:
        return "less than $0.000001"
    return f"${cost:.4f}" if cost >= 0.001 else f"${cost:.6f}"


def nearest(name: str, known: Iterable[str], *, what: str = "there are") -> str:
    """Return half a sentence for an error message: the names most like this one, or the first few."""
    names = list(known)
    lowered = {candidate.lower(): candidate for candidate in names}
    close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3)]
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    if not names:
        return f"{what}: none"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{what}: " + ", ".join(repr(candidate) for candidate in names[:12]) + more


def none_waits(where: str, *, stale: bool) -> str:
    """Say that a job has nothing to do.

    Args:
        where: the table and the columns.
        stale: the job is about answers that are out of date.
    """
    return f"no answer in {where} is stale" if stale else f"no row of {where} is waiting for a value"

"""What there is to tell of the batches of a run: as data, and in words for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...enrich.telling.words import counted
from .collecting import trouble_with

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...enrich.record.batches import BatchRecord

#: A batch's state in the record, for people; of one that runs the provider's own word is told.
_STATES = {
    "writing": "being written",
    "prepared": "not sent yet: the command that submits it does",
    "creating": "being sent",
    "adopted": "may be another's: it is found out when it is done",
    "collected": "collected",
    "cancelled": "cancelled",
    "failed": "not accepted",
}
#: Nothing is to be collected from it.
_OVER = ("collected", "cancelled", "failed")


def in_data(batches: Sequence[BatchRecord]) -> list[dict[str, Any]]:
    """Return how batches stand, as data."""
    names = ("id", "provider", "batch", "state", "says", "requests", "answered", "expires", "ended", "error")
    return [{name: getattr(record, name) for name in names} for record in batches]


def is_with_provider(batches: Sequence[BatchRecord]) -> bool:
    """Say whether something is still to be collected."""
    return any(record.is_open for record in batches)


def in_words(datasette: Any, database: str, run: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a page says of the batches of a run; ``None`` if it has none."""
    batches: Sequence[BatchRecord] = run["batches"]
    if not batches:
        return None
    left = [record for record in batches if record.is_open]
    return {
        "summary": summary(batches),
        "each": [_told(record) for record in batches],
        "trouble": trouble_with(datasette, database, run["id"]) if left else None,
        "is_left": bool(left),
    }


def summary(batches: Sequence[BatchRecord]) -> str | None:
    """Return how batches stand in one line; ``None`` if there are none."""
    if not batches:
        return None
    left = [record for record in batches if record.is_open]
    if not left:
        return f"{counted(len(batches), 'batch', 'batches')}, nothing left to collect"
    requests, answered = sum(each.requests for each in left), sum(each.answered for each in left)
    return (
        f"{counted(len(left), 'batch', 'batches')} with the provider, "
        f"{answered:,} of {counted(requests, 'request')} answered"
    )


def _told(record: BatchRecord) -> dict[str, Any]:
    state = record.state
    words = record.says or "begun" if state == "running" else _STATES.get(state, state)
    return {
        "name": record.batch or record.reference,
        "provider": record.provider,
        "state": words.replace("_", " ").replace("BATCH STATE ", "").lower() if state == "running" else words,
        "is_over": state in _OVER,
        "answered": f"{record.answered:,} of {record.requests:,}",
        "expires": record.expires if state == "running" else None,
        "error": record.error,
    }

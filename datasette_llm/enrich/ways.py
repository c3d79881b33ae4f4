"""Which way a job goes: one prompt after the other, or in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ground import Way
    from .spec import JobSpec


def way_of(datasette: Any, spec: JobSpec) -> Way | None:
    """Return the way of a job, or ``None`` for one prompt after the other.

    Args:
        datasette: the Datasette that has the database.
    """
    if not spec.batch:
        return None
    # What only batches need is not loaded for other jobs.
    from .batches.way import BatchWay

    return BatchWay(datasette)

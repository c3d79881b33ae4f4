"""What a job leaves behind, counted at its end: rows to do, in batches, with values of a smaller schema."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio

from .database import read
from .errors import DatabaseError, EnrichError
from .reading.pages import count_rows
from .record.batches import count_submitted

if TYPE_CHECKING:
    from .ledger import Ledger
    from .plan import Plan
    from .spec import JobSpec
    from .telling.report import EnrichReport

# How long the rows left are counted after an early end, while somebody waits for the prompt.
RECOUNT_SECONDS = 2.0
# How long those are counted that an earlier schema was for: of a big table that takes seconds.
LACKING_SECONDS = 15.0


async def count_rest(spec: JobSpec, plan: Plan, ledger: Ledger, report: EnrichReport) -> None:
    """Complete the report's totals, exactly."""
    if report.stopped is None:
        report.total = report.done
    elif spec.overwrite:
        # Which rows are done is not to be seen in the table: the condition says it.
        report.remaining = None if report.total is None else max(0, report.total - report.done)
        report.resume_where = ledger.resume_where(plan.rows)
    else:
        with anyio.move_on_after(RECOUNT_SECONDS), suppress(DatabaseError):
            counted = await count_rows(plan.database, plan.source)
            # Rows that were skipped have no value either; their records are gone.
            skipped = 0 if spec.retry_failed else report.skipped
            report.remaining = max(0, counted - skipped)


async def count_in_batches(plan: Plan, report: EnrichReport) -> None:
    """Count the rows that were left alone since they are in batches."""
    if plan.leaves_submitted and plan.job is not None:
        with suppress(DatabaseError):
            report.in_batches = await read(plan.database, partial(count_submitted, job=plan.job))


async def count_incomplete(spec: JobSpec, plan: Plan, report: EnrichReport) -> None:
    """Count the rows that have values of a smaller schema, and lack those that are new."""
    if spec.replaces:
        return
    seconds = RECOUNT_SECONDS if report.stopped else LACKING_SECONDS
    with anyio.move_on_after(seconds), suppress(EnrichError):
        found = await plan.incomplete()
        if found is not None:
            rows, columns = found
            report.incomplete = await count_rows(plan.database, rows)
            report.incomplete_columns = columns if report.incomplete else ()

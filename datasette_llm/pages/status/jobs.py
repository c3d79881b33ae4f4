"""The jobs that this server runs now, for whoever may see their tables."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ...secrecy import redacted

if TYPE_CHECKING:
    from datasette.app import Datasette

    from ..jobs.live import LiveJob

#: So many jobs are told.
MOST = 20


async def read_jobs(datasette: Datasette, actor: dict[str, Any] | None) -> dict[str, Any]:
    """Return how the jobs stand that are under way. Those on tables that an actor may not see are counted."""
    if "datasette_llm.pages.jobs.live" not in sys.modules:
        return {"jobs": [], "jobs_not_shown": 0}  # Nobody has started any.
    from ..jobs.live import under_way
    from ..jobs.rights import may_see

    jobs = under_way(datasette)
    shown = [
        _job(datasette, job)
        for job in jobs[:MOST]
        if await may_see(datasette, actor, job.spec.database, job.spec.table)
    ]
    return {"jobs": shown, "jobs_not_shown": len(jobs) - len(shown)}


def _job(datasette: Datasette, job: LiveJob) -> dict[str, Any]:
    from ..jobs.paths import job_path, jobs_path

    spec, progress = job.spec, job.progress
    number = job.number
    if number is None:
        path = jobs_path(datasette, spec.database)
    else:
        path = job_path(datasette, spec.database, number)
    return {
        "job": f"{spec.database}: {spec.table}",
        "database": spec.database,
        "table": spec.table,
        "run": number,
        "path": path,
        "state": job.state,
        "waiting_for": None if progress.waiting is None else redacted(progress.waiting),
        "done": progress.done,
        "total": progress.total,
        "written": progress.written,
        "failed": progress.failed,
        "running": progress.running,
        "retries": progress.retries,
        "rows_per_second": round(progress.rows_per_second, 2),
        "cost": None if progress.cost is None else round(progress.cost, 6),
        "elapsed_seconds": round(progress.elapsed, 1),
    }

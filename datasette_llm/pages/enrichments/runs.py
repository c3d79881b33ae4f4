"""Which run of a job is the one that counts, and what it has done of its batch.

datasette-enrichments runs a job as a loop over batches, and looks at the job's status between them. A
person who pauses and resumes within one batch so gets a second loop beside the first. Here a job has one
*newest* run; an older one stops where it is, and only one works at a time.

A run whose batch is through while it is the newest does not stop: its loop goes on to note that the batch
is done, and perhaps the job. A run that is started meanwhile waits for this, or it would begin with the
same batch again and count it twice.

When the server stops, no run is the newest: batches under way end, with what was answered written. Their
jobs keep their status, so datasette-enrichments starts them again with the server.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import anyio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ...enrich.job import EnrichJob
    from ...enrich.sql import SQLValue

#: How long prompts in flight may take to complete when the server stops.
END_GRACE_SECONDS = 5.0
#: How long their answers may then take to be written.
WRITE_SECONDS = 2.0


@dataclass(eq=False)
class Job:
    """What this process knows of one job.

    Attributes:
        newest: the run that was started last.
        working: held while a batch is under way.
        noted: set as soon as the loop whose batch is through has noted how it ended.
        active: the batch under way.
        insisted: the job was paused since prompts only failed, and somebody has resumed it, or will have.
        written: keys of rows written in a batch that was broken off, which is run again on resuming.
    """

    newest: Run | None = None
    working: anyio.Lock = field(default_factory=anyio.Lock)
    noted: anyio.Event | None = None
    active: EnrichJob | None = None
    insisted: bool = False
    written: set[tuple[SQLValue, ...]] = field(default_factory=set)


@dataclass(eq=False, frozen=True)
class Run:
    """One loop over the batches of a job."""

    job: Job

    @property
    def is_newest(self) -> bool:
        return self.job.newest is self

    def batch_begins(self) -> None:
        if self.job.noted is not None:
            self.job.noted.set()

    def batch_ends(self) -> None:
        """Have runs that are started from now on wait until this task has begun its next batch, or ended."""
        noted = self.job.noted = anyio.Event()
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: noted.set())


_jobs: WeakKeyDictionary[Any, dict[tuple[str, int], Job]] = WeakKeyDictionary()
_run: ContextVar[Run | None] = ContextVar("datasette_llm_enrich_run", default=None)


@asynccontextmanager
async def new_run(datasette: Any, database: str, job_id: int) -> AsyncGenerator[None, None]:
    """Make a new run of this job the newest; tasks started inside of the block belong to it."""
    job = _jobs.setdefault(datasette, {}).setdefault((database, job_id), Job())
    run = job.newest = Run(job)
    if job.noted is not None:
        await job.noted.wait()
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def current_run() -> Run:
    """Return the run that this task belongs to."""
    return _run.get() or _lone_run()


async def end_runs(datasette: Any) -> None:
    """End what runs for this Datasette; returns when all that was answered is written."""
    jobs = list(_jobs.get(datasette, {}).values())
    for job in jobs:
        job.newest = None
        if job.active is not None:
            job.active.stop(grace_seconds=END_GRACE_SECONDS)
    with anyio.move_on_after(END_GRACE_SECONDS + WRITE_SECONDS):
        for job in jobs:
            async with job.working:
                pass


def _lone_run() -> Run:
    # A batch run by somebody who started no job.
    job = Job()
    job.newest = Run(job)
    return job.newest

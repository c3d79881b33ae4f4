"""The jobs that this server runs, each as a task of it.

A `LiveJob` is under way from `start` until its job has ended; then it is kept for a while, with what the
record does not tell: its last answers and how it went over time. When the server stops, jobs under way are
stopped and their answers written before anything is closed (`end_jobs`).

Whoever watches waits for `LiveJob.changed`: what is to be shown is made once a second, for all who watch.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import anyio

from ...enrich.errors import EnrichError
from ...enrich.job import EnrichJob
from ...errors import ModelNotFoundError
from ...secrecy import redacted
from .chart import History
from .owner import start_task

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ...enrich.ground import Way
    from ...enrich.spec import JobSpec
    from ...enrich.sql import SQLValue
    from ...enrich.telling.report import EnrichProgress, EnrichReport
    from ...enrich.writing.results import Outcome

logger = logging.getLogger("datasette_llm")

#: How long prompts in flight may take to complete when somebody ends a job, or the server stops.
GRACE_SECONDS = 5.0
#: How long answers may then take to be written.
WRITE_SECONDS = 2.0
#: How often those who watch are told.
TELL_SECONDS = 1.0
#: How many of the last answers are shown.
LATEST = 8
#: So many jobs that have ended are kept.
KEPT = 20


@dataclass(frozen=True, slots=True)
class Answered:
    """A row that was settled lately.

    Attributes:
        key: the row's.
        text: its value, or the failure in words.
    """

    key: tuple[SQLValue, ...]
    text: str
    failed: bool


class LiveJob:
    """One job of this server.

    Attributes:
        begun: set when it is on record, or has ended before.
        ended: set when it has ended.
        report: what it came to.
        error: why it could not go on.
        latest: what was settled last.
        history: how it went.
    """

    def __init__(self, datasette: Any, spec: JobSpec, way: Way | None = None) -> None:
        self.spec = spec
        self.begun = anyio.Event()
        self.ended = anyio.Event()
        self.report: EnrichReport | None = None
        self.error: str | None = None
        self.latest: deque[Answered] = deque(maxlen=LATEST)
        self.history = History()
        self.changed = anyio.Event()
        self._told_at = 0.0
        self._state = ""
        self._shown: str | None = None
        self._showing = anyio.Lock()
        self._job = EnrichJob(
            datasette,
            spec,
            on_progress=self._look,
            on_settled=self._note,
            # What only looks how batches stand is on record when it has found something.
            on_begun=self._begin if way is None else None,
            way=way,
        )

    @property
    def number(self) -> int | None:
        """The number of its run in the record, once it is there."""
        return self._job.number

    @property
    def progress(self) -> EnrichProgress:
        return self._job.progress

    @property
    def state(self) -> str:
        """``running``, ``paused``, ``stopping`` or ``ended``."""
        if self.ended.is_set():
            return "ended"
        if self.progress.stopping is not None:
            return "stopping"
        return "paused" if self.progress.paused else "running"

    def pause(self) -> None:
        self._job.pause()
        self.progress.paused = not self.progress.stopping
        self._tell()

    def go_on(self) -> None:
        self._job.go_on()
        self.progress.paused = False
        self._tell()

    def stop(self) -> None:
        """Stop, if it has not ended; prompts in flight get a few seconds."""
        if self.ended.is_set():
            return
        self._job.stop(grace_seconds=GRACE_SECONDS)
        self.progress.stopping = self.progress.stopping or "stopped"
        self._tell()

    async def run(self) -> None:
        """Run the job to its end, whatever that is."""
        try:
            self.report = await self._job.run()
        except (EnrichError, ModelNotFoundError) as error:
            self.error = redacted(str(error))
        except Exception as error:  # Of a plugin that takes part, say.
            logger.exception("A job on %s has failed", self.spec.table)
            self.error = redacted(f"{type(error).__name__}: {error}")
        finally:
            self.ended.set()
            self.begun.set()
            self._tell()

    async def shown(self, make: Callable[[], Awaitable[str]]) -> str:
        """Return what those who watch see now, made once for all of them.

        Args:
            make: makes it.
        """
        async with self._showing:
            if self._shown is None:
                self._shown = await make()
            return self._shown

    def _begin(self, number: int) -> None:
        self.begun.set()

    def _look(self, progress: EnrichProgress) -> None:
        self.history.add(progress.elapsed, progress.done, progress.cost or 0.0)
        now = anyio.current_time()
        if now - self._told_at >= TELL_SECONDS or self.state != self._state:
            self._told_at = now
            self._tell()

    def _tell(self) -> None:
        self._state = self.state
        self._shown = None
        self.changed.set()
        self.changed = anyio.Event()

    def _note(self, outcome: Outcome) -> None:
        for result in outcome.written[-LATEST:]:
            values = [value for value in result.values or () if value is not None]
            self.latest.append(Answered(result.row.key, ", ".join(map(str, values)), failed=False))
        for result in outcome.failed[-LATEST:]:
            self.latest.append(Answered(result.row.key, result.message, failed=True))


_jobs: WeakKeyDictionary[Any, list[LiveJob]] = WeakKeyDictionary()
_ending: WeakSet[Any] = WeakSet()


async def start(datasette: Any, spec: JobSpec) -> LiveJob:
    """Start a job; returns when it is on record, or has ended because nothing can or need be done."""
    live = LiveJob(datasette, spec)
    _keep(datasette, live)

    async def run(datasette: Any) -> None:
        await live.run()

    start_task(datasette, run, f"datasette-llm: {spec.database}/{spec.table}")
    await live.begun.wait()
    return live


async def run_here(datasette: Any, spec: JobSpec, way: Way) -> LiveJob:
    """Run a job in this task; returns when it has ended. It is kept if it has done anything."""
    live = LiveJob(datasette, spec, way)
    _keep(datasette, live)
    if datasette in _ending:
        live.stop()
    try:
        await live.run()
    finally:
        if live.number is None:
            _jobs[datasette].remove(live)
    return live


def _keep(datasette: Any, live: LiveJob) -> None:
    jobs = _jobs.setdefault(datasette, [])
    ended = [job for job in jobs if job.ended.is_set()]
    for job in ended[: max(0, len(ended) - KEPT)]:
        jobs.remove(job)
    jobs.append(live)


def find(datasette: Any, database: str, number: int) -> LiveJob | None:
    """Return the job that is, or was, this run of a database."""
    for live in _jobs.get(datasette, ()):
        if live.number == number and live.spec.database == database:
            return live
    return None


def under_way(datasette: Any) -> list[LiveJob]:
    """Return the jobs of this Datasette that have not ended."""
    return [live for live in _jobs.get(datasette, ()) if not live.ended.is_set()]


async def end_jobs(datasette: Any) -> None:
    """Stop what runs for this Datasette; returns when all that was answered is written."""
    _ending.add(datasette)
    jobs = list(_jobs.get(datasette, ()))
    for live in jobs:
        live.stop()
    with anyio.move_on_after(GRACE_SECONDS + WRITE_SECONDS):
        for live in jobs:
            await live.ended.wait()

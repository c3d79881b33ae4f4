"""One job: rows of a table to prompts, prompts through a group, answers back into the table.

Tasks of a job, all in one task group that `EnrichJob.run` is inside of: the body, which takes
answers from the group's `map`; the writer; the counter of the rows to do; the ticker that reports
progress. The body ends first, then the writer when all answers are written, then the other two.

A job that is to stop (`EnrichJob.stop`, a deadline, a budget, too many failures) pulls no more rows.
Prompts in flight are paid for, so they are completed and written; only after `stop(grace_seconds)`
are they cancelled. Whatever ends the job, answers that have arrived are written.
"""

from __future__ import annotations

import inspect
import logging
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread

from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.access.settings import get_settings
from datasette_llm.backends.datasette_side import open_side
from datasette_llm.calls.workers import workers_from
from datasette_llm.errors import NoWorkers, WorkersError
from datasette_llm.pace.policy import Patience

from .asking import Asking
from .collector import spare_older_objects
from .database import read, write
from .errors import DatabaseError, EnrichError, EnrichInputError
from .ledger import Ledger
from .plan import make_plan
from .reading.pages import count_rows
from .record.batches import count_submitted
from .telling.report import EnrichReport
from .writing.llm_log import LlmLog
from .writing.lock import only_job
from .writing.recorder import recorder_of, versions_of
from .writing.take_up import side_file_of, take_up
from .writing.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from .plan import Plan
    from .spec import JobSpec
    from .telling.report import EnrichProgress
    from .telling.stopped import StopReason
    from .writing.recorder import Recorder
    from .writing.results import Outcome

logger = logging.getLogger("datasette_llm")

PROGRESS_SECONDS = 0.25
# How long a provider that cannot be reached is waited for; and one that never was.
OUTAGE_SECONDS = 30 * 60.0
FIRST_CONTACT_SECONDS = 10.0
# Prompts in flight at the deadline are completed; one that hangs must not keep the job for ever.
DEADLINE_GRACE_SECONDS = 60.0
# How long the rows left are counted after an early end, while somebody waits for the prompt.
RECOUNT_SECONDS = 2.0
#: With it comes all that prompts need of this package, which no start of Datasette loads.
_PROMPTING = "datasette_llm.facade"


@dataclass(frozen=True, slots=True)
class Ground:
    """What a job works with, once its group is open."""

    plan: Plan
    model: Any
    writer: Writer
    ledger: Ledger
    report: EnrichReport
    recorder: Recorder | None
    stop: Callable[..., None]
    log: LlmLog | None = None


class Way(Protocol):
    """A way to have rows answered that is not one prompt after the other."""

    def open_group(self, spec: JobSpec) -> AbstractAsyncContextManager[Any]:
        """Open the group that the prompts belong to."""
        ...

    async def has_work(self, plan: Plan) -> bool:
        """Say whether there is something to do although no row waits."""
        ...

    def settled(self, outcome: Outcome) -> None:
        """Called with what each transaction did."""

    async def run(self, ground: Ground) -> None:
        """Have the rows answered; returns when nothing more is to be done now."""
        ...


class EnrichJob:
    """A job that can be stopped.

    ``run`` belongs to one task; ``stop`` may be called from any task of the same event loop.
    """

    def __init__(
        self,
        datasette: Any,
        spec: JobSpec,
        *,
        on_progress: Callable[[EnrichProgress], Any] | None = None,
        on_settled: Callable[[Outcome], None] | None = None,
        on_begun: Callable[[int], None] | None = None,
        open_group: Callable[[JobSpec], AbstractAsyncContextManager[Any]] | None = None,
        way: Way | None = None,
    ) -> None:
        """Prepare a job.

        Args:
            datasette: the Datasette that has the database.
            spec: what to do.
            on_progress: called a few times a second, and once at the end; may be async.
            on_settled: called with what each transaction did.
            on_begun: called with the number of the run, which is on record before anything is sent then; else
                it is with the first answers. Never called if no row waits.
            open_group: opens the group that runs the prompts; `LLM.group` unless a test has its own.
            way: how the rows are asked about, if that is not one prompt after the other.
        """
        self._datasette = datasette
        configured = get_settings(datasette).money(spec.purpose, "max_cost")
        if spec.max_cost is None and configured is not None:
            spec = replace(spec, max_cost=configured)
        self._spec = spec
        self._on_progress = on_progress
        self._on_settled = on_settled
        self._on_begun = on_begun
        self._way = way
        self._open_group = open_group or (way.open_group if way is not None else self._open_llm_group)
        self._ledger = Ledger(spec)
        self._prompting: anyio.CancelScope | None = None

    @property
    def progress(self) -> EnrichProgress:
        """How far the job is."""
        return self._ledger.progress

    @property
    def in_flight(self) -> int:
        """How many prompts have been asked and not answered."""
        return self._ledger.in_flight

    def stop(self, reason: StopReason = "stopped", *, grace_seconds: float | None = None) -> None:
        """Pull no more rows; after ``grace_seconds`` cancel the prompts that are still in flight.

        Answers that have arrived are written in any case. May be called as often as one likes: the
        first reason is kept, a shorter grace replaces a longer one.
        """
        ledger = self._ledger
        ledger.stopping = ledger.stopping or reason
        ledger.go_on()
        if grace_seconds is not None:
            ledger.cancel_at = min(ledger.cancel_at, anyio.current_time() + grace_seconds)
            if self._prompting is not None:
                self._prompting.deadline = ledger.cancel_at
            for watch in ledger.watches:
                watch.hurry(grace_seconds)

    def pause(self) -> None:
        """Pull no more rows until `go_on`; prompts in flight are completed and written."""
        if self._ledger.stopping is None:
            self._ledger.pause()

    def go_on(self) -> None:
        """End a pause."""
        self._ledger.go_on()

    async def run(self) -> EnrichReport:
        """Run the job to its end.

        Raises:
            EnrichInputError: what was asked cannot be done; nothing was sent or written.
            EnrichError: it could not go on; what was answered before is written.
        """
        ledger = self._ledger
        ledger.began = anyio.current_time()
        if self._spec.deadline is not None:
            ledger.cancel_at = min(
                ledger.cancel_at, ledger.began + self._spec.deadline + DEADLINE_GRACE_SECONDS
            )
        if _PROMPTING not in sys.modules:
            # A tenth of a second in which a server's event loop would answer no page.
            await anyio.to_thread.run_sync(import_module, _PROMPTING)
        async with open_side():
            plan = await make_plan(self._datasette, self._spec)
            for doubt in plan.doubts:
                logger.warning("%s", doubt[0].upper() + doubt[1:])
            columns = tuple(output.name for output in plan.outputs.columns)
            report = EnrichReport(self._spec.database, plan.table.name, columns)
            if self._spec.dry_run:
                plan = await self._for_model(plan, report)
                await plan.preview(report)
            else:
                with only_job(plan.database, plan.table.name, columns):
                    plan = await self._take_up(plan, report)
                    if self._spec.stale:
                        plan = await self._for_model(plan, report)
                    waits = await plan.check_first_row()
                    if waits or (self._way is not None and await self._way.has_work(plan)):
                        await self._run_prompts(plan, report)
                    else:
                        await self._make_columns(plan, report)
                        await self._count_submitted(plan, report)
                        report.total = report.remaining = 0
            report.elapsed = ledger.elapsed
        return report

    async def _run_prompts(self, plan: Plan, report: EnrichReport) -> None:
        ledger, began_with = self._ledger, plan
        recorder: Recorder | None = None
        try:
            async with anyio.create_task_group() as tasks:
                writer: Writer | None = None
                log = LlmLog() if self._spec.log else None
                written = anyio.Event()
                with anyio.CancelScope(deadline=ledger.cancel_at) as self._prompting:
                    async with self._open_group(self._spec) as model:
                        ledger.model = model
                        report.model = model.model_id
                        self._spec.check_model(model, plan.schema)
                        plan = plan.for_model(model)
                        await plan.check_attachments(model.model_id)
                        recorder = recorder_of(plan, model.model_id, versions_of(model))
                        await self._announce(plan, recorder)
                        writer = self._open_writer(plan, report, recorder)
                        tasks.start_soon(_run_then_set, writer, written)
                        tasks.start_soon(self._keep_reporting, report)
                        if self._way is None:
                            tasks.start_soon(self._keep_counting, plan, report)
                        if log is not None:
                            tasks.start_soon(log.run)
                        # Not before: opening the group has loaded the SDK, which stays.
                        with spare_older_objects():
                            await self._ask(
                                Ground(plan, model, writer, ledger, report, recorder, self.stop, log)
                            )
                if self._prompting.cancelled_caught:
                    ledger.stopping = ledger.stopping or "deadline"
                if writer is not None:
                    writer.close()
                    await written.wait()
                    report.write_seconds = writer.seconds
                    plan = writer.plan
                if log is not None:
                    await log.aclose()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_bare(group)
        ledger.close(report)
        if recorder is not None and recorder.number is not None:
            report.run = recorder.number
            if recorder.run is not None:
                plan = replace(plan, job=recorder.run.job)
            with suppress(DatabaseError):
                end = partial(
                    recorder.end,
                    outcome=report.stopped or "done",
                    skipped=report.skipped,
                    cost=report.cost,
                    failures=report.failures,
                )
                await write(plan.database, end)
        await self._count_rest(plan, report)
        await self._count_submitted(plan, report)
        await self._count_incomplete(began_with, report)
        ledger.update_progress(report)
        await self._report_progress()

    async def _announce(self, plan: Plan, recorder: Recorder | None) -> None:
        if self._on_begun is not None and recorder is not None:
            await write(plan.database, recorder.announce)
            if recorder.number is not None:
                self._on_begun(recorder.number)

    async def _ask(self, ground: Ground) -> None:
        if self._way is not None:
            await self._way.run(ground)
            return
        asking = Asking(
            ground.plan, ground.model, ground.writer, ground.ledger, ground.report, ground.stop, ground.log
        )
        await asking.run()

    async def _take_up(self, plan: Plan, report: EnrichReport) -> Plan:
        """Write the answers that an earlier run had to leave in the side file."""
        taken = await take_up(plan, patience_seconds=self._spec.lock_timeout)
        report.taken_up, report.outdated = taken.written, taken.dropped
        return taken.plan

    def _open_writer(self, plan: Plan, report: EnrichReport, recorder: Recorder | None) -> Writer:
        side_file = side_file_of(plan)

        def settle(outcome: Outcome) -> None:
            if outcome.set_aside:
                report.side_file = str(side_file.path)
            self._settle(report, outcome)

        writer = Writer(
            plan,
            self._ledger.model.model_id,
            side_file,
            settle,
            self._stop_for,
            patience_seconds=self._spec.lock_timeout,
            recorder=recorder,
        )
        self._ledger.watches.append(writer.watch)
        return writer

    def _stop_for(self, trouble: str) -> None:
        """Stop since the database cannot be used; prompts in flight are paid for, and completed."""
        self._ledger.trouble = self._ledger.trouble or trouble
        self.stop("database", grace_seconds=DEADLINE_GRACE_SECONDS)

    def _settle(self, report: EnrichReport, outcome: Outcome) -> None:
        self._ledger.settle(report, outcome)
        if self._way is not None:
            self._way.settled(outcome)
        if self._on_settled is not None:
            self._on_settled(outcome)

    async def _keep_counting(self, plan: Plan, report: EnrichReport) -> None:
        ledger, done = self._ledger, report.done
        try:
            ledger.counted = done + await count_rows(plan.database, plan.source)
        except EnrichError as error:
            # A total is not worth a job: what it cannot do without, its reader and writer find out.
            logger.warning("The rows to do cannot be counted: %s", error)

    async def _count_rest(self, plan: Plan, report: EnrichReport) -> None:
        """Complete the report's totals, exactly."""
        if report.stopped is None:
            report.total = report.done
        elif self._spec.overwrite:
            # Which rows are done is not to be seen in the table: the condition says it.
            report.remaining = None if report.total is None else max(0, report.total - report.done)
            report.resume_where = self._ledger.resume_where(plan.rows)
        else:
            with anyio.move_on_after(RECOUNT_SECONDS), suppress(DatabaseError):
                counted = await count_rows(plan.database, plan.source)
                # Rows that were skipped have no value either; their records are gone.
                skipped = 0 if self._spec.retry_failed else report.skipped
                report.remaining = max(0, counted - skipped)

    async def _count_submitted(self, plan: Plan, report: EnrichReport) -> None:
        """Count the rows that were left alone since they are in batches."""
        if plan.leaves_submitted and plan.job is not None:
            with suppress(DatabaseError):
                report.in_batches = await read(plan.database, partial(count_submitted, job=plan.job))

    async def _keep_reporting(self, report: EnrichReport) -> None:
        while True:
            await anyio.sleep(PROGRESS_SECONDS)
            self._ledger.count(report)
            self._ledger.update_progress(report)
            await self._report_progress()

    async def _report_progress(self) -> None:
        if self._on_progress is not None:
            answer = self._on_progress(self.progress)
            if inspect.isawaitable(answer):
                await answer

    def _open_llm_group(self, spec: JobSpec) -> AbstractAsyncContextManager[Any]:
        from datasette_llm.facade import LLM

        group: AbstractAsyncContextManager[Any] = LLM(self._datasette).group(
            spec.model,
            purpose=spec.purpose,
            actor=spec.actor,
            concurrency=spec.concurrency,
            wait_for_quota=spec.wait_for_quota or 0.0,
            timeout=spec.timeout,
            outage_timeout=self._patience(),
            workers=workers_from(spec.workers, timeout=spec.workers_timeout) or spec.workers,
        )
        return group

    def _patience(self) -> Patience:
        """Say how long to wait for a provider that is away."""
        spec = self._spec
        if spec.outage_timeout is not None:
            return Patience(spec.outage_timeout, together=True)
        configured = get_settings(self._datasette).prompt_settings(spec.purpose, None).outage_timeout
        return Patience(configured or OUTAGE_SECONDS, together=True, first_contact=FIRST_CONTACT_SECONDS)

    async def _make_columns(self, plan: Plan, report: EnrichReport) -> None:
        """Make the output columns although no row waits: what is built on them must not break."""
        if len(plan.outputs.existing) < len(plan.outputs.columns):
            await self._for_model(plan, report)
            await plan.with_columns()
        await self._count_incomplete(plan, report)

    async def _count_incomplete(self, plan: Plan, report: EnrichReport) -> None:
        """Count the rows that have values of a smaller schema, and lack those that are new."""
        lacking = plan.incomplete
        if lacking is not None and not self._spec.replaces:
            with anyio.move_on_after(RECOUNT_SECONDS), suppress(EnrichError):
                report.incomplete_columns = lacking.outputs
                report.incomplete = await count_rows(plan.database, lacking)

    async def _for_model(self, plan: Plan, report: EnrichReport) -> Plan:
        """Return the plan for the model that the job would use, without a group."""
        from datasette_llm.facade import LLM

        spec = self._spec
        model = await LLM(self._datasette).model(spec.model, purpose=spec.purpose, actor=spec.actor)
        spec.check_model(model, plan.schema)
        report.model = model.model_id
        return plan.for_model(model)


async def _run_then_set(writer: Writer, event: anyio.Event) -> None:
    await writer.run()
    event.set()


def raise_bare(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the one exception in a group bare, or the first if the database failed several tasks."""
    leaves = list(_leaves(group))
    if len(leaves) == 1 or all(isinstance(leaf, EnrichError) for leaf in leaves):
        raise _as_the_jobs(leaves[0])
    raise group


def _as_the_jobs(error: BaseException) -> BaseException:
    """Return what the job ends with: that there are no workers for it is nothing that was not foreseen."""
    if isinstance(error, WorkersError):
        return EnrichInputError(f"The workers cannot be used: {error}")
    if isinstance(error, NoWorkers):
        return EnrichError(f"Nothing was sent: {error}")
    return error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error

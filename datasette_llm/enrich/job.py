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
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.access.settings import get_settings
from datasette_llm.backends.collector import spare_older_objects
from datasette_llm.backends.datasette_side import open_side

from .asking import Asking
from .database import write
from .errors import DatabaseError, EnrichError, raise_bare
from .ground import Ground
from .ledger import Ledger
from .model import for_its_model
from .model import open_group as open_llm_group
from .plan import make_plan
from .reading.pages import count_rows
from .telling.report import EnrichReport
from .totals import count_in_batches, count_incomplete, count_rest
from .writing.llm_log import LlmLog
from .writing.lock import only_job
from .writing.recorder import recorder_of, versions_of
from .writing.take_up import side_file_of, take_up
from .writing.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from .ground import Way
    from .plan import Plan
    from .spec import JobSpec
    from .telling.report import EnrichProgress
    from .telling.stopped import StopReason
    from .writing.recorder import Recorder
    from .writing.results import Outcome

logger = logging.getLogger("datasette_llm")

PROGRESS_SECONDS = 0.25
# Prompts in flight at the deadline are completed; one that hangs must not keep the job for ever.
DEADLINE_GRACE_SECONDS = 60.0
#: With it comes all that prompts need of this package, which no start of Datasette loads.
_PROMPTING = "datasette_llm.facade"


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
        self._open_group = open_group or (
            way.open_group if way is not None else partial(open_llm_group, datasette)
        )
        self._ledger = Ledger(spec)
        self._prompting: anyio.CancelScope | None = None
        self._recorder: Recorder | None = None

    @property
    def number(self) -> int | None:
        """The number of the run, once it is on record."""
        return None if self._recorder is None else self._recorder.number

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
            report = EnrichReport(self._spec.database, plan.table.name, columns, stale=self._spec.stale)
            if self._spec.dry_run:
                plan = await for_its_model(self._datasette, self._spec, plan, report)
                await plan.preview(report)
                await count_incomplete(self._spec, plan, report)
            else:
                with only_job(plan.database, plan.table.name, columns):
                    plan = await self._take_up(plan, report)
                    if self._spec.stale:
                        plan = await for_its_model(self._datasette, self._spec, plan, report)
                    if await self._is_work_left(plan):
                        await self._run_prompts(plan, report)
                    else:
                        await self._make_columns(plan, report)
                        await count_in_batches(plan, report)
                        report.total = report.remaining = 0
            report.elapsed = ledger.elapsed
        return report

    async def _is_work_left(self, plan: Plan) -> bool:
        way = self._way
        waits = (way is None or way.asks) and await plan.check_first_row()
        return waits or (way is not None and await way.has_work(plan))

    async def _run_prompts(self, plan: Plan, report: EnrichReport) -> None:
        ledger = self._ledger
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
                        recorder = self._recorder = recorder_of(plan, model.model_id, versions_of(model))
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
        await count_rest(self._spec, plan, ledger, report)
        await count_in_batches(plan, report)
        await count_incomplete(self._spec, plan, report)
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

    async def _make_columns(self, plan: Plan, report: EnrichReport) -> None:
        """Make the output columns although no row waits: what is built on them must not break."""
        if len(plan.outputs.existing) < len(plan.outputs.columns):
            await for_its_model(self._datasette, self._spec, plan, report)
            await plan.with_columns()
        await count_incomplete(self._spec, plan, report)


async def _run_then_set(writer: Writer, event: anyio.Event) -> None:
    await writer.run()
    event.set()

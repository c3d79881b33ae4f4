"""One job: rows of a table to prompts, prompts through a group, answers back into the table.

Tasks of a job, all in one task group that `EnrichJob.run` is inside of: the body, which pulls
answers from the group's `map`; the writer; the counter of the rows to do; the ticker that reports
progress. The body ends first, then the writer when all answers are written, then the other two.

A job that is to stop (`EnrichJob.stop`, a deadline, a budget, too many failures) pulls no more rows.
Prompts in flight are paid for, so they are completed and written; only after `stop(grace_seconds)`
are they cancelled. Whatever ends the job, answers that have arrived are written.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from pydantic import ValidationError

from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.errors import PromptCancelled
from datasette_llm.runtime.datasette_side import open_side

from .database import find_database, read, write
from .errors import EnrichInputError, RowError
from .lock import only_job
from .outputs import Outputs
from .report import EnrichProgress, EnrichReport, FailureKind
from .schema import read_schema
from .selection import FIRST_PAGE_ROWS, FailedSelection, Row, Selection
from .table import Table, nearest, read_table
from .template import PromptTemplate
from .writer import Outcome, Result, Writer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from pydantic import BaseModel

    from .report import StopReason
    from .table import SQLValue

T = TypeVar("T")

PROGRESS_SECONDS = 0.25
DRY_RUN_PROMPTS = 3
# How long the rows left are counted after an early end, while somebody waits for the prompt.
RECOUNT_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What a job is asked to do; `datasette_llm.enrich.enrich` explains each of these."""

    database: str
    table: str
    prompt: str
    column: str | None = None
    model: str | None = None
    purpose: str | None = None
    actor: dict[str, Any] | None = None
    system: str | None = None
    schema: str | Mapping[str, Any] | type[BaseModel] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str | None = None
    limit: int | None = None
    concurrency: int | None = None
    overwrite: bool = False
    retry_failed: bool = False
    dry_run: bool = False
    max_failures: int | None = None
    max_tokens_total: int | None = None
    deadline: float | None = None
    key: str | None = field(default=None, repr=False)

    def check(self) -> None:
        """Check what needs no database.

        Raises:
            EnrichInputError: a number makes no sense.
        """
        for name in ("limit", "concurrency", "max_failures", "max_tokens_total", "deadline"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EnrichInputError(f"{name} must be more than 0, not {value}")


@dataclass(frozen=True, slots=True)
class _Work:
    row: Row
    prompt: str


class EnrichJob:
    """A job that can be stopped.

    Attributes:
        progress: how far it is, kept up to date.
    """

    def __init__(
        self,
        datasette: Any,
        spec: JobSpec,
        *,
        on_progress: Callable[[EnrichProgress], Any] | None = None,
        open_group: Callable[[JobSpec], AbstractAsyncContextManager[Any]] | None = None,
    ) -> None:
        """Prepare a job.

        Args:
            datasette: the Datasette that has the database.
            spec: what to do.
            on_progress: called a few times a second, and once at the end; may be async.
            open_group: opens the group that runs the prompts; `LLM.group` unless a test has its own.
        """
        self._datasette = datasette
        self._spec = spec
        self._on_progress = on_progress
        self._open_group = open_group or self._open_llm_group
        self.progress = EnrichProgress()
        self._began = 0.0
        self._stopping: StopReason | None = None
        self._prompting: anyio.CancelScope | None = None
        self._cancel_at = math.inf
        self._model: Any = None
        self._pulled = 0
        self._answered = 0
        self._failed = 0
        self._cancelled = 0
        self._failures: dict[str, FailureKind] = {}
        # Rows that were pulled and are not settled yet, in the order of their keys.
        self._unsettled: dict[tuple[SQLValue, ...], None] = {}
        self._last_pulled: tuple[SQLValue, ...] | None = None

    def stop(self, reason: StopReason = "stopped", *, grace_seconds: float | None = None) -> None:
        """Pull no more rows; after ``grace_seconds`` cancel the prompts that are still in flight.

        Answers that have arrived are written in any case. May be called from the job's event loop
        only, as often as one likes: the first reason is kept, a shorter grace replaces a longer one.
        """
        self._stopping = self._stopping or reason
        if grace_seconds is not None:
            self._cancel_at = min(self._cancel_at, anyio.current_time() + grace_seconds)
            if self._prompting is not None:
                self._prompting.deadline = self._cancel_at

    async def run(self) -> EnrichReport:
        """Run the job to its end.

        Raises:
            EnrichInputError: what was asked cannot be done; nothing was sent or written.
            EnrichError: it could not go on; what was answered before is written.
        """
        self._began = anyio.current_time()
        spec = self._spec
        spec.check()
        async with open_side():
            database = find_database(self._datasette, spec.database)
            table = await read(database, partial(read_table, name=spec.table))
            template = PromptTemplate(spec.prompt, table.column_names)
            schema = None if spec.schema is None else read_schema(spec.schema)
            outputs = Outputs(table, spec.column, schema)
            report = EnrichReport(spec.database, table.name, tuple(c.name for c in outputs.columns))
            await read(database, self._rows(table, template, outputs).check)
            if spec.dry_run:
                return await self._dry_run(report, database, self._rows(table, template, outputs), template)
            with only_job(database, table.name, report.columns):
                source = self._rows(table, template, outputs)
                first, _ = await read(database, partial(source.page, after=None, size=FIRST_PAGE_ROWS))
                if not first:
                    report.total = report.remaining = 0
                    report.elapsed = anyio.current_time() - self._began
                    return report
                # The first row tells what the source alone does not: an attempt to leave the sandbox.
                _try_render(template, first[0])
                await self._run(report, database, table, template, schema)
        return report

    def _rows(self, table: Table, template: PromptTemplate, outputs: Outputs) -> Selection | FailedSelection:
        spec = self._spec
        rows = Selection(table, template.columns, outputs.marks, spec.where, spec.overwrite)
        return FailedSelection(rows, outputs.label) if spec.retry_failed else rows

    async def _dry_run(
        self,
        report: EnrichReport,
        database: Any,
        source: Selection | FailedSelection,
        template: PromptTemplate,
    ) -> EnrichReport:
        spec = self._spec
        report.dry_run = True
        report.model = await self._model_id()
        counted = await self._count(database, source)
        report.total = report.remaining = counted if spec.limit is None else min(counted, spec.limit)
        first, _ = await read(database, partial(source.page, after=None, size=DRY_RUN_PROMPTS))
        for row in first[: min(DRY_RUN_PROMPTS, spec.limit or DRY_RUN_PROMPTS)]:
            try:
                report.prompts.append(template.render(row.values))
            except RowError as error:
                report.prompts.append(f"(row {row.key} would fail: {error})")
        report.elapsed = anyio.current_time() - self._began
        return report

    async def _run(
        self,
        report: EnrichReport,
        database: Any,
        table: Table,
        template: PromptTemplate,
        schema: dict[str, Any] | None,
    ) -> None:
        """Run the prompts; everything that needs no model has been checked."""
        spec = self._spec
        writer: Writer | None = None
        try:
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope(deadline=self._cancel_at) as self._prompting:
                    async with self._open_group(spec) as model:
                        self._model = model
                        report.model = model.model_id
                        self._check_model(schema)
                        kwargs = self._prompt_keywords(schema)
                        table, outputs = await self._add_columns(database, table, schema)
                        source = self._rows(table, template, outputs)
                        writer = Writer(
                            database,
                            table,
                            outputs,
                            model_id=model.model_id,
                            overwrite=spec.overwrite,
                            on_settled=partial(self._settled, report),
                        )
                        written = anyio.Event()
                        tasks.start_soon(_run_then_set, writer.run, written)
                        tasks.start_soon(self._keep_counting, database, source, report)
                        tasks.start_soon(self._keep_reporting, report)
                        await self._answers(model, database, source, template, outputs, writer, kwargs)
                if writer is not None:
                    self._cancelled += max(0, self._pulled - self._answered)
                    writer.close()
                    await written.wait()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_bare(group)
        finally:
            self._finish(report, writer)
        await self._count_rest(report, database, source)
        self._update_progress(report)
        await self._report_progress()

    async def _answers(
        self,
        model: Any,
        database: Any,
        source: Selection | FailedSelection,
        template: PromptTemplate,
        outputs: Outputs,
        writer: Writer,
        kwargs: dict[str, Any],
    ) -> None:
        work = self._work(database, source, template, writer)
        async for item, response in model.map(work, _prompt_of, **kwargs):
            self._answered += 1
            try:
                text = await response.text()
                values = outputs.parse(text)
            except PromptCancelled:
                self._cancelled += 1
            except Exception as error:
                await self._fail(writer, item.row, error, attempts=getattr(response, "attempts", 1))
            else:
                await writer.add(Result(item.row, values))

    async def _work(
        self, database: Any, source: Selection | FailedSelection, template: PromptTemplate, writer: Writer
    ) -> AsyncGenerator[_Work, None]:
        """Yield the prompts, page by page, until the rows or the reasons to go on run out."""
        after: tuple[SQLValue, ...] | None = None
        size = FIRST_PAGE_ROWS
        while True:
            rows, after = await read(database, partial(source.page, after=after, size=size))
            size = max(size, min(size * 3, 500))
            for row in rows:
                if self._is_over():
                    return
                self._pulled += 1
                self._last_pulled = row.key
                self._unsettled[row.key] = None
                try:
                    prompt = template.render(row.values)
                except RowError as error:
                    self._answered += 1
                    await self._fail(writer, row, error, attempts=0)
                    continue
                yield _Work(row, prompt)
            if after is None:
                return

    def _is_over(self) -> bool:
        """Say whether no more rows are to be pulled; the reason is remembered."""
        spec = self._spec
        if self._stopping is not None:
            return True
        if spec.limit is not None and self._pulled >= spec.limit:
            return True
        if spec.max_failures is not None and self._failed >= spec.max_failures:
            self._stopping = "max_failures"
        elif spec.deadline is not None and anyio.current_time() - self._began >= spec.deadline:
            self._stopping = "deadline"
        elif spec.max_tokens_total is not None and self._tokens_spoken_for() >= spec.max_tokens_total:
            self._stopping = "max_tokens_total"
        return self._stopping is not None

    def _tokens_spoken_for(self) -> float:
        """Return the tokens used, and what the prompts in flight will use if they are like the others."""
        stats = self._model.stats
        used: int = (stats.input_tokens or 0) + (stats.output_tokens or 0)
        answered = self._answered - self._failed
        each = used / answered if answered > 0 else 0
        return used + each * (self._pulled - self._answered)

    async def _fail(self, writer: Writer, row: Row, error: Exception, *, attempts: int) -> None:
        self._failed += 1
        kind = type(error).__name__ if not isinstance(error, RowError) else "row error"
        message = self._without_key(str(error)) or "(no message)"
        await writer.add(Result(row, None, error, kind, message, attempts))

    def _without_key(self, text: str) -> str:
        """Return an error's text without the API key, should a provider quote it."""
        for key in (self._spec.key, getattr(self._model, "_key", None)):
            if isinstance(key, str) and len(key) > 3:
                text = text.replace(key, "***")
        return text

    def _settled(self, report: EnrichReport, outcome: Outcome) -> None:
        report.written += len(outcome.written)
        report.failed += len(outcome.failed)
        report.changed += len(outcome.changed)
        for results in (outcome.written, outcome.failed, outcome.changed):
            for result in results:
                self._unsettled.pop(result.row.key, None)
        for result in outcome.failed:
            known = self._failures.get(result.kind)
            if known is not None:
                known.count += 1
            else:
                self._failures[result.kind] = FailureKind(result.kind, 1, result.message, result.row.key)

    def _prompt_keywords(self, schema: dict[str, Any] | None) -> dict[str, Any]:
        spec = self._spec
        given = {
            "system": spec.system,
            "schema": schema,
            "key": spec.key,
            "options": dict(spec.options) or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _check_model(self, schema: dict[str, Any] | None) -> None:
        """Refuse what the model would refuse for every single row."""
        model = getattr(self._model, "model", None)
        if schema is not None and not getattr(model, "supports_schema", True):
            raise EnrichInputError(
                f"The model {self._model.model_id!r} does not support schemas: "
                "leave --schema out, or choose another model"
            )
        options_class = getattr(model, "Options", None)
        if options_class is not None and self._spec.options:
            try:
                options_class(**self._spec.options)
            except ValidationError as error:
                for problem in error.errors(include_url=False):
                    name = str(problem["loc"][0]) if problem["loc"] else ""
                    if name in self._spec.options:
                        raise EnrichInputError(
                            f"The option {name!r} is not right for {self._model.model_id!r}: "
                            f"{problem['msg']}; "
                            + nearest(name, options_class.model_fields, what="its options are")
                        ) from None

    async def _add_columns(
        self, database: Any, table: Table, schema: dict[str, Any] | None
    ) -> tuple[Table, Outputs]:
        """Add the columns that are missing; return the table as it is then."""
        outputs = Outputs(table, self._spec.column, schema)
        if len(outputs.existing) < len(outputs.columns):
            await write(database, partial(outputs.add_columns, table=table))
            table = await read(database, partial(read_table, name=table.name))
            outputs = Outputs(table, self._spec.column, schema)
        return table, outputs

    async def _count(self, database: Any, source: Selection | FailedSelection) -> int:
        total = 0
        after: tuple[SQLValue, ...] | None = None
        while True:
            found, after = await read(database, partial(source.count, after=after))
            total += found
            if after is None:
                return total

    async def _keep_counting(
        self, database: Any, source: Selection | FailedSelection, report: EnrichReport
    ) -> None:
        before = report.done
        total = before + await self._count(database, source)
        report.total = total if self._spec.limit is None else min(total, self._spec.limit)

    async def _count_rest(
        self, report: EnrichReport, database: Any, source: Selection | FailedSelection
    ) -> None:
        if self._stopping is None:
            report.total = report.done
            return
        if self._spec.overwrite:
            report.remaining = None if report.total is None else max(0, report.total - report.done)
            rows = source.rows if isinstance(source, FailedSelection) else source
            if self._unsettled:
                report.resume_where = rows.from_key(next(iter(self._unsettled)), included=True)
            elif self._last_pulled is not None:
                report.resume_where = rows.from_key(self._last_pulled, included=False)
            return
        with anyio.move_on_after(RECOUNT_SECONDS):
            report.remaining = await self._count(database, source)

    async def _keep_reporting(self, report: EnrichReport) -> None:
        while True:
            await anyio.sleep(PROGRESS_SECONDS)
            self._update_progress(report)
            await self._report_progress()

    def _update_progress(self, report: EnrichReport) -> None:
        progress, stats = self.progress, self._model.stats
        progress.total = report.total
        progress.done, progress.written = report.done, report.written
        progress.failed, progress.changed = report.failed, report.changed
        progress.running = max(0, self._pulled - self._answered)
        progress.retries = stats.retries
        progress.input_tokens, progress.output_tokens = stats.input_tokens or 0, stats.output_tokens or 0
        progress.elapsed = anyio.current_time() - self._began
        progress.stopping = self._stopping

    async def _report_progress(self) -> None:
        if self._on_progress is not None:
            answer = self._on_progress(self.progress)
            if inspect.isawaitable(answer):
                await answer

    def _finish(self, report: EnrichReport, writer: Writer | None) -> None:
        report.stopped = self._stopping
        report.cancelled = self._cancelled
        report.elapsed = anyio.current_time() - self._began
        report.failures = sorted(self._failures.values(), key=lambda kind: -kind.count)
        if writer is not None:
            report.write_seconds = writer.seconds
        if self._model is not None:
            stats = self._model.stats
            report.retries = stats.retries
            report.input_tokens, report.output_tokens = stats.input_tokens or 0, stats.output_tokens or 0

    def _open_llm_group(self, spec: JobSpec) -> AbstractAsyncContextManager[Any]:
        from datasette_llm.facade import LLM

        group: AbstractAsyncContextManager[Any] = LLM(self._datasette).group(
            spec.model, purpose=spec.purpose, actor=spec.actor, concurrency=spec.concurrency
        )
        return group

    async def _model_id(self) -> str:
        from datasette_llm.facade import LLM

        model = await LLM(self._datasette).model(
            self._spec.model, purpose=self._spec.purpose, actor=self._spec.actor
        )
        return str(model.model_id)


def _prompt_of(work: _Work) -> str:
    return work.prompt


def _try_render(template: PromptTemplate, row: Row) -> None:
    try:
        template.render(row.values)
    except RowError:
        pass  # This row's own error; it will be recorded.


async def _run_then_set(function: Callable[[], Any], event: anyio.Event) -> None:
    await function()
    event.set()


def raise_bare(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the one exception in a group bare; several stay together."""
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
        leaf = leaf.exceptions[0]
    raise leaf

"""The enrichment that datasette-enrichments offers: each batch of a job runs as one group.

datasette-enrichments keeps the job, reads the rows a page at a time and hands them over; a batch here is
an `EnrichJob` about these rows, so everything it promises holds: rows with a value are skipped, answers
are written as they arrive, a second job on the same column is told so. How a batch ends:

1. all rows are through: the rows that failed go to datasette-enrichments' log too;
2. somebody paused or cancelled the job: prompts in flight are completed, since they are paid for (after
   a cancellation only for a moment), and the run ends; resuming begins with the rest of the batch;
3. one prompt after the other fails, or the model is not to be had: the job is paused and says why; who
   resumes it all the same gets one more batch, whose failures are logged;
4. the job cannot work any more (its column was taken, say): the job is cancelled and says why.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl, urlencode

import anyio
from datasette.utils.asgi import BadRequest
from datasette_enrichments import Enrichment, record_progress

from ...enrich import EnrichError, EnrichInputError, EnrichJob, JobSpec
from ...enrich.database import find_database, read
from ...enrich.errors import RowError, concerns_one_row
from ...enrich.plan import make_plan
from ...enrich.reading.table import read_table
from ...enrich.spec import NamedRows
from ...enrich.telling.kinds import group_of
from ...enrich.telling.stopped import REFUSED_REASONS
from ...errors import ModelNotFoundError
from ...facade import LLM
from ...secrecy import redacted
from . import PURPOSE, SLUG
from .form import make_form, spec_fields
from .runs import current_run, new_run
from .visitor import current_visitor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wtforms import Form

    from ...enrich.reading.table import Table
    from ...enrich.sql import SQLValue
    from ...enrich.telling.report import EnrichProgress, EnrichReport
    from ...enrich.writing.results import Outcome, Result
    from .runs import Run

#: How long prompts in flight may take to complete after a cancellation.
CANCEL_GRACE_SECONDS = 5.0
#: How often a batch that is under way looks whether the job has been paused.
STATUS_SECONDS = 0.5
#: So many failures in a row, and the job is paused: the key is wrong, the provider down, a budget spent.
HOPELESS_FAILURES = 20
#: How much of an error a job's page shows.
SHOWN_CHARACTERS = 300


class PromptEnrichment(Enrichment):  # type: ignore[misc]  # datasette-enrichments ships no types
    """Fills columns of a table with a model's answers to a prompt per row."""

    slug = SLUG
    name = "Prompt a language model about each row"
    description = "Fill one or more columns with a model's answers to a prompt made from the row"
    runs_in_process = True
    # Prompts of a batch run at the same time, and its end waits for the slowest: large enough that this
    # costs little.
    batch_size = 100

    async def get_config_form(self, datasette: Any, db: Any, table: str) -> type[Form]:
        visitor = current_visitor()
        models = await LLM(datasette).models(actor=visitor.actor, purpose=PURPOSE)
        return make_form(
            await _find_table(datasette, db, table),
            {model.model_id: bool(model.supports_schema) for model in models},
            may_add_columns=visitor.may_add_columns,
        )

    async def initialize(self, datasette: Any, db: Any, table: str, config: dict[str, Any]) -> None:
        """Refuse what only shows with the rows, such as a prompt that leaves the sandbox."""
        try:
            plan = await make_plan(datasette, _spec(db, table, config))
            await plan.check_first_row()
        except EnrichInputError as error:
            raise BadRequest(redacted(str(error))) from None

    async def enqueue(
        self,
        datasette: Any,
        db: Any,
        table: str,
        filter_querystring: str,
        config: dict[str, Any],
        actor_id: str | None = None,
    ) -> int:
        narrowed = _only_keys(filter_querystring, await _find_table(datasette, db, table))
        job_id: int = await super().enqueue(datasette, db, table, narrowed, config, actor_id)
        return job_id

    async def start_enrichment_in_process(self, datasette: Any, db: Any, job_id: int) -> None:
        async with new_run(datasette, db.name, job_id):
            if await _finished(db, job_id):
                return
            await super().start_enrichment_in_process(datasette, db, job_id)

    async def enrich_batch(
        self,
        datasette: Any,
        db: Any,
        table: str,
        rows: list[dict[str, Any]],
        pks: list[str],
        config: dict[str, Any],
        job_id: int,
        actor_id: str | None = None,
    ) -> int:
        run = current_run()
        keys = [tuple(_from_json(row[name]) for name in pks) for row in rows]
        async with run.job.working:
            run.batch_begins()
            before = await _recorded(db, job_id)
            remaining = tuple(key for key in keys if key not in run.job.written)
            actor = await _actor(datasette, actor_id)
            only = NamedRows(tuple(pks), remaining)
            # How many failures are too many is decided here.
            spec = _spec(db, table, config, actor=actor, only=only, max_failures=len(rows) + 1)
            batch = _Batch(run, db, job_id, spec)
            try:
                report = await self._run_batch(datasette, batch)
            finally:
                run.job.active = None
            if report.stopped is not None or not run.is_newest:
                await self._break_off(batch)
            run.batch_ends()
            run.job.written.clear()
            await self._log(batch)
        return max(0, len(rows) - before - batch.recorded - len(batch.failed))

    async def _run_batch(self, datasette: Any, batch: _Batch) -> EnrichReport:
        job = batch.job = batch.run.job.active = EnrichJob(
            datasette, batch.spec, on_progress=batch.look, on_settled=batch.note
        )
        if not batch.run.is_newest:
            job.stop()
        try:
            report = await job.run()
        except EnrichInputError as error:
            await self._break_off(batch, self.Cancel(redacted(str(error))))
        except (EnrichError, ModelNotFoundError) as error:
            await self._break_off(batch, self.Pause(redacted(str(error))))
        if report.stopped == "database":
            await self._break_off(batch, self.Pause(str(report.trouble)))
        if batch.is_hopeless:
            batch.run.job.insisted = True
            shown = _shown(batch.failed[-1])[:SHOWN_CHARACTERS]
            await self._break_off(batch, self.Pause(f"one prompt after the other failed: {shown}"))
        if report.stopped in REFUSED_REASONS:
            await self._break_off(batch, self.Pause(f"{report.why_stopped}: {report.refusal}"))
        return report

    async def _break_off(self, batch: _Batch, why: Exception | None = None) -> NoReturn:
        """End this run in the middle of a batch.

        Args:
            why: the Pause or Cancel to end with; without it the job's status says already what is to be.
                Nothing in datasette-enrichments stands for that (its Pause would set a status, though the
                person may have resumed meanwhile), but a task that is cancelled ends quietly.
        """
        batch.remember_written()
        await batch.record()
        if isinstance(why, self.Cancel) or await _status(batch.db, batch.job_id) == "cancelled":
            await self._log(batch)
        if why is not None and batch.run.is_newest:
            batch.run.batch_ends()
            raise why
        raise asyncio.CancelledError

    async def _log(self, batch: _Batch) -> None:
        """Enter the rows that failed in datasette-enrichments' own log, those with one error together."""
        alike: dict[str, list[Any]] = {}
        for result in batch.failed:
            alike.setdefault(_shown(result), []).append(_json_key(result.row.key))
        for message, keys in alike.items():
            await self.log_error(batch.db, batch.job_id, keys, message)


class _Batch:
    """One batch while it runs.

    Attributes:
        failed: its rows that failed.
        recorded: how many of its other rows the job's progress shows.
    """

    job: EnrichJob

    def __init__(self, run: Run, db: Any, job_id: int, spec: JobSpec) -> None:
        self.run = run
        self.db = db
        self.job_id = job_id
        self.spec = spec
        self.failed: list[Result] = []
        self.recorded = 0
        self._written: list[Result] = []
        self._failed_in_a_row = 0
        self._patient, run.job.insisted = run.job.insisted, False
        self._look_at = anyio.current_time() + STATUS_SECONDS

    @property
    def is_hopeless(self) -> bool:
        """Whether the provider has answered nothing but errors for long; a row's own do not count."""
        return self._failed_in_a_row >= HOPELESS_FAILURES and not self._patient

    def note(self, outcome: Outcome) -> None:
        self.failed += outcome.failed
        self._written += outcome.written
        refused = sum(
            result.error is not None and not concerns_one_row(result.error) for result in outcome.failed
        )
        self._failed_in_a_row = 0 if outcome.written else self._failed_in_a_row + refused
        if self.is_hopeless:
            self.job.stop("max_failures")

    async def look(self, progress: EnrichProgress) -> None:
        """Stop when the job was paused or cancelled, or another run has taken over; show progress."""
        now = anyio.current_time()
        if now < self._look_at:
            return
        self._look_at = now + STATUS_SECONDS
        status = await _status(self.db, self.job_id)
        if status == "cancelled":
            self.job.stop(grace_seconds=CANCEL_GRACE_SECONDS)
        elif status != "running" or not self.run.is_newest:
            self.job.stop()
        await self.record()

    async def record(self) -> None:
        """Have the job's progress show the rows written so far."""
        new = len(self._written) - self.recorded
        if new > 0:
            self.recorded += new
            await record_progress(self.db, self.job_id, new, 0)

    def remember_written(self) -> None:
        if self.spec.overwrite and self.spec.only is not None:
            # That a row has a value says nothing then.
            self.run.job.written.update(result.row.key for result in self._written)


def _shown(result: Result) -> str:
    if isinstance(result.error, RowError):
        return result.message
    return f"{group_of(result.error, result.kind)}: {result.message}"


def _spec(db: Any, table: str, config: dict[str, Any], **others: Any) -> JobSpec:
    return JobSpec(database=db.name, table=table, purpose=PURPOSE, **spec_fields(config), **others)


async def _find_table(datasette: Any, db: Any, name: str) -> Table:
    try:
        database = find_database(datasette, db.name)
        return await read(database, lambda conn: read_table(conn, name))
    except EnrichInputError as error:
        raise BadRequest(redacted(str(error))) from None


async def _actor(datasette: Any, actor_id: str | None) -> dict[str, Any] | None:
    """Return the actor who started a job; one that no plugin knows any more is just their id."""
    if actor_id is None:
        return None
    actors = await datasette.actors_from_ids([actor_id])
    found: dict[str, Any] | None = actors.get(actor_id)
    return found or {"id": actor_id}


async def _status(db: Any, job_id: int) -> str | None:
    found = (await db.execute("select status from _enrichment_jobs where id = ?", [job_id])).first()
    return found[0] if found else None


async def _finished(db: Any, job_id: int) -> bool:
    """Whether all batches of a job are done; it has this status then, whatever came in between."""
    sql = "update _enrichment_jobs set status = 'finished' where id = ? and finished_at is not null"
    changed: int = (await db.execute_write(sql, [job_id])).rowcount
    return changed > 0


async def _recorded(db: Any, job_id: int) -> int:
    """Return how many rows of this batch the job's progress shows already: it was begun before."""
    sql = """
        select coalesce(sum(success_count + error_count), 0) - (
            select coalesce(done_count, 0) from _enrichment_jobs where id = :id
        ) from _enrichment_progress where job_id = :id
    """
    found = (await db.execute(sql, {"id": job_id})).first()
    return max(0, found[0] or 0)


def _only_keys(querystring: str, table: Table) -> str:
    """Have pages of the table come without columns that nobody reads: they may be large."""
    arguments = parse_qsl(querystring, keep_blank_values=True)
    if any(name in ("_col", "_nocol", "_sort_desc") for name, _ in arguments):
        return querystring
    column = next((column for column in table.columns if column.key_position), table.columns[0])
    return urlencode([*arguments, ("_col", column.name)])


def _from_json(value: Any) -> SQLValue:
    """Return a key as the database has it: Datasette's JSON wraps blobs."""
    if isinstance(value, dict):
        return base64.b64decode(value["encoded"])
    plain: SQLValue = value
    return plain


def _json_key(key: Sequence[SQLValue]) -> Any:
    """Return a key as datasette-enrichments logs it."""
    values = [value if not isinstance(value, bytes) else base64.b64encode(value).decode() for value in key]
    return values[0] if len(values) == 1 else values

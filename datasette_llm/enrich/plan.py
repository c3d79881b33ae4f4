"""A job before it runs: its table, prompt, answers and rows, all checked; nothing is sent here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .answers.outputs import Outputs
from .answers.schema import read_schema
from .attaching import FIRST_ROWS, check_first
from .database import find_database, read, recover, write
from .errors import EnrichInputError, RowError
from .question import QuestionHasher
from .reading.attached import AttachmentTemplate
from .reading.pages import count_rows, first_rows
from .reading.selection import FailedSelection, NamedSelection, Selection
from .reading.stale import StaleSelection
from .reading.table import read_table
from .reading.template import PromptTemplate
from .record.answers import has_no_value_sql, is_answered_by_sql
from .record.batches import has_batches, is_submitted_sql
from .record.runs import find_job, smaller_runs

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Mapping

    from .reading.attached import Attached
    from .reading.selection import Row, Source
    from .reading.table import Table
    from .spec import JobSpec
    from .telling.report import EnrichReport

DRY_RUN_PROMPTS = 3

if TYPE_CHECKING:
    Write = Callable[[Any, Callable[[sqlite3.Connection], None]], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    """What a job works with.

    Attributes:
        database: Datasette's database object.
        schema: the JSON schema of an answer, if there is one.
        job: what runs on the same columns are recorded as, if there was one before.
        hasher: makes the identity of a question, once the model is known.
        options: all that the model is called with, once it is known.
        attachments: the templates of what goes with a prompt.
        takes: the types of attachments that the model takes, once it is known.
        leaves_submitted: there are rows in batches, which are left alone.
    """

    spec: JobSpec
    database: Any
    table: Table
    template: PromptTemplate
    schema: dict[str, Any] | None
    outputs: Outputs
    job: int | None = None
    hasher: QuestionHasher | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    attachments: tuple[AttachmentTemplate, ...] = ()
    takes: frozenset[str] = frozenset()
    leaves_submitted: bool = False

    @property
    def source(self) -> Source:
        """The rows to ask about."""
        rows, only = self.rows, self.spec.only
        if only is not None:
            return NamedSelection(rows, only.columns, only.keys)
        if self.spec.stale and self.job is not None:
            return StaleSelection(rows, self.outputs.existing, self.job, self.question)
        return FailedSelection(rows, self.outputs.label) if self.spec.retry_failed else rows

    @property
    def rows(self) -> Selection:
        spec = self.spec
        done = left = None
        if self.job is not None:
            key = [f"{self.table.sql_name}.{key}" for key in self.table.key]
            done = has_no_value_sql(self.job, key)
            left = is_submitted_sql(self.job, key) if self.leaves_submitted else None
        return Selection(self.table, self.columns, self.outputs.marks, spec.where, spec.replaces, done, left)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a question is made of, in the order of the table."""
        if not self.attachments:
            return self.template.columns
        used = set(self.template.columns).union(*(each.columns for each in self.attachments))
        return tuple(name for name in self.table.column_names if name in used)

    @property
    def may_reuse_earlier(self) -> bool:
        """Whether answers of earlier runs may be given again: not where the user wants new ones."""
        return self.spec.reuse and not self.spec.overwrite

    def for_model(self, model: Any) -> Plan:
        """Return the plan for a model: only now it is known what a question is.

        Args:
            model: as the facade gives it.
        """
        spec = self.spec
        options = {**getattr(model, "default_options", {}), **spec.options}
        hasher = QuestionHasher(model.model_id, options=options, system=spec.system, schema=self.schema)
        takes = frozenset(getattr(model, "attachment_types", ()) or ())
        return replace(self, hasher=hasher, options=options, takes=takes)

    def question(self, row: Row) -> tuple[str, bytes]:
        """Return the prompt of a row, empty if there is nothing to ask, and the hash of what is sent.

        Reads the files that are attached: where there are attachments this belongs in a thread.

        Raises:
            RowError: the prompt cannot be rendered, or an attachment not be read.
        """
        prompt, attached = self.content(row)
        if self.hasher is None or not prompt:
            return prompt, b""
        return prompt, self.hasher.digest(prompt, [each.identity() for each in attached])

    def content(self, row: Row) -> tuple[str, list[Attached]]:
        """Return the prompt of a row and what is attached; it is empty if nothing is that should be.

        Raises:
            RowError: the prompt cannot be rendered, or an attachment not be told.
        """
        prompt = self.template.render(row.values)
        if not prompt or not self.attachments:
            return prompt, []
        attached = [each.refer(row.values) for each in self.attachments]
        there = [each for each in attached if each is not None]
        return (prompt, there) if there else ("", [])

    @property
    def doubts(self) -> list[str]:
        """What is allowed, and hardly meant: in words."""
        doubts: list[str] = []
        own = [name for name in self.outputs.existing if name in self.columns]
        if own and self.spec.overwrite:
            doubts.append(
                f"the prompt is made from {own[0]!r}, which --overwrite replaces: run twice, it asks about "
                "its own answers"
            )
        if not self.columns:
            doubts.append(
                "the prompt uses no column, so that all rows ask the same: {{ column }} stands for a value"
            )
        return doubts

    async def check_attachments(self, model_id: str) -> None:
        """Look at what the first rows have attached.

        Raises:
            EnrichInputError: the model takes none of it.
        """
        if not self.attachments:
            return
        attached = []
        for row in await first_rows(self.database, self.source, FIRST_ROWS):
            with suppress(RowError):
                attached.append(self.content(row)[1])
        await check_first(attached, model_id, self.takes)

    async def check_first_row(self) -> bool:
        """Say whether there is a row, having rendered it: an attempt to leave the sandbox shows then.

        Raises:
            EnrichInputError: there was one.
        """
        rows = await first_rows(self.database, self.source, 1)
        if rows:
            self._shown(rows[0])
        return bool(rows)

    async def incomplete(self) -> tuple[Selection, tuple[str, ...]] | None:
        """Return the rows that were answered with a smaller schema, and the columns that it lacked.

        ``None`` if nothing on record was: of a value that is not, nobody knows what it answers.
        """
        if self.job is None or self.schema is None:
            return None
        names = [output.name for output in self.outputs.columns]
        runs = await read(self.database, partial(smaller_runs, job=self.job, columns=names))
        if not runs:
            return None
        key = [f"{self.table.sql_name}.{key}" for key in self.table.key]
        filled = [f"{self.table.sql_column(name)} is not null" for name in self.outputs.existing]
        conditions = [
            f"({' or '.join([*filled, has_no_value_sql(self.job, key)])})",
            is_answered_by_sql(self.job, key, runs),
        ]
        if self.spec.where and self.spec.where.strip():
            conditions.insert(0, f"({self.spec.where}\n)")
        lacking = {name for missing in runs.values() for name in missing}
        selection = Selection(self.table, (), (), " and ".join(conditions))
        return selection, tuple(name for name in names if name in lacking)

    async def with_columns(self, write: Write = write) -> Plan:
        """Add the output columns that the table lacks; return the plan for the table as it is then."""
        if self._has_columns:
            return self
        # They may be there by now: another program's, or of a try that failed afterwards.
        plan = await self._reread()
        if plan._has_columns:
            return plan
        await write(self.database, partial(plan.outputs.add_columns, table=plan.table))
        return await plan._reread()

    @property
    def _has_columns(self) -> bool:
        return len(self.outputs.existing) == len(self.outputs.columns)

    async def _reread(self) -> Plan:
        table = await read(self.database, partial(read_table, name=self.table.name))
        return replace(self, table=table, outputs=_outputs(self.spec, table, self.schema))

    async def preview(self, report: EnrichReport) -> None:
        """Count the rows and render the first prompts."""
        limit = self.spec.limit
        counted = await count_rows(self.database, self.source)
        report.dry_run = True
        report.total = report.remaining = counted if limit is None else min(counted, limit)
        for row in await first_rows(self.database, self.source, min(DRY_RUN_PROMPTS, report.total)):
            prompt = self._shown(row)
            report.skipped += not prompt
            report.prompts.append(prompt or f"(row {_name(row)} would be skipped: nothing to ask)")

    def _shown(self, row: Row) -> str:
        try:
            prompt, attached = self.content(row)
            return "\n".join([prompt, *(f"[attached: {each}]" for each in attached)])
        except RowError as error:
            return f"(row {_name(row)} would fail: {error})"


def _name(row: Row) -> str:
    return repr(row.key[0] if len(row.key) == 1 else row.key)


def _outputs(spec: JobSpec, table: Table, schema: dict[str, Any] | None) -> Outputs:
    return Outputs(table, spec.column, schema, allow_empty=spec.allow_empty, extract=spec.extract)


async def make_plan(datasette: Any, spec: JobSpec) -> Plan:
    """Look at everything a job needs but its model.

    Raises:
        EnrichInputError: what was asked cannot be done.
    """
    spec.check()
    database = find_database(datasette, spec.database)
    await recover(database, patience_seconds=spec.lock_timeout)
    table = await read(database, partial(read_table, name=spec.table))
    template = PromptTemplate(spec.prompt, table.column_names)
    schema = None if spec.schema is None else read_schema(spec.schema)
    outputs = _outputs(spec, table, schema)
    names = [output.name for output in outputs.columns]
    job = None
    if spec.record and outputs.existing:  # Else a table was made anew, and has nothing that is on record.
        job = await read(database, partial(find_job, table=table.name, columns=names))
    if spec.stale and job is None:
        raise EnrichInputError(
            f"No answers in {table.name!r} ({outputs.label}) are on record, so none can be told to be stale: "
            "--overwrite asks about all rows again"
        )
    attachments = tuple(
        AttachmentTemplate(source, table.column_names, files=spec.files) for source in spec.attachments
    )
    submitted = job is not None and await read(database, has_batches) and not spec.include_submitted
    plan = Plan(
        spec,
        database,
        table,
        template,
        schema,
        outputs,
        job,
        attachments=attachments,
        leaves_submitted=submitted,
    )
    await read(database, plan.rows.check)
    return plan

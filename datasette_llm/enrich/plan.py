"""A job before it runs: its table, prompt, answers and rows, all checked; nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from .database import find_database, read, recover, write
from .errors import RowError
from .reading.pages import count_rows, first_rows
from .reading.selection import FailedSelection, NamedSelection, Selection
from .reading.table import read_table
from .reading.template import PromptTemplate
from .writing.outputs import Outputs
from .writing.schema import read_schema

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable

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
    """

    spec: JobSpec
    database: Any
    table: Table
    template: PromptTemplate
    schema: dict[str, Any] | None
    outputs: Outputs

    @property
    def source(self) -> Source:
        """The rows to ask about."""
        rows, only = self.rows, self.spec.only
        if only is not None:
            return NamedSelection(rows, only.columns, only.keys)
        return FailedSelection(rows, self.outputs.label) if self.spec.retry_failed else rows

    @property
    def rows(self) -> Selection:
        spec = self.spec
        return Selection(self.table, self.template.columns, self.outputs.marks, spec.where, spec.overwrite)

    async def check_first_row(self) -> bool:
        """Say whether there is a row, having rendered it: an attempt to leave the sandbox shows then.

        Raises:
            EnrichInputError: there was one.
        """
        rows = await first_rows(self.database, self.source, 1)
        if rows:
            self._shown(rows[0])
        return bool(rows)

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
            return self.template.render(row.values)
        except RowError as error:
            return f"(row {_name(row)} would fail: {error})"


def _name(row: Row) -> str:
    return repr(row.key[0] if len(row.key) == 1 else row.key)


def _outputs(spec: JobSpec, table: Table, schema: dict[str, Any] | None) -> Outputs:
    return Outputs(table, spec.column, schema, allow_empty=spec.allow_empty)


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
    plan = Plan(spec, database, table, template, schema, outputs)
    await read(database, plan.rows.check)
    return plan

"""From a run on record to a job that does the same: to go on, to retry, or to start from with changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ...enrich.database import read
from ...enrich.errors import EnrichInputError
from ...enrich.reading.table import read_table
from ...enrich.record.keys import noted_key_sql
from ...enrich.record.tables import ANSWERS_TABLE
from ...enrich.spec import JobSpec
from . import PURPOSE

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What a job can be started again as.
Again = Literal["go-on", "retry", "stale"]


def spec_of(run: Mapping[str, Any], database: str, actor: dict[str, Any] | None) -> JobSpec:
    """Return the job that a run did, for somebody who starts it now.

    Raises:
        EnrichInputError: it attached files. Which ones, the rows say: whoever may edit those must not have
            this machine's files sent.
    """
    spec = run["spec"] or {}
    if spec.get("attachments"):
        raise EnrichInputError("This run attached files to its prompts: go on with it with the command")
    return JobSpec(
        database=database,
        table=run["table"],
        prompt=run["prompt"] or "",
        column=spec.get("column"),
        model=run["model"],
        purpose=spec.get("purpose") or PURPOSE,
        actor=actor,
        system=run["system"],
        # As it was given, where that is known: the JSON schema made of it says the same.
        schema=spec.get("schema") or run["schema"],
        options=run["options"] or {},
        where=spec.get("where"),
        limit=spec.get("limit"),
        overwrite=bool(spec.get("overwrite")),
        retry_failed=bool(spec.get("retry_failed")),
        stale=bool(spec.get("stale")),
        extract=spec.get("extract") or False,
        allow_cut=bool(spec.get("allow_cut")),
        allow_empty=bool(spec.get("allow_empty")),
        max_cost=spec.get("max_cost"),
    )


def spec_to_collect(run: Mapping[str, Any], database: str) -> JobSpec:
    """Return the job that collects the batches of a run: whatever its rows were, its answers are paid for.

    Raises:
        EnrichInputError: it attached files.
    """
    spec = spec_of(run, database, None)
    return replace(spec, batch=True, by=run["by"], where=None, limit=None, retry_failed=False, max_cost=None)


async def spec_again(
    database: Any, run: Mapping[str, Any], how: Again, actor: dict[str, Any] | None
) -> JobSpec:
    """Return a job that goes on with a run, retries its failed rows, or asks again where questions changed.

    Raises:
        EnrichInputError: the table is gone, or cannot be written row by row.
    """
    spec = spec_of(run, database.name, actor)
    if how == "retry":
        return replace(spec, retry_failed=True, stale=False, overwrite=False, limit=None)
    if how == "stale":
        return replace(spec, stale=True, retry_failed=False, overwrite=False, limit=None)
    if spec.limit is not None:
        spec = replace(spec, limit=max(1, spec.limit - run["written"] - run["failed"]))
    if spec.overwrite and run["job"] is not None:
        # A value says nothing of whether the row was done then; the record does.
        table = await read(database, partial(read_table, name=spec.table))
        key = noted_key_sql([f"{table.sql_name}.{name}" for name in table.key])
        done = (
            f"exists (select 1 from {ANSWERS_TABLE} where job = {int(run['job'])} and pk = {key}"
            f" and run >= {int(run['id'])})"
        )
        spec = replace(spec, where=f"({spec.where}\n) and not {done}" if spec.where else f"not {done}")
    return spec

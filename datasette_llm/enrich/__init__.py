"""Bulk enrichment: a prompt for every row of a table, the answers in a column of it.

`job` runs a `plan` of what `spec` asks for: rows come from `reading`, `asking` (or another way: `batches`)
has them answered, `answers` judges what came, `writing` and `record` keep it, `ledger` counts, `telling`
shows. Knows nothing of pages or HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .database import LOCKED_SECONDS
from .errors import AlreadyRunning, EnrichError, EnrichInputError
from .job import EnrichJob
from .spec import JobSpec
from .telling.report import EnrichProgress, EnrichReport, FailureKind
from .ways import way_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pydantic import BaseModel

__all__ = [
    "AlreadyRunning",
    "EnrichError",
    "EnrichInputError",
    "EnrichJob",
    "EnrichProgress",
    "EnrichReport",
    "FailureKind",
    "JobSpec",
    "enrich",
]


async def enrich(
    datasette: Any,
    database: str,
    table: str,
    prompt: str,
    *,
    column: str | None = None,
    model: str | None = None,
    purpose: str | None = None,
    actor: dict[str, Any] | None = None,
    system: str | None = None,
    schema: str | Mapping[str, Any] | type[BaseModel] | None = None,
    options: Mapping[str, Any] | None = None,
    where: str | None = None,
    limit: int | None = None,
    concurrency: int | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    stale: bool = False,
    reuse: bool = True,
    record: bool = True,
    dry_run: bool = False,
    attachments: Sequence[str] = (),
    extract: bool | Literal["last"] = False,
    allow_cut: bool = False,
    allow_empty: bool = False,
    max_failures: int | None = None,
    max_tokens_total: int | None = None,
    max_cost: float | None = None,
    deadline: float | None = None,
    wait_for_quota: float | None = None,
    timeout: float | None = None,
    outage_timeout: float | None = None,
    workers: Any = None,
    workers_timeout: float | None = None,
    on_progress: Callable[[EnrichProgress], Any] | None = None,
    lock_timeout: float = LOCKED_SECONDS,
    key: str | None = None,
    batch: bool = False,
    batch_size: int | None = None,
    wait: bool = False,
    batch_cancel: bool = False,
    include_submitted: bool = False,
) -> EnrichReport:
    """Run a prompt for every row that has no value yet, and write the answers into the table.

    Calling it again goes on where it stopped, however that was: answers are written as they arrive
    (fifty rows or half a second to a transaction) and a row with a value is never asked about again.
    A row that fails is recorded in ``_llm_enrich_errors`` and does not stop the others; it still has
    no value, so the next run tries it again. An answer that is not whole (cut off, filtered, refused)
    or empty is a failure too; a row whose prompt renders to nothing is skipped. After cancellation
    everything that was answered is written.
    A refusal that no other row can escape (a wrong key, no money, no such model, a quota that is used
    up), and one that the first rows all get alike, stops the job: those rows are not recorded.

    Args:
        datasette: the Datasette that has the database.
        database: the name it is known by there.
        table: a table; a view cannot be written.
        prompt: a Jinja template over the row: every column is a variable, ``row["odd name"]`` too.
        column: receives the answer; added if it does not exist. With a schema it is optional, and
            receives the whole answer as JSON.
        model: an id or alias; otherwise the configured default for the purpose.
        purpose: what the prompts are for, as configuration and hooks know it.
        actor: the Datasette actor they are for.
        system: a system prompt, the same for every row.
        schema: llm's concise syntax, JSON schema or a pydantic model: one column per property.
        options: options of the model.
        where: an SQL condition on the rows.
        limit: how many rows to ask about at most.
        concurrency: how many prompts are in flight at once; adapts to the provider by default.
        overwrite: also ask about rows that have a value, and replace it.
        retry_failed: only ask about rows that are recorded as failed.
        stale: only ask about rows whose value answers a question that would now be another one: the row,
            the prompt, the model, its options or the schema has changed.
        reuse: rows that ask the same are asked once, across runs too; ``False`` asks for each row.
        record: keep a record of the run and of what each value answers, in the tables ``_llm_runs`` and
            ``_llm_answers`` of the database; without it nothing is reused across runs.
        dry_run: count, render the first prompts, send and write nothing.
        attachments: what goes with each prompt, as templates over the row: ``{{ image_url }}``, an address,
            or ``{{ photo }}``, the content of a BLOB column. A row that has none of them is skipped.
        extract: the first fenced block of an answer is its value, or with ``"last"`` the last one; all of an
            answer that has none.
        allow_cut: write answers that ran out of tokens, too.
        allow_empty: write text answers that are empty, too.
        max_failures: stop when so many rows have failed; else when a hundred prompts in a row have.
        max_tokens_total: stop when about so many tokens, in and out, are spent.
        max_cost: stop when about so many dollars are spent: more than that only by what is in flight. By
            default as configured, else there is no limit. The price of the model has to be known.
        deadline: stop after so many seconds; prompts in flight are still completed.
        timeout: how many seconds one attempt may take; by default as configured.
        outage_timeout: how many seconds a provider that cannot be reached, or refuses whatever is asked, is
            waited for, without using up any row's attempts: half an hour by default, or as configured; but
            ten seconds while it has not answered anything yet, two minutes where it refuses.
        workers: who makes the model calls: a number of local processes, which end with the job, the address
            of a Dask scheduler, a mapping of it and its ``security``, or a ``distributed.Client``; 0 is this
            process itself. By default as configured.
        workers_timeout: how many seconds rows wait while there is no worker: a minute by default.
        wait_for_quota: when the provider's quota is used up, wait for it to come back if that takes no
            longer than so many seconds; by default, and if it does, stop at once.
        on_progress: called a few times a second with an `EnrichProgress`; may be async.
        lock_timeout: how many seconds a database is waited for that is locked, or cannot be written
            for another reason that may pass (a full disk, no file descriptor left). Then the job stops,
            and the answers that are not in the table are in ``<database>-llm-answers.jsonl``, which
            the next run takes up first.
        key: an API key, instead of the configured one.
        batch: have the prompts answered in batches, at half the price and within a day. Submits the rows that
            wait and returns; the same call collects what is done. ``report.batch`` says how it stands.
        batch_size: how many prompts a batch has at most; by default as many as the provider takes.
        wait: with ``batch``: return when all batches are collected.
        batch_cancel: with ``batch``: cancel the batches; what was answered before can still be collected.
        include_submitted: also ask about rows that are in a batch; by default they are left alone.

    Returns:
        What was done; ``report.failed`` counts the rows that failed, and ``report.written`` those whose
        values are in the table.

    Raises:
        EnrichInputError: what was asked cannot be done; nothing was sent and nothing was written.
        AlreadyRunning: another job is writing to this column.
        EnrichError: the database was locked from the start, or cannot be read. One that cannot be
            written any more later on ends the job: ``report.stopped`` is ``"database"`` then.
        ModelNotFoundError: there is no such model, or not for this actor and purpose.
    """
    spec = JobSpec(
        database=database,
        table=table,
        prompt=prompt,
        column=column,
        model=model,
        purpose=purpose,
        actor=actor,
        system=system,
        schema=schema,
        options=dict(options or {}),
        where=where,
        limit=limit,
        concurrency=concurrency,
        overwrite=overwrite,
        retry_failed=retry_failed,
        stale=stale,
        reuse=reuse,
        record=record,
        dry_run=dry_run,
        attachments=tuple(attachments),
        extract=extract,
        allow_cut=allow_cut,
        allow_empty=allow_empty,
        max_failures=max_failures,
        max_tokens_total=max_tokens_total,
        max_cost=max_cost,
        deadline=deadline,
        lock_timeout=lock_timeout,
        wait_for_quota=wait_for_quota,
        timeout=timeout,
        outage_timeout=outage_timeout,
        workers=workers,
        workers_timeout=workers_timeout,
        key=key,
        batch=batch,
        batch_size=batch_size,
        wait=wait,
        batch_cancel=batch_cancel,
        include_submitted=include_submitted,
    )
    return await EnrichJob(datasette, spec, on_progress=on_progress, way=way_of(datasette, spec)).run()

"""The way of a job with batches: what was left is put right, rows are submitted, what is done is taken."""

from __future__ import annotations

import hashlib
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.calls.batches.offline import NotOfflineError
from datasette_llm.calls.batches.protocol import BatchError, NoBatchesError
from datasette_llm.secrecy import redacted

from ..asking import Asking
from ..database import read, write
from ..errors import EnrichError, EnrichInputError
from ..record.batches import count_submitted, open_batches, release_orphans, token_limit
from ..telling.batches import BatchLine, BatchNotes
from ..telling.words import counted
from .collection import Collection, settle_submitted
from .courier import Courier
from .outbox import in_transaction
from .submission import Submission

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container
    from contextlib import AbstractAsyncContextManager

    from datasette_llm.calls.batches.protocol import Batch, BatchProtocol

    from ..ground import Ground
    from ..plan import Plan
    from ..record.batches import BatchRecord
    from ..spec import JobSpec
    from ..sql import SQLValue
    from ..writing.results import Outcome

#: How often a provider is asked how batches stand, while somebody waits.
POLL_SECONDS = 30.0
#: How soon somebody who waits is heard.
HEARD_SECONDS = 0.25
#: Prompts that are recorded or replayed side by side. They wait for nothing but each other.
CONCURRENCY = 8


class BatchWay:
    """Has the rows of a job answered in batches.

    Args:
        datasette: the Datasette that has the database.
        poll_seconds: how often the provider is asked, while somebody waits.
        only: collect these batches of the record, and send nothing; by default all of the same prompt.
    """

    def __init__(
        self,
        datasette: Any,
        *,
        poll_seconds: float = POLL_SECONDS,
        only: Container[int] | None = None,
    ) -> None:
        self._datasette = datasette
        self._only = only
        self.asks = only is None
        self._poll_seconds = poll_seconds
        self._failed: set[tuple[SQLValue, ...]] = set()

    @asynccontextmanager
    async def open_group(self, spec: JobSpec) -> AsyncIterator[Any]:
        """Open the group that requests are recorded in and answers replayed."""
        from datasette_llm.facade import LLM

        group: AbstractAsyncContextManager[Any] = LLM(self._datasette)._offline_group(
            spec.model, purpose=spec.purpose, actor=spec.actor, concurrency=CONCURRENCY
        )
        try:
            async with group as model:
                yield model
        except NotOfflineError as error:
            raise EnrichInputError(f"The model takes no batches: {error}. Do without --batch") from None

    async def has_work(self, plan: Plan) -> bool:
        """Say whether batches are open."""
        if plan.job is None:
            return False
        return bool(await read(plan.database, partial(open_batches, job=plan.job)))

    def settled(self, outcome: Outcome) -> None:
        """Remember which rows have failed: they are not sent again by the same run."""
        self._failed.update(result.row.key for result in outcome.failed)

    async def run(self, ground: Ground) -> None:
        """Recover, submit and collect; with ``--wait`` until nothing is left."""
        plan, spec = ground.plan, ground.plan.spec
        if plan.database.path is None:
            raise EnrichInputError("Batches outlive this process: a database in memory cannot have any")
        protocol, endpoint = await _protocol_of(ground)
        try:
            limit = await read(
                plan.database, partial(token_limit, provider=protocol.name, model=ground.model.model_id)
            )
            courier = Courier(plan.database, protocol, limit)
            try:
                await _Run(self, ground, protocol, courier, self._poll_seconds).go(spec)
            except BatchError as error:
                raise EnrichError(
                    f"The provider cannot be asked about batches: {redacted(str(error))}. "
                    "Run this again later: nothing is lost"
                ) from error
        finally:
            with anyio.CancelScope(shield=True):
                await endpoint.aclose()


class _Run:
    """One run of a job with batches."""

    def __init__(
        self, way: BatchWay, ground: Ground, protocol: BatchProtocol, courier: Courier, poll_seconds: float
    ) -> None:
        self._way = way
        self._ground = ground
        self._protocol = protocol
        self._courier = courier
        self._poll_seconds = poll_seconds
        self._asked = what_is_asked(ground.plan, ground.model.model_id)
        self._notes = ground.report.batch = BatchNotes()
        if ground.recorder is not None:
            ground.recorder.on_settle = settle_submitted

    @property
    def _job(self) -> int | None:
        recorder = self._ground.recorder
        run = recorder.run if recorder is not None else None
        return self._ground.plan.job if run is None else run.job

    async def go(self, spec: JobSpec) -> None:
        try:
            if self._way._only is not None:
                await self._collect()
                return
            await self._recover()
            if spec.batch_cancel:
                await self._cancel()
                return
            # With --overwrite it is not to be seen which rows were collected: no second time.
            if not (spec.overwrite and await self._ours()):
                await self._submit()
            if await self._collect() and self._notes.waiting and not self._is_over:
                # There is room again.
                self._courier.full = False
                await self._submit()
            while spec.wait and not self._is_over and (await self._ours() or self._notes.waiting):
                await self._wait()
                await self._collect()
                if self._notes.waiting and not self._is_over:
                    self._courier.full = False
                    await self._submit()
        finally:
            with anyio.move_on_after(HEARD_SECONDS * 8, shield=True):
                await self._tell()

    @property
    def _is_over(self) -> bool:
        return self._ground.ledger.is_over() and self._ground.ledger.stopping is not None

    async def _ours(self) -> list[BatchRecord]:
        records, only = await self._courier.batches(self._job), self._way._only
        if only is not None:
            records = [record for record in records if record.id in only]
            if any(record.asked != self._asked for record in records):
                raise EnrichInputError(
                    "The batches were submitted with another model, or other options of it, than are "
                    "configured here: the command that submitted them collects them"
                )
        return [record for record in records if record.asked == self._asked]

    async def _recover(self) -> None:
        job = self._job
        if job is None:
            return
        await write(self._ground.plan.database, in_transaction(partial(release_orphans, job=job)))
        for record in await self._courier.batches(job):
            if record.provider == self._protocol.name:
                await self._courier.recover(record, send=not self._ground.plan.spec.batch_cancel)

    async def _cancel(self) -> None:
        for record in await self._ours():
            if await self._courier.cancel(record):
                self._notes.cancelled += 1
            elif record.batch is not None:
                self._notes.uncertain.append(record.batch)

    async def _submit(self) -> None:
        """Submit the rows that wait; again if the provider has said meanwhile how much it takes."""
        ground = self._ground
        while True:
            ours = await self._courier.batches(self._job)
            plan = await self._plan_of_new()
            self._ground.ledger.note = None
            submission = Submission(
                replace(ground, plan=plan),
                self._asking(plan, share=False),
                self._protocol,
                self._courier,
                asked=self._asked,
                enqueued=sum(record.tokens for record in ours),
                not_again=self._way._failed,
            )
            refused = self._courier.refused
            try:
                await submission.run()
            finally:
                ground.report.submitted += submission.rows
                self._notes.waiting = submission.waiting
            if self._courier.refused is not None and self._courier.refused != refused:
                raise EnrichError(f"The provider does not take the batch: {self._courier.refused}")
            if not self._courier.full or self._is_over:
                return
            # It has said how much it takes: smaller batches may have room.
            self._notes.waiting = "the provider takes no more tokens until batches are done"
            if await self._courier.batches(self._job):
                return
            self._courier.full = False

    async def _plan_of_new(self) -> Plan:
        """Return the plan for the rows that are in no batch."""
        plan = await self._ground.plan.with_columns()
        return replace(plan, job=self._job, leaves_submitted=self._job is not None and await self._made())

    async def _made(self) -> bool:
        from ..record.batches import has_batches

        return await read(self._ground.plan.database, has_batches)

    def _asking(self, plan: Plan, *, share: bool = True) -> Asking:
        ground = self._ground
        return Asking(
            plan,
            ground.model,
            ground.writer,
            ground.ledger,
            ground.report,
            ground.stop,
            ground.log,
            batch=True,
            share=share,
        )

    async def _collect(self) -> int:
        """Take what is done, what expires first first; return how many batches are over."""
        job = self._job
        records = await self._ours()
        if job is None or not records:
            return 0
        ledger, report = self._ground.ledger, self._ground.report
        ledger.counted = report.done + await read(
            self._ground.plan.database, partial(count_submitted, job=job)
        )
        # Whatever condition or limit this run has: what is in the batches has been paid for.
        plan = replace(self._ground.plan, spec=replace(self._ground.plan.spec, where=None), job=job)
        plan = replace(await plan.with_columns(), hasher=plan.hasher, leaves_submitted=False)
        collection = Collection(self._ground, plan, self._asking(plan), self._protocol, job)
        running: list[tuple[BatchRecord, Batch]] = []
        over = 0
        for record in records:
            if self._is_over or record.batch is None:
                break
            batch = await self._courier.look(record)
            if batch is None:
                over += 1
            elif batch.state == "ended":
                if await self._courier.is_proved(record, batch):
                    over += await collection.take(record, batch)
            else:
                running.append((record, batch))
        ledger.note = _note(running)
        report.returned += collection.returned
        self._notes.odd += collection.odd
        return over

    async def _wait(self) -> None:
        """Wait until the provider is to be asked again, or somebody stops the job."""
        waited = 0.0
        while waited < self._poll_seconds and not self._is_over:
            await anyio.sleep(min(HEARD_SECONDS, self._poll_seconds))
            waited += HEARD_SECONDS

    async def _tell(self) -> None:
        """Say what is left."""
        report, notes = self._ground.report, self._notes
        notes.submitted, notes.refused = self._courier.sent, self._courier.refused
        report.returned += self._courier.returned
        self._courier.returned = 0
        job = self._job
        if job is None:
            return
        records = await self._courier.batches(job)
        notes.left = [
            BatchLine(record.batch, record.says, record.requests, record.answered, record.expires)
            for record in records
            if record.asked == self._asked
        ]
        notes.others = len(records) - len(notes.left)
        report.in_batches = await read(self._ground.plan.database, partial(count_submitted, job=job))


async def _protocol_of(ground: Ground) -> tuple[BatchProtocol, Any]:
    """Return how the model's provider takes batches."""
    from datasette_llm.calls.batches.known import batches_of

    keywords = ground.plan.spec.prompt_keywords(ground.plan.schema)
    try:
        return batches_of(await ground.model._sample_request(**keywords))
    except (NotOfflineError, NoBatchesError) as error:
        raise EnrichInputError(
            f"The model {ground.model.model_id!r} takes no batches: {error}. Do without --batch"
        ) from None


def what_is_asked(plan: Plan, model_id: str) -> str:
    """Return a hash of what the questions of a job have in common: by it a run knows its batches."""
    asked = {
        "model": model_id,
        "prompt": plan.spec.prompt,
        "system": plan.spec.system,
        "schema": plan.schema,
        "attachments": list(plan.spec.attachments),
        "options": dict(plan.options),
        "columns": [output.name.lower() for output in plan.outputs.columns],
    }
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _note(running: list[tuple[BatchRecord, Batch]]) -> str | None:
    """Return how the batches stand that are waited for."""
    if not running:
        return None
    total = sum(batch.total or record.requests for record, batch in running)
    answered = sum(batch.answered for _, batch in running)
    states = sorted({batch.says.replace("_", " ") for _, batch in running})
    if answered >= total:
        return f"all answered, the provider is {' and '.join(states)}"
    batches = counted(len(running), "batch", "batches")
    return f"{batches} {' and '.join(states)}, {answered:,} of {total:,} answered"

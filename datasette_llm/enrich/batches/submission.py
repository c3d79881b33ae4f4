"""Rows into batches: each prompt is recorded as a line of a file, and rows that ask the same share one."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.calls.batches.offline import Exchange, NotOfflineError, is_recorded
from datasette_llm.calls.batches.protocol import NoBatchesError
from datasette_llm.calls.prices import Usage
from datasette_llm.errors import PromptCancelled

from ..asking import prompt_of
from ..database import read, write
from ..errors import EnrichInputError
from ..record.batches import add_rows, find_asked, has_batches
from .outbox import BYTES_A_TOKEN, in_transaction, open_outbox

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncGenerator

    from datasette_llm.calls.batches.protocol import BatchProtocol
    from datasette_llm.responses.response import PromptResponse

    from ..asking import Asked, Asking
    from ..ground import Ground
    from ..reading.selection import Row
    from ..sql import SQLValue
    from .courier import Courier
    from .outbox import Outbox

#: Rows whose questions are looked for in batches in one go.
PAGE_ROWS = 200
#: As many where each has files, which are in memory until the row is sent.
PAGE_ROWS_WITH_FILES = 8
#: An answer whose length nobody knows is taken to have so many tokens where the cost is limited.
ANSWER_TOKENS = 500
#: How long it may take to forget a batch that is not complete.
CLEAN_UP_SECONDS = 10.0
#: Why a run was stopped by somebody who does not want what is not sent yet to be sent.
_INTERRUPTED = ("SIGINT", "SIGTERM", "stopped")


class Submission:
    """Puts the rows of a job that wait into batches, and has these sent.

    Args:
        asking: with the rows.
        asked: what is asked, as a hash.
        enqueued: tokens that are with the provider already.
        not_again: rows that have failed in this run.

    Attributes:
        rows: how many rows are in batches that were sent.
        waiting: why there are rows left, if that is so.
    """

    def __init__(
        self,
        ground: Ground,
        asking: Asking,
        protocol: BatchProtocol,
        courier: Courier,
        *,
        asked: str,
        enqueued: int,
        not_again: set[tuple[SQLValue, ...]],
    ) -> None:
        self._ground = ground
        self._asking = asking
        self._protocol = protocol
        self._courier = courier
        self._asked = asked
        self._enqueued = enqueued
        self._not_again = not_again
        self._outbox: Outbox | None = None
        self._exchanges: dict[bytes, Exchange] = {}
        self._sharing: dict[bytes, list[Row]] = {}
        # The batches of questions whose rows may not be recorded yet.
        self._recent: dict[bytes, int] = {}
        self._joined: list[tuple[tuple[SQLValue, ...], bytes, int]] = []
        self._cost = 0.0
        self.rows = 0
        self.waiting: str | None = None

    async def run(self) -> None:
        """Go over the rows that wait; returns when all are sent, or no more can be.

        Raises:
            EnrichInputError: the model's requests cannot be sent in batches.
            EnrichError: the provider cannot be told now.
        """
        ground = self._ground
        pairs = ground.model.map(self._new(), self._to_prompt, **self._asking.keywords)
        try:
            async with aclosing(pairs):
                async for asked, response in pairs:
                    if not await self._take(asked, response):
                        break
            if self._outbox is not None and ground.ledger.stopping not in _INTERRUPTED:
                await self._send()
        finally:
            for _ in self._exchanges:
                ground.ledger.leave()
            with anyio.move_on_after(CLEAN_UP_SECONDS, shield=True):
                await self._flush_joined()
                if self._outbox is not None:
                    outbox, self._outbox = self._outbox, None
                    await outbox.discard()

    def _to_prompt(self, asked: Asked) -> str | dict[str, Any]:
        exchange = self._exchanges[asked.question] = Exchange()
        exchange.use()
        return prompt_of(asked)

    async def _new(self) -> AsyncGenerator[Asked, None]:
        """Yield the rows whose questions are in no batch yet."""
        page: list[Asked] = []
        async with aclosing(self._asking.work()) as work:
            async for asked in work:
                if asked.row.key in self._not_again:
                    self._ground.ledger.leave()
                    continue
                page.append(asked)
                if len(page) >= (PAGE_ROWS if not asked.attachments else PAGE_ROWS_WITH_FILES):
                    async for each in self._unasked(page):
                        yield each
                    page = []
        async for each in self._unasked(page):
            yield each

    async def _unasked(self, page: list[Asked]) -> AsyncGenerator[Asked, None]:
        found = await self._find({asked.question for asked in page})
        for asked in page:
            question = asked.question
            if question in self._sharing:
                self._sharing[question].append(asked.row)
            elif question in self._recent or question in found:
                batch = self._recent.get(question) or found[question]
                self._joined.append((asked.row.key, question, batch))
                self._ground.ledger.submit(asked.row)
            else:
                self._sharing[question] = []
                yield asked

    async def _find(self, questions: set[bytes]) -> dict[bytes, int]:
        """Return the batches that these questions are in, as they are recorded."""
        await self._flush_joined()
        recent = list(self._recent)
        if self._outbox is not None:
            await self._outbox.flush()
        for question in recent:
            self._recent.pop(question, None)
        job = self._job
        if job is None or not questions:
            return {}

        def find(conn: sqlite3.Connection) -> dict[bytes, int]:
            return find_asked(conn, job, questions) if has_batches(conn) else {}

        return await read(self._ground.plan.database, find)

    async def _flush_joined(self) -> None:
        """Record the rows that ask what is in a batch already."""
        joined, self._joined = self._joined, []
        if joined and self._job is not None:
            add = partial(add_rows, job=self._job, rows=joined)
            await write(self._ground.plan.database, in_transaction(add))
            self.rows += len(joined)

    @property
    def _job(self) -> int | None:
        recorder = self._ground.recorder
        run = recorder.run if recorder is not None else None
        return self._ground.plan.job if run is None else run.job

    async def _take(self, asked: Asked, response: PromptResponse) -> bool:
        """Put in what was recorded; say whether to go on."""
        exchange, error = self._exchanges.pop(asked.question), response.error
        if isinstance(error, NotOfflineError):
            raise EnrichInputError(_no_batches(self._ground, str(error)))
        if not is_recorded(error):
            self._leave(asked.question)
            if error is None or isinstance(error, PromptCancelled):
                self._ground.ledger.leave()
            else:
                self._asking.fail(asked, error, response)
            return True
        assert exchange.request is not None
        try:
            line = self._protocol.line(asked.question.hex(), exchange.request)
        except NoBatchesError as refusal:
            raise EnrichInputError(_no_batches(self._ground, str(refusal))) from None
        if self._outbox is not None and self._outbox.requests and not self._fits(len(line) + 1):
            await self._send()
        tokens = (0 if self._outbox is None else self._outbox.tokens) + len(line) // BYTES_A_TOKEN
        if not self._courier.has_room(tokens, self._enqueued):
            self.waiting = (
                "the provider takes no more tokens until batches are done; the same command sends them then"
            )
            self._ground.ledger.leave()
            self._leave(asked.question)
            return False
        outbox = await self._opened()
        # Nothing is awaited in between: a row that asks the same finds its place before and after.
        outbox.add(line)
        self._recent[asked.question] = outbox.id
        for row in (asked.row, *self._sharing.pop(asked.question, ())):
            outbox.add_row(row.key, asked.question)
            self._ground.ledger.submit(row)
        if outbox.crowded:
            await outbox.flush()
        return self._is_affordable(len(line))

    def _leave(self, question: bytes) -> None:
        """Rows that wait for a question which is not sent are for the next run."""
        for _ in self._sharing.pop(question, ()):
            self._ground.ledger.leave()

    def _fits(self, size: int) -> bool:
        outbox, limits = self._outbox, self._limits
        assert outbox is not None
        tokens = outbox.tokens + size // BYTES_A_TOKEN
        most = self._courier.token_limit
        return (
            outbox.requests < limits
            and outbox.size + size <= self._protocol.limits.size
            and (most is None or tokens <= most)
        )

    @property
    def _limits(self) -> int:
        asked, allowed = self._ground.plan.spec.batch_size, self._protocol.limits.requests
        return allowed if asked is None else min(asked, allowed)

    def _is_affordable(self, size: int) -> bool:
        """Whether another row may be sent; the cost is an estimate, since it is known when it is done."""
        most, pricing = self._ground.plan.spec.max_cost, self._ground.model.pricing
        if most is None or pricing is None:
            return True
        self._cost += pricing.cost(Usage(size // BYTES_A_TOKEN, ANSWER_TOKENS)) or 0.0
        if self._cost < most:
            return True
        self._ground.stop("max_cost")
        return False

    async def _opened(self) -> Outbox:
        if self._outbox is None:
            ground = self._ground
            assert ground.recorder is not None
            self._outbox, _ = await open_outbox(
                ground.plan.database,
                ground.recorder,
                asked=self._asked,
                provider=self._protocol.name,
                model=ground.model.model_id,
            )
        return self._outbox

    async def _send(self) -> None:
        """Complete the batch that is written, and have it begun."""
        outbox = self._outbox
        assert outbox is not None
        await outbox.seal()
        self._outbox = None
        before = self._courier.returned
        await self._courier.send(outbox.id, outbox.reference, outbox.requests, outbox.tokens)
        if self._courier.returned == before:
            self._enqueued += outbox.tokens
            self.rows += outbox.rows


def _no_batches(ground: Ground, why: str) -> str:
    return f"The model {ground.model.model_id!r} takes no batches: {why}. Do without --batch"

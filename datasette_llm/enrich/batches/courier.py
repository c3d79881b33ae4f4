"""Batches on their way to the provider and back: each step is recorded before it is taken.

What a killed process leaves is found by the next one. A batch whose file was complete is sent; one that may
have been begun at the provider is looked for there first, by the reference in its metadata.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.calls.batches.http import may_pass
from datasette_llm.calls.batches.protocol import BatchError
from datasette_llm.secrecy import redacted

from ..database import read, write
from ..errors import EnrichError
from ..record.batches import change_batch, is_asked_in, known_ids, open_batches
from .outbox import discard, file_of, in_transaction, remove_file

if TYPE_CHECKING:
    import sqlite3

    from datasette_llm.calls.batches.protocol import Batch, BatchProtocol

    from ..record.batches import BatchRecord

logger = logging.getLogger("datasette_llm")

#: How often a step is tried whose failure may pass, and how long is waited in between, in seconds.
TRIES, PAUSE_SECONDS = 4, 5.0
#: A batch that may have been begun is in the provider's list after so many seconds, if it was.
LISTED_SECONDS = 10.0
#: Whose results they are, so many lines tell: each names its question.
LINES_TO_TELL = 20

_LIMIT = re.compile(r"limit:?\s*(?:is|of)?\s*([\d,]{3,})", re.IGNORECASE)
_LIMIT_CODES = ("token_limit_exceeded", "enqueued_token_limit_exceeded")


class Courier:
    """Brings the batches of one job to a provider, and tells how they stand.

    Attributes:
        token_limit: how many tokens the provider lets be enqueued, once it has said so.
        full: the provider takes no more for now.
        refused: why it did not take a batch, where that will not pass.
        returned: rows that wait again, since their batch was not begun.
        sent: how many batches were begun.
    """

    def __init__(self, database: Any, protocol: BatchProtocol, token_limit: int | None) -> None:
        self._database = database
        self._protocol = protocol
        self.token_limit = token_limit
        self.full = False
        self.refused: str | None = None
        self.returned = 0
        self.sent = 0

    async def batches(self, job: int | None) -> list[BatchRecord]:
        """Return the open batches of a job, what expires first first."""
        if job is None:
            return []
        found: list[BatchRecord] = await read(self._database, partial(open_batches, job=job))
        return found

    async def _change(self, number: int, **values: Any) -> None:
        def change(conn: sqlite3.Connection) -> None:
            change_batch(conn, number, **values)

        await write(self._database, in_transaction(change))

    async def recover(self, record: BatchRecord, *, send: bool = True) -> None:
        """Bring a batch on its way that a run before left somewhere on it.

        Args:
            send: have it begun if it has not been.
        """
        if record.state == "creating" and await self._is_found(record):
            return
        if not send:
            return
        if record.state in ("prepared", "creating") and file_of(self._database, record.reference).exists():
            await self.send(record.id, record.reference, record.requests, record.tokens)
        elif record.state not in ("running", "adopted"):
            self.returned += await discard(
                self._database, record.id, record.reference, error="it was not complete"
            )

    async def _is_found(self, record: BatchRecord) -> bool:
        """Look for a batch that may have been begun; it is listed a little later."""
        since = float(record.attempted or 0)
        while True:
            found = await self._find(record.id, record.reference, record.requests, since)
            wait = since + LISTED_SECONDS - time.time()
            if found or wait <= 0:
                return found
            await anyio.sleep(min(wait, 1.0))

    async def _find(self, number: int, reference: str, requests: int, since: float) -> bool:
        """Look for a batch at the provider, and take it if it is there."""
        known = await read(self._database, known_ids)
        for batch in await self._protocol.find(reference, since, requests):
            if self._protocol.has_references:
                await self._running(number, reference, batch)
                return True
            if batch.id in known:
                continue
            if batch.state != "ended":
                await self._running(number, reference, batch, state="adopted")
                return True
            if await self._is_this(number, batch):
                await self._running(number, reference, batch)
                return True
        return False

    async def _is_this(self, number: int, batch: Batch) -> bool:
        """Say by the results of a batch that is over whether it is this one of the record."""
        asked: list[bytes] = []
        lines = 0
        async with aclosing(self._protocol.results(batch)) as results:
            async for text in results:
                with suppress(ValueError, BatchError, RecursionError):
                    custom_id = self._protocol.read(text).custom_id
                    lines += 1
                    with suppress(ValueError):  # Of somebody else, who names requests otherwise.
                        asked.append(bytes.fromhex(custom_id))
                if lines >= LINES_TO_TELL:
                    break
        # What says nothing does no harm: those rows wait again.
        return not lines or await read(self._database, partial(is_asked_in, batch=number, questions=asked))

    async def is_proved(self, record: BatchRecord, batch: Batch) -> bool:
        """Say whether a batch that is over is the one on record; another is looked for if it is not."""
        if record.state != "adopted":
            return True
        if await self._is_this(record.id, batch):
            await self._change(record.id, state="running")
            return True
        if not await self._find(record.id, record.reference, record.requests, float(record.attempted or 0)):
            why = "it was never begun: the batch that was taken for it is another's"
            self.returned += await discard(self._database, record.id, record.reference, error=why)
        return False

    def has_room(self, tokens: int, enqueued: int) -> bool:
        """Say whether the provider takes a batch of so many tokens beside those that are with it."""
        return not self.full and (self.token_limit is None or tokens + enqueued <= self.token_limit)

    async def send(self, number: int, reference: str, requests: int, tokens: int) -> None:
        """Have the provider begin a batch whose file is complete.

        Raises:
            EnrichError: it cannot be told now; the batch stays prepared.
        """
        path = file_of(self._database, reference)
        uploaded = await _patiently(partial(self._protocol.upload, path, reference))
        tries = 0
        while True:
            attempted = int(time.time())
            await self._change(number, state="creating", attempted=attempted)
            try:
                batch = await self._protocol.create(path, uploaded, reference)
            except BatchError as error:
                tries += 1
                if error.sent:
                    await self._may_have_begun(number, reference, requests, attempted, error)
                    return
                if _is_limit(error.code, str(error)):
                    await self._too_many(number, reference, tokens, str(error))
                    return
                if not may_pass(error):
                    self.refused = redacted(str(error))
                    self.returned += await discard(self._database, number, reference, error=self.refused)
                    return
                await self._change(number, state="prepared")
                if tries >= TRIES:
                    raise _unsent(error) from error
                await anyio.sleep(PAUSE_SECONDS)
            else:
                await self._running(number, reference, batch)
                await self._note(number, reference, tokens, batch)
                return

    async def _may_have_begun(
        self, number: int, reference: str, requests: int, attempted: int, error: BatchError
    ) -> None:
        for tries in range(TRIES):
            if await self._find(number, reference, requests, attempted):
                return
            await anyio.sleep(PAUSE_SECONDS * tries / TRIES)
        raise _unsent(error) from error

    async def _running(self, number: int, reference: str, batch: Batch, *, state: str = "running") -> None:
        expires = None if batch.expires is None else _moment(batch.expires)
        await self._change(number, state=state, batch=batch.id, says=batch.says, expires=expires)
        self.sent += 1
        remove_file(self._database, reference)

    async def look(self, record: BatchRecord) -> Batch | None:
        """Ask how a batch stands, and record it; ``None`` if nothing can come of it any more.

        Raises:
            BatchError: the provider does not say.
        """
        assert record.batch is not None
        try:
            batch = await self._protocol.look(record.batch)
        except BatchError as error:
            if error.status not in (404, 410):
                raise
            self.returned += await discard(
                self._database, record.id, record.reference, error="the provider does not know it"
            )
            return None
        if await self._note(record.id, record.reference, record.tokens, batch):
            return None
        changes: dict[str, Any] = {}
        if (batch.says, batch.answered) != (record.says, record.answered):
            changes = {"says": batch.says, "answered": batch.answered}
        if batch.expires is not None and _moment(batch.expires) != record.expires:
            changes["expires"] = _moment(batch.expires)
        if changes:
            await self._change(record.id, **changes)
        return batch

    async def _note(self, number: int, reference: str, tokens: int, batch: Batch) -> bool:
        """Take note of a batch that was never begun; say whether it is one."""
        if batch.state != "failed":
            return False
        message = redacted(batch.message or batch.says)
        if _is_limit(batch.code, message):
            await self._too_many(number, reference, tokens, message)
        else:
            self.refused = message
            self.returned += await discard(self._database, number, reference, says=batch.says, error=message)
        return True

    async def _too_many(self, number: int, reference: str, tokens: int, message: str) -> None:
        """The provider has no room for so many tokens: find out for how many it has, and keep that."""
        said = _LIMIT.search(message)
        limit = int(said[1].replace(",", "")) if said else max(1, tokens // 2)
        self.token_limit = limit if self.token_limit is None else min(limit, self.token_limit)
        self.full = True
        self.returned += await discard(
            self._database, number, reference, error=redacted(message), token_limit=self.token_limit
        )

    async def cancel(self, record: BatchRecord) -> bool:
        """Cancel a batch; what it has answered can still be collected. One that may be another's is not."""
        if record.state == "adopted":
            return False
        if record.batch is None:
            await discard(self._database, record.id, record.reference, error="cancelled before it was sent")
            return True
        await self._protocol.cancel(record.batch)
        await self._change(record.id, says="cancelling")
        return True


async def _patiently(upload: Any) -> str:
    for tries in range(TRIES):
        try:
            uploaded: str = await upload()
            return uploaded
        except BatchError as error:
            if not may_pass(error) or tries == TRIES - 1:
                raise _unsent(error) from error
        await anyio.sleep(PAUSE_SECONDS)
    raise AssertionError  # the last try raises


def _unsent(error: BatchError) -> EnrichError:
    return EnrichError(
        f"A batch could not be sent: {redacted(str(error))}. It is kept, and the same command sends it: "
        "nothing is sent twice"
    )


def _is_limit(code: str | None, message: str) -> bool:
    return code in _LIMIT_CODES or "enqueued token" in message.lower()


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

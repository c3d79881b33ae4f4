"""Responses of a job in llm's own log database, where ``llm logs`` finds them.

Its task belongs to the job's task group. It writes some responses at a time, in a thread; whoever adds one
waits only while very many are unwritten. What goes wrong there never ends a job: it is said once, and then
nothing is logged any more.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.secrecy import redacted

if TYPE_CHECKING:
    from pathlib import Path

    from datasette_llm.responses.response import PromptResponse

logger = logging.getLogger("datasette_llm")

#: Responses in one transaction, and how many may wait for theirs.
BATCH = 50
MOST_UNWRITTEN = 500
#: How long the rest may take when the job has ended, in seconds.
CLOSE_SECONDS = 30.0
LOCKED_SECONDS = 10.0


class LlmLog:
    """Logs the responses of one job.

    Args:
        path: of llm's log database; by default where llm keeps it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._send, self._receive = anyio.create_memory_object_stream[Any](MOST_UNWRITTEN)
        self._ended = anyio.Event()

    async def add(self, response: PromptResponse) -> None:
        """Have a complete response written."""
        if not self._ended.is_set():
            try:
                await self._send.send(response)
            except anyio.BrokenResourceError:
                pass  # It failed meanwhile, and has said so.

    async def run(self) -> None:
        """Write what is added until `aclose`, or until that fails."""
        try:
            with self._receive:
                async for response in self._receive:
                    batch = [response]
                    while len(batch) < BATCH and self._receive.statistics().current_buffer_used:
                        batch.append(self._receive.receive_nowait())
                    await anyio.to_thread.run_sync(self._write, batch)
        except Exception as error:
            words = redacted(f"{type(error).__name__}: {error}")
            logger.warning("Responses are not logged for llm logs: %s; the job goes on", words)
        finally:
            self._ended.set()

    async def aclose(self) -> None:
        """Write the rest; no more are added."""
        self._send.close()
        with anyio.move_on_after(CLOSE_SECONDS) as scope:
            await self._ended.wait()
        if scope.cancelled_caught:
            logger.warning("The last responses are not in llm's log: writing them took too long")

    def _write(self, batch: list[PromptResponse]) -> None:
        import llm
        import sqlite_utils
        from llm.migrations import migrate

        path = self._path or llm.user_dir() / "logs.db"
        with closing(sqlite3.connect(path, timeout=LOCKED_SECONDS)) as conn:
            database = sqlite_utils.Database(conn)
            migrate(database)
            # Older versions of sqlite-utils commit each response by itself.
            with getattr(database, "atomic", nullcontext)():
                for response in batch:
                    response.log_to_db(database)
            conn.commit()

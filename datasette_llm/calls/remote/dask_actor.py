"""What lives in a Dask worker: one bench, on an event loop and in a thread of its own.

Dask's own loop only carries parcels. It awaits these methods; it never runs a model's code.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import anyio
from anyio.from_thread import BlockingPortal

from .bench import Bench

if TYPE_CHECKING:
    from collections.abc import Callable

#: How long the thread may take to start, in seconds.
START_SECONDS = 10.0


class BenchActor:
    """Dask's actor: bytes in, bytes out."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._bench: Bench | None = None
        self._portal: BlockingPortal | None = None
        thread = threading.Thread(
            target=anyio.run, args=(self._main,), name="datasette-llm bench", daemon=True
        )
        thread.start()
        if not self._started.wait(START_SECONDS):
            raise TimeoutError("the thread of a worker did not start")

    async def _main(self) -> None:
        self._bench = Bench()
        async with BlockingPortal() as self._portal, anyio.create_task_group() as tasks:
            await tasks.start(self._bench.run)
            self._started.set()

    async def _there(self, method: Callable[..., Any], *arguments: Any) -> Any:
        assert self._portal is not None
        return await asyncio.wrap_future(self._portal.start_task_soon(method, *arguments))

    async def ask(self, request: bytes) -> bytes:
        """Answer what is asked before calls are sent."""
        assert self._bench is not None
        return bytes(await self._there(self._bench.ask, request))

    async def send(self, parcel: bytes) -> None:
        """Begin the calls of a parcel, and cancel those it names."""
        assert self._bench is not None
        await self._there(self._bench.take, parcel)

    async def poll(self, acknowledged: int) -> bytes:
        """Return what came of calls, as soon as there is something."""
        assert self._bench is not None
        return bytes(await self._there(self._bench.poll, acknowledged))

    async def end(self) -> None:
        """Cancel what runs, and end the thread."""
        assert self._bench is not None
        await self._there(self._bench.end)

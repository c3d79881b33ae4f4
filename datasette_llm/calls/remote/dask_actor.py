"""What lives in a Dask worker: one bench, on an event loop and in a thread of its own.

Dask's own loop only carries parcels. It awaits these methods; it never runs a model's code.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import anyio
from anyio.from_thread import BlockingPortal

from .bench import Bench

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("datasette_llm")

#: How long the thread may take to start, in seconds.
START_SECONDS = 20.0
#: What a Dask worker is asked for when a bench is meant.
OPERATION = "datasette_llm_bench"
_METHODS = frozenset({"ask", "send", "poll", "end"})

_actors: dict[str, BenchActor] = {}


class BenchActor:
    """One coordinator's bench: bytes in, bytes out."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._started: Future[None] = Future()
        self._bench: Bench | None = None
        self._portal: BlockingPortal | None = None
        self._thread = threading.Thread(target=self._run, name="datasette-llm bench", daemon=True)

    async def start(self) -> None:
        """Start the thread.

        Raises:
            TimeoutError: it did not begin to work.
        """
        _actors[self._key] = self
        self._thread.start()
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._started), START_SECONDS)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the thread of a worker did not start in {START_SECONDS:g} seconds") from None

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as error:
            if self._started.done():
                logger.exception("A worker's thread ended")
            else:
                self._started.set_exception(error)
        finally:
            _actors.pop(self._key, None)

    async def _main(self) -> None:
        self._bench = Bench()
        async with BlockingPortal() as self._portal, anyio.create_task_group() as tasks:
            await tasks.start(self._bench.run)
            self._started.set_result(None)

    async def _there(self, method: Callable[..., Any], *arguments: Any) -> Any:
        assert self._portal is not None
        return await asyncio.wrap_future(self._portal.start_task_soon(method, *arguments))

    async def ask(self, request: bytes) -> bytes:
        """Answer what is asked before calls are sent."""
        assert self._bench is not None
        return bytes(await self._there(self._bench.ask, request))

    async def send(self, parcel: bytes) -> bytes:
        """Begin the calls of a parcel, and cancel those it names."""
        assert self._bench is not None
        await self._there(self._bench.take, parcel)
        return b""

    async def poll(self, acknowledged: int) -> bytes:
        """Return what came of calls, as soon as there is something."""
        assert self._bench is not None
        return bytes(await self._there(self._bench.poll, acknowledged))

    async def end(self) -> bytes:
        """Cancel what runs, and end the thread."""
        assert self._bench is not None
        await self._there(self._bench.end)
        return b""


async def open_bench(key: str, dask_worker: Any) -> None:
    """Begin to work for a coordinator: runs in a Dask worker, which fills in itself."""
    dask_worker.handlers[OPERATION] = carry
    await BenchActor(key).start()


async def carry(bench: str, method: str, arguments: list[Any]) -> bytes:
    """Have a bench do something: what a Dask worker calls for a message of this operation.

    Raises:
        LookupError: it has ended.
    """
    actor = _actors.get(bench)
    if actor is None or method not in _METHODS:
        raise LookupError("this worker's bench has ended")
    answer: bytes = await getattr(actor, method)(*arguments)
    return answer

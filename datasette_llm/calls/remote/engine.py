"""The thread in which a fleet lives, with its connection to a scheduler or a cluster of local processes.

In a thread of its own it works the same for asyncio and for trio, and a server's event loop stays free of it.
Whoever uses the same workers at the same time shares one.
"""

from __future__ import annotations

import atexit
import logging
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from ...backends.loops import LoopDoor
from ...errors import WorkersError
from .dask_source import DaskSource, load_distributed
from .fleet import Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..workers import Workers

logger = logging.getLogger("datasette_llm")

#: How long the first local process may take to start, in seconds: one where others leave it room.
START_SECONDS = 300.0
#: How long the thread may take to begin: it makes certificates, and the scheduler of local processes.
BEGIN_SECONDS = 120.0
#: How long the thread may take to end, in seconds, when the process does.
END_SECONDS = 5.0

_engines: dict[Workers, Engine] = {}
_lock = threading.Lock()


class Engine:
    """One thread with one fleet; ends some time after the last one who holds it.

    Attributes:
        fleet: its workers.
    """

    def __init__(self, workers: Workers) -> None:
        # Processes of this machine do come, however busy it is.
        self.fleet = Fleet(workers.timeout, start=0.0 if workers.count is None else START_SECONDS)
        self._workers = workers
        self._holders = 0
        self._door: LoopDoor | None = None
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="datasette-llm workers", daemon=True)

    def _main(self) -> None:
        try:
            anyio.run(self._run)
        except BaseException as error:
            self._error = error
            if self._started.is_set():
                logger.error("The workers have ended: %s", error, exc_info=error)
        finally:
            with _lock:
                self._forget()
            self._started.set()

    def _forget(self) -> None:
        if _engines.get(self._workers) is self:
            del _engines[self._workers]

    async def _run(self) -> None:
        async with _source(self._workers) as source, anyio.create_task_group() as tasks:
            self._changed = anyio.Event()
            self._door = LoopDoor()

            def started() -> None:
                self._started.set()

            async def work() -> None:
                await self.fleet.run(source, started=started)

            tasks.start_soon(work)
            await self._until_unused()
            tasks.cancel_scope.cancel()

    async def _until_unused(self) -> None:
        while True:
            with _lock:
                held = self._holders
                self._changed = anyio.Event()
            if held:
                await self._changed.wait()
                continue
            with anyio.move_on_after(0.0 if _ending else self._workers.linger):
                await self._changed.wait()
            with _lock:
                if not self._holders:
                    self._forget()
                    return

    def change(self, holders: int) -> None:
        """Count who holds it."""
        self._holders += holders
        if self._door is not None:
            self._door.call_soon(lambda: self._changed.set())

    def release(self) -> None:
        """Hold it no longer; returns at once."""
        with _lock:
            self.change(-1)

    async def started(self) -> None:
        """Wait until it works.

        Raises:
            WorkersError: it does not, for the reason it tells.
        """
        there = await anyio.to_thread.run_sync(self._started.wait, BEGIN_SECONDS, abandon_on_cancel=True)
        if self._error is not None:
            raise WorkersError(f"workers cannot be started: {self._error}") from self._error
        if not there:
            raise WorkersError(
                f"workers cannot be started: nothing came of it within {BEGIN_SECONDS:g} seconds"
            )

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        if self._door is not None:
            self._door.call_soon(lambda: self._changed.set())
        self._thread.join(END_SECONDS)


_ending = False


@atexit.register
def _end_all() -> None:
    global _ending
    with _lock:
        _ending = True
        engines = list(_engines.values())
        for engine in engines:
            engine._holders = 0
    for engine in engines:
        engine.join()


async def hold(workers: Workers) -> Engine:
    """Return a fleet of these workers, started if need be; its ``release()`` is to be called once.

    Raises:
        WorkersError: Dask is not installed, or the workers cannot be started.
    """
    try:
        await anyio.to_thread.run_sync(load_distributed)
    except ImportError as error:
        raise WorkersError(
            "workers need Dask distributed: pip install 'datasette-llm[distributed]'"
        ) from error
    with _lock:
        engine = _engines.get(workers)
        if engine is None:
            engine = _engines[workers] = Engine(workers)
            engine.start()
        engine.change(+1)
    try:
        await engine.started()
    except BaseException:
        engine.release()
        raise
    return engine


@asynccontextmanager
async def _source(workers: Workers) -> AsyncIterator[DaskSource]:
    if workers.count is not None:
        from .local_cluster import local_cluster

        async with local_cluster(workers.count) as source:
            yield source
        return
    assert workers.scheduler is not None
    security = workers.client_security
    if security is None and workers.security:
        from .local_worker import security_from

        security = security_from(dict(workers.security))
    source = DaskSource(workers.scheduler, security)
    try:
        yield source
    finally:
        await source.aclose()

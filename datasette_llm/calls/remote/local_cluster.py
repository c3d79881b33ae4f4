"""Local worker processes and their scheduler: started, started again when one dies, and ended, together.

The scheduler lives in the thread that starts them, the workers in processes that end with their standard
input: when whoever started them is gone, killed or not, so are they. They speak TLS with certificates that
are made for the occasion, since another user of the machine can reach a port of the loopback interface, and
a Dask worker runs what it is sent.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from .dask_source import DaskSource, load_distributed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

logger = logging.getLogger("datasette_llm")

#: Seconds between two looks at the processes.
LOOK_SECONDS = 0.25
#: A process that lives shorter than this did not start.
START_SECONDS = 5.0
#: So many in a row that did not start are enough.
MOST_FAILURES = 3
CLOSE_SECONDS = 3.0


class LocalProcesses:
    """So many worker processes, each started again when it ends."""

    def __init__(self, count: int, told: dict[str, Any]) -> None:
        self._told = json.dumps(told).encode() + b"\n"
        self._processes: list[tuple[subprocess.Popen[bytes], float]] = []
        self._count = count
        self._failures = 0

    async def run(self) -> None:
        """Look after them until cancelled; then none is left."""
        try:
            while True:
                self._look()
                await anyio.sleep(LOOK_SECONDS)
        finally:
            self._end()

    def _look(self) -> None:
        now = time.monotonic()
        for each in list(self._processes):
            process, began = each
            if process.poll() is not None:
                self._processes.remove(each)
                _close(process)
                self._failures = self._failures + 1 if now - began < START_SECONDS else 0
                if self._failures == MOST_FAILURES:
                    logger.error("Local workers do not start: exit status %s", process.returncode)
        while len(self._processes) < self._count and self._failures < MOST_FAILURES:
            self._processes.append((self._start(), now))

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "datasette_llm.calls.remote.local_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            # Ctrl-C is for the job: it still wants the answers that are under way.
            start_new_session=os.name == "posix",
        )
        assert process.stdin is not None
        try:
            process.stdin.write(self._told)
            process.stdin.flush()
        except OSError:  # it has ended already
            pass
        return process

    def _end(self) -> None:
        for process, _ in self._processes:
            _close(process)
            process.kill()
        for process, _ in self._processes:
            process.wait()
        self._processes.clear()


def _close(process: subprocess.Popen[bytes]) -> None:
    try:
        if process.stdin is not None:
            process.stdin.close()
    except OSError:
        pass


@asynccontextmanager
async def local_cluster(count: int) -> AsyncIterator[DaskSource]:
    """Run a scheduler here and so many worker processes; none is left afterwards."""
    distributed = load_distributed()
    import dask

    security = distributed.Security.temporary()
    with dask.config.set({"distributed.scheduler.http.routes": []}):
        scheduler = distributed.Scheduler(
            host="127.0.0.1", port=0, protocol="tls://", security=security, dashboard=False,
            dashboard_address="127.0.0.1:0",
        )  # fmt: skip
    await scheduler
    source = DaskSource(scheduler.address, security)
    processes = LocalProcesses(count, {"scheduler": scheduler.address, "tls": _certificate(security)})
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(processes.run)
            try:
                yield source
            finally:
                await source.aclose()
                tasks.cancel_scope.cancel()
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await scheduler.close()


def _certificate(security: Any) -> dict[str, str]:
    return {
        "ca_file": security.tls_ca_file,
        "cert": security.tls_worker_cert,
        "key": security.tls_worker_key,
    }

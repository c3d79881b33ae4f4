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
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from ...errors import WorkersError
from .dask_source import QUIET, DaskSource, load_distributed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

logger = logging.getLogger("datasette_llm")

#: Seconds between two looks at the processes.
LOOK_SECONDS = 0.25
#: A process that the scheduler does not know after this is started again: llm's plugins are imported first.
REGISTER_SECONDS = 90.0
#: So many in a row that did not come to work are enough.
MOST_FAILURES = 3
#: Somebody, or a system without memory, ended it: that says nothing about whether the next one starts.
KILLED = (-9, -15)
SCHEDULER_SECONDS = 60.0
COMMAND = (sys.executable, "-m", "datasette_llm.calls.remote.local_worker")
CLOSE_SECONDS = 3.0


@dataclass(eq=False)
class _Process:
    popen: subprocess.Popen[bytes]
    came: bool = False
    #: Counted, not timed: a machine that stands still does not age it.
    looks: int = 0


class LocalProcesses:
    """So many worker processes, each started again when it ends, or when it does not come to work.

    Args:
        count: how many.
        told: what each is told on its standard input.
        registered: returns the process ids of those that the scheduler knows.
        command: what is run.

    Attributes:
        trouble: why there will be none, once that is clear.
    """

    def __init__(
        self,
        count: int,
        told: dict[str, Any],
        registered: Callable[[], Collection[int]],
        command: Sequence[str],
    ) -> None:
        self.trouble: str | None = None
        self._told = json.dumps(told).encode() + b"\n"
        self._processes: list[_Process] = []
        self._count = count
        self._registered = registered
        self._command = command
        self._failures = 0

    async def run(self) -> None:
        """Look after them until cancelled; then none is left."""
        try:
            while True:
                self.look()
                await anyio.sleep(LOOK_SECONDS)
        finally:
            self._end()

    def look(self) -> None:
        """Count those that ended or did not come, and start others in their place."""
        known = set(self._registered())
        for each in list(self._processes):
            each.came = each.came or each.popen.pid in known
            status = each.popen.poll()
            why = self._too_late(each) if status is None else f"exit status {status}"
            if why is None:
                continue
            self._processes.remove(each)
            _close(each.popen)
            if each.came:
                self._failures = 0
            elif status not in KILLED:
                self._failures += 1
                logger.warning("A local worker did not start: %s", why)
                if self._failures >= MOST_FAILURES and not any(other.came for other in self._processes):
                    self.trouble = f"local workers do not start, the last one: {why}"
        while len(self._processes) < self._count and self.trouble is None:
            self._processes.append(_Process(self._start()))

    def _too_late(self, process: _Process) -> str | None:
        """End a process that did not come to its scheduler, and say so; ``None`` for the others."""
        process.looks += 1
        if process.came or process.looks * LOOK_SECONDS < REGISTER_SECONDS:
            return None
        process.popen.kill()
        process.popen.wait()
        return f"it did not come to its scheduler within {REGISTER_SECONDS:g} seconds"

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command,
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
        for each in self._processes:
            _close(each.popen)
            each.popen.kill()
        for each in self._processes:
            each.popen.wait()
        self._processes.clear()


def _close(process: subprocess.Popen[bytes]) -> None:
    try:
        if process.stdin is not None:
            process.stdin.close()
    except OSError:
        pass


@asynccontextmanager
async def local_cluster(count: int, command: Sequence[str] = COMMAND) -> AsyncIterator[DaskSource]:
    """Run a scheduler here and so many worker processes; none is left afterwards."""
    distributed = load_distributed()
    import dask

    security = distributed.Security.temporary()
    with dask.config.set(QUIET):
        scheduler = distributed.Scheduler(
            host="127.0.0.1", port=0, protocol="tls://", security=security, dashboard=False,
            dashboard_address="127.0.0.1:0",
        )  # fmt: skip
    try:
        with anyio.fail_after(SCHEDULER_SECONDS):
            await scheduler
        processes = LocalProcesses(
            count,
            {"scheduler": scheduler.address, "tls": _certificate(security)},
            lambda: [worker.pid for worker in scheduler.workers.values()],
            command,
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(processes.run)
            source = LocalSource(scheduler.address, security, processes)
            try:
                yield source
            finally:
                await source.aclose()
                tasks.cancel_scope.cancel()
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await scheduler.close()


class LocalSource(DaskSource):
    """The workers of this scheduler; says so when there will be none."""

    def __init__(self, address: str, security: Any, processes: LocalProcesses) -> None:
        super().__init__(address, security)
        self._processes = processes

    async def addresses(self) -> Collection[str]:
        if self._processes.trouble is not None:
            raise WorkersError(self._processes.trouble)
        return await super().addresses()


def _certificate(security: Any) -> dict[str, str]:
    return {
        "ca_file": security.tls_ca_file,
        "cert": security.tls_worker_cert,
        "key": security.tls_worker_key,
    }

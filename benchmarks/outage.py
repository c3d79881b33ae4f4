"""``python -m benchmarks.outage``: a provider that is away while ``datasette llm enrich`` fills a table.

    python -m benchmarks.outage                                # 20 s, 2 min and 20 min, in 25 minutes
    python -m benchmarks.outage --seconds 20 --kind killed

Each cell is the real command against a server in a process of its own, 10 rows a second. All of them run side
by side, since they mostly wait. What happens to the server:

* *killed*: ``kill -9``; started again on the same port;
* *name*: killed and started again at once, but its host name cannot be resolved meanwhile;
* *503*: it answers every request so;
* *stopped*: SIGSTOP, then SIGCONT.

It tells how many rows have no answer and how many failed, how often somebody was looked for meanwhile
(lookups, connections, or refused requests), how many requests there were beyond one for each row, and
after how many seconds 90 % of the rows a second were back. Exit code 1 if a row has no answer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
from anyio.to_thread import run_sync

from .launch import ROOT, Server, own_environment

if TYPE_CHECKING:
    from anyio.abc import Process

Kind = Literal["killed", "name", "503", "stopped"]

KINDS: tuple[Kind, ...] = ("killed", "name", "503", "stopped")
ROWS, LATENCY, CONCURRENCY = 600, 1.0, 10
#: So many rows are answered before it begins, and the rate is measured over so many seconds.
BEFORE, WINDOW_SECONDS = 120, 3.0
#: Seconds from the end of the outage in which the rest must be done.
PATIENCE_SECONDS = 600.0
HOST = "provider.invalid"


@dataclass
class Cell:
    """One outage, and what came of it.

    Attributes:
        tries: lookups, connections and refused requests while it lasted.
        beyond: requests beyond one for each row.
        back: seconds until 90 % of the rate was back; ``None`` if it never was.
    """

    kind: Kind
    seconds: float
    answered: int = 0
    failed: int = 0
    tries: int = 0
    beyond: int = 0
    back: float | None = None
    said: str = ""

    def __str__(self) -> str:
        back = "never" if self.back is None else f"{self.back:.1f}"
        figures = (ROWS - self.answered, self.failed, self.tries, self.beyond, back)
        return f"| {self.kind} | {self.seconds:g} | {' | '.join(map(str, figures))} |"


class Run:
    """A cell's server, its command, and how many rows have an answer at what time."""

    def __init__(self, cell: Cell, directory: Path) -> None:
        self.cell = cell
        self.directory = directory
        self.file = directory / "data.db"
        self.unknown = directory / "unknown"
        self.log = directory / "tries"
        self.port = _free_port()
        self.requests = 0
        self.series: list[tuple[float, int]] = []
        directory.mkdir()
        with closing(sqlite3.connect(self.file)) as database, database:
            database.execute("create table items (id integer primary key, text, answer)")
            rows = ((f"row {number} of {directory.name}",) for number in range(ROWS))
            database.executemany("insert into items (text) values (?)", rows)
        (directory / "extra-openai-models.yaml").write_text(
            f"- model_id: away\n  model_name: bench\n  api_base: http://{HOST}:{self.port}/v1\n"
        )
        (directory / "sitecustomize.py").write_text("import benchmarks.outage_client\n")

    async def start_server(self) -> Process:
        """Start it, and return when it listens."""
        command = [
            *(sys.executable, "-m", "benchmarks.server", "--until-stdin-closes"),
            *("--port", str(self.port), "--latency", str(LATENCY)),
        ]
        process = await anyio.open_process(command, cwd=ROOT, stderr=None)
        assert process.stdout is not None
        await process.stdout.receive()
        return process

    async def start_command(self) -> Process:
        """Start the enrichment."""
        environment = own_environment(self.directory) | {
            "PYTHONPATH": os.pathsep.join((str(self.directory), str(ROOT))),
            "OUTAGE_HOST": HOST,
            "OUTAGE_PORT": str(self.port),
            "OUTAGE_UNKNOWN": str(self.unknown),
            "OUTAGE_LOG": str(self.log),
        }
        command = [
            *(sys.executable, "-m", "datasette", "llm", "enrich", str(self.file), "items", "{{ text }}"),
            *("--column", "answer", "--model", "away", "--concurrency", str(CONCURRENCY)),
        ]
        return await anyio.open_process(command, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)

    async def watch(self) -> None:
        """Look at the table, again and again."""
        while True:
            with closing(sqlite3.connect(f"file:{self.file}?mode=ro", uri=True)) as database:
                count = database.execute("select count(answer) from items").fetchone()[0]
            self.series.append((time.time(), count))
            await anyio.sleep(0.25)

    async def until(self, count: int, patience: float) -> None:
        """Wait until so many rows have an answer."""
        with anyio.move_on_after(patience):
            while not self.series or self.series[-1][1] < count:  # noqa: ASYNC110 - the file tells nobody
                await anyio.sleep(0.25)

    def rate(self, since: float) -> float | None:
        """Return rows a second in the window that begins then, if it was seen whole."""
        first = next((each for each in self.series if each[0] >= since), None)
        last = next((each for each in self.series if each[0] >= since + WINDOW_SECONDS), None)
        if first is None or last is None:
            return None
        return (last[1] - first[1]) / (last[0] - first[0])

    async def counted(self) -> int:
        """Ask the server how many requests it saw, and how many it refused."""
        counts = await run_sync(lambda: Server(f"http://127.0.0.1:{self.port}").counts)
        self.requests += counts["requests"]
        return int(counts["statuses"].get("503", 0))

    async def outage(self, server: Process) -> Process:
        """Let it happen, and return the server that is there afterwards."""
        kind, seconds = self.cell.kind, self.cell.seconds
        configure = Server(f"http://127.0.0.1:{self.port}").configure
        if kind == "stopped":
            server.send_signal(signal.SIGSTOP)
            await anyio.sleep(seconds)
            server.send_signal(signal.SIGCONT)
            return server
        await self.counted()
        if kind == "503":
            await run_sync(lambda: configure(error_503=1.0))
            await anyio.sleep(seconds)
            self.cell.tries = await self.counted()
            await run_sync(lambda: configure(latency=LATENCY))
            return server
        server.kill()
        await server.wait()
        if kind == "name":
            self.unknown.touch()
            server = await self.start_server()
            await anyio.sleep(seconds)
            self.unknown.unlink()
            return server
        await anyio.sleep(seconds)
        return await self.start_server()

    async def __call__(self) -> None:
        """Run it from beginning to end."""
        cell = self.cell
        server = await self.start_server()
        command = await self.start_command()
        assert command.stdout is not None
        output = bytearray()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.watch)
                await self.until(BEFORE, PATIENCE_SECONDS)
                before = self.rate(self.series[-1][0] - 2 * WINDOW_SECONDS) or 0.0
                began = time.time()
                server = await self.outage(server)
                ended = time.time()
                with anyio.move_on_after(PATIENCE_SECONDS):
                    async for chunk in command.stdout:
                        output.extend(chunk)
                tasks.cancel_scope.cancel()
            for moment, _ in self.series:
                rate = self.rate(moment) if moment >= ended else None
                if rate is not None and rate >= 0.9 * before:
                    cell.back = moment - ended
                    break
            await self.counted()
        finally:
            with anyio.CancelScope(shield=True):
                for process in (command, server):
                    if process.returncode is None:
                        process.kill()
                    await process.aclose()
        cell.said = output.decode(errors="replace")
        cell.beyond = self.requests - ROWS
        if cell.kind != "503":
            cell.tries = sum(began <= float(moment) < ended for moment in self.log.read_text().split())
        with closing(sqlite3.connect(self.file)) as database:
            cell.answered = database.execute("select count(answer) from items").fetchone()[0]
            if database.execute("select 1 from sqlite_master where name = '_llm_enrich_errors'").fetchone():
                cell.failed = database.execute("select count(*) from _llm_enrich_errors").fetchone()[0]


def _free_port() -> int:
    # Below those that the system gives to clients: one of these may take the port while its server is away,
    # even by connecting to itself.
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as server,
        ):
            return int(server.getsockname()[1])


async def run_cells(kinds: list[Kind], lengths: list[float], directory: Path) -> list[Cell]:
    """Run all of them side by side."""
    cells = [Cell(kind, seconds) for seconds in lengths for kind in kinds]
    async with anyio.create_task_group() as tasks:
        for number, cell in enumerate(cells):
            tasks.start_soon(Run(cell, directory / f"cell{number}"))
    return cells


def main() -> None:
    """Read the command line, run, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=__doc__)
    parser.add_argument(
        "--kind", action="append", choices=KINDS, help="again for more of them; all by default"
    )
    parser.add_argument(
        "--seconds", action="append", type=float, help="the same; 20, 120 and 1200 by default"
    )
    given = parser.parse_args()
    # The processes that it started are ended, however this one is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as directory:
        cells = anyio.run(
            run_cells, given.kind or list(KINDS), given.seconds or [20.0, 120.0, 1200.0], Path(directory)
        )
    print("| kind | away s | no answer | failed | looked for | beyond one a row | back after s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for cell in cells:
        print(cell)
    for cell in cells:
        if cell.failed or cell.answered < ROWS:
            print(f"\n{cell.kind}, {cell.seconds:g} s:\n{cell.said[-2000:]}")
    sys.exit(any(cell.failed or cell.answered < ROWS for cell in cells))


if __name__ == "__main__":
    main()

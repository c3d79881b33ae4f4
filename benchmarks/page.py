"""How long a Datasette server's table page takes, idle and while an enrichment runs in that server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import anyio.to_thread

from .launch import ROOT
from .rows import build_table

if TYPE_CHECKING:
    from .work import Result, Work

PAGE = "/airports/airports?_size=20"
# One visitor who looks at the page, thinks, looks again.
PAUSE_SECONDS = 0.01


async def pages_during_enrichment(work: Work, prompts: list[str], result: Result) -> None:
    """Ask for the page, idle at first, then until the enrichment of ``work.n`` rows is done."""
    await anyio.to_thread.run_sync(_visit, work, result)


def _visit(work: Work, result: Result) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "airports.db"
        database = build_table(path)
        database.execute(
            "delete from airports where rowid not in (select rowid from airports limit ?)", [work.n]
        )
        database.commit()
        database.close()
        command = [sys.executable, "-m", "benchmarks.page_server", work.url, str(path), str(work.concurrency)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                visitor = Visitor(process.stdout.readline().strip())
                visitor.look(10)
                idle = visitor.look(max(50, work.n // 5))
                visitor.get("/-/benchmark-start")
                started = time.perf_counter()
                busy: list[float] = []
                while (state := visitor.state())["state"] in ("pending", "running"):
                    busy += visitor.look(20)
                result.extra["enrichment_seconds"] = time.perf_counter() - started
                result.extra["state"] = state
                visitor.close()
            finally:
                process.stdin.close()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
        database = build_table(":memory:")
        database.execute("attach ? as enriched", [str(path)])
        result.right = database.execute(
            "select count(*) from enriched.airports where surroundings like 'answer to: Describe %'"
        ).fetchone()[0]
        database.close()
    for name, seconds in (("idle", idle), ("busy", busy)):
        result.extra[name] = {
            "pages": len(seconds),
            "p50_ms": median(seconds) * 1000,
            "p99_ms": quantiles(seconds, n=100)[98] * 1000,
        }


class Visitor:
    """Somebody with a browser, on one kept connection."""

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=60)

    def get(self, path: str) -> bytes:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} answered {answer.status}: {content[:500]!r}")
        return content

    def look(self, times: int) -> list[float]:
        """Ask for the page this often and return the seconds each took."""
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            content = self.get(PAGE)
            seconds.append(time.perf_counter() - started)
            assert b"</table>" in content
            time.sleep(PAUSE_SECONDS)
        return seconds

    def state(self) -> dict[str, str]:
        state: dict[str, str] = json.loads(self.get("/-/benchmark-state"))
        return state

    def close(self) -> None:
        self._connection.close()

"""How long a Datasette server's table page takes, idle and while its table is enriched.

The enrichment runs in that server, or as ``datasette llm enrich`` in a process beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio.to_thread

from .launch import ROOT
from .models import MODEL_ID
from .page_server import PROMPT
from .rows import build_table

if TYPE_CHECKING:
    from .work import Result, Work

PAGE = "/airports/airports?_size=20"
# One visitor who looks at the page, thinks, looks again.
PAUSE_SECONDS = 0.01
# A server that has just started loads, once it is left alone, what its prompts will need.
# Less than the server keeps a connection that is idle.
SETTLE_SECONDS = 4.0


async def pages_during_enrichment(work: Work, prompts: list[str], result: Result) -> None:
    """Ask for the page, idle at first, then until the server has enriched ``work.n`` rows."""
    await anyio.to_thread.run_sync(_visit, work, result, InTheServer)


async def pages_beside_enrichment(work: Work, prompts: list[str], result: Result) -> None:
    """The same with ``datasette llm enrich`` in a process of its own."""
    await anyio.to_thread.run_sync(_visit, work, result, BesideTheServer)


async def pages_while_workers_enrich(work: Work, prompts: list[str], result: Result) -> None:
    """The same in the server, with a worker that makes its model calls."""
    await anyio.to_thread.run_sync(_visit, work, result, ByAWorker)


def _visit(work: Work, result: Result, kind: type[Enrichment]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "airports.db"
        database = build_table(path)
        database.execute(
            "delete from airports where rowid not in (select rowid from airports limit ?)", [work.n]
        )
        database.commit()
        database.close()
        command = [sys.executable, "-m", "benchmarks.page_server", work.url, str(path), str(work.concurrency)]
        command += ["look"] * work.look + ["workers"] * (kind is ByAWorker)
        environment = {**os.environ, **write_model(path.parent, work.url)}
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                visitor = Visitor(process.stdout.readline().strip())
                visitor.look(10)
                time.sleep(SETTLE_SECONDS)
                lag = {"before": visitor.lag()}
                idle = visitor.look(max(50, work.n // 5))
                lag["idle"] = visitor.lag()
                started = time.perf_counter()
                busy: list[float] = []
                with kind(work, path, visitor) as enrichment:
                    while enrichment.is_running():
                        busy += visitor.look(20)
                lag["busy"] = visitor.lag()
                result.extra["lag"] = {name: lag[name] for name in ("idle", "busy")}
                result.extra["enrichment_seconds"] = time.perf_counter() - started
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


def write_model(home: Path, url: str) -> dict[str, str]:
    """Tell processes of the model in llm's way; return the variable that says where."""
    model = {"model_id": MODEL_ID, "model_name": MODEL_ID, "api_base": url}
    (home / "extra-openai-models.yaml").write_text(json.dumps([model]))
    return {"LLM_USER_PATH": str(home)}


class Enrichment:
    """Fills a column of the table; started when the block is entered, ended when it is left."""

    def __init__(self, work: Work, table: Path, visitor: Visitor) -> None:
        self.work = work
        self.table = table
        self.visitor = visitor

    def __enter__(self) -> Enrichment:
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        pass

    def is_running(self) -> bool:
        raise NotImplementedError


class InTheServer(Enrichment):
    """As a background task of the server that is looked at."""

    def __enter__(self) -> Enrichment:
        self.visitor.get("/-/benchmark-start")
        return self

    def is_running(self) -> bool:
        return json.loads(self.visitor.get("/-/benchmark-state"))["state"] in ("pending", "running")


class ByAWorker(InTheServer):
    """The same, where a local worker makes the model calls of groups."""


class BesideTheServer(Enrichment):
    """As a command beside the server."""

    def __enter__(self) -> Enrichment:
        command = [sys.executable, "-m", "datasette", "llm", "enrich", str(self.table), self.table.stem]
        command += [PROMPT, "--column", "surroundings", "--model", MODEL_ID, "--quiet"]
        command += ["--concurrency", str(self.work.concurrency)]
        environment = {**os.environ, **write_model(self.table.parent, self.work.url)}
        self.process = subprocess.Popen(command, env=environment)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def is_running(self) -> bool:
        return self.process.poll() is None


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

    def lag(self) -> dict[str, Any]:
        """Return how late the server's event loop was since this was last asked."""
        found: dict[str, Any] = json.loads(self.get("/-/benchmark-lag"))
        return found

    def close(self) -> None:
        self._connection.close()

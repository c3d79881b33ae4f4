"""A Datasette server that serves a table and, when asked to, enriches it at the same time.

``python -m benchmarks.page_server PROVIDER_URL DATABASE CONCURRENCY [look] [workers]`` prints its address.
``/-/benchmark-start`` starts the enrichment as a background task, ``/-/benchmark-state`` says how
far it is, ``/-/benchmark-lag`` how late the event loop was since it was last asked; with ``look`` also
what it was doing then. With ``workers`` one of them makes the model calls, of the model in llm's own files.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import uvicorn
from datasette import Response, hookimpl
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_llm import enrich

from .loop_lag import LoopLag
from .models import MODEL_ID, registered

PROMPT = "Describe the surroundings of {{ name }} ({{ iata }}) in {{ city }}, {{ state }}."


class EnrichmentOnDemand:
    """The plugin that starts the enrichment."""

    __name__ = "benchmark-pages"

    def __init__(self, table: str, concurrency: int, *, look: bool) -> None:
        self.lag = LoopLag(look=look)
        self.measuring: Any = None
        self.table = table
        self.concurrency = concurrency
        self.task: Any = None

    async def enrich(self, datasette: Datasette) -> None:
        await enrich(
            datasette, self.table, "airports", PROMPT, column="surroundings", concurrency=self.concurrency
        )

    async def measure(self, datasette: Datasette) -> None:
        await self.lag.run()

    @hookimpl  # type: ignore[untyped-decorator]
    def register_routes(self) -> list[tuple[str, Any]]:
        async def start(datasette: Datasette) -> Response:
            self.task = datasette.add_background_task(self.enrich, name="benchmark")
            return Response.json({"state": "running"})

        async def state() -> Response:
            error = self.task.exception
            return Response.json({"state": self.task.state, "error": repr(error) if error else None})

        async def lag(datasette: Datasette) -> Response:
            if self.measuring is None and hasattr(datasette, "add_background_task"):
                self.measuring = datasette.add_background_task(self.measure, name="benchmark lag")
            figures = self.lag.figures
            self.lag.reset()
            return Response.json(figures)

        return [
            (r"^/-/benchmark-start$", start),
            (r"^/-/benchmark-state$", state),
            (r"^/-/benchmark-lag$", lag),
        ]


def main() -> None:
    """Serve until standard input closes."""
    url, path, concurrency = sys.argv[1], sys.argv[2], int(sys.argv[3])
    workers = {"workers": 1} if "workers" in sys.argv[4:] else {}
    datasette = Datasette(
        [path],
        config={"plugins": {"datasette-llm": {"default_model": MODEL_ID, **workers}}},
        settings={"num_sql_threads": 3},
    )
    pm.register(EnrichmentOnDemand(Path(path).stem, concurrency, look="look" in sys.argv[4:]))
    listener = socket.create_server(("127.0.0.1", 0))
    # As a server has it that opens its own socket: asyncio cannot tell that this one is TCP.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(datasette.app(), log_level="warning"))

    def stop_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=stop_with_parent, daemon=True).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    with nullcontext() if workers else registered(url):
        server.run(sockets=[listener])


if __name__ == "__main__":
    main()

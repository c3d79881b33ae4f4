"""A Datasette server in a process of its own, for a browser; it can be killed.

``python -m tests.plugins.job_server DATABASE PORT`` prints its address. Its model holds answers about words
that begin with ``later`` while a file ``hold`` is beside the database, and fails for those that begin with
``bad`` until there is one called ``mended``.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from datasette.app import Datasette

from ..fakes import FakeModel, registered
from ..hooks import hooked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

ANA = {"id": "ana", "name": "Ana"}


async def serve(path: str, port: int) -> None:
    directory = Path(path).parent

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        while "later" in prompt and (directory / "hold").exists():  # noqa: ASYNC110
            await anyio.sleep(0.02)  # A browser's test has nothing but files to tell this process.
        await anyio.sleep(0.05)
        if "bad" in prompt and not (directory / "mended").exists():
            raise ValueError("the model has no answer")
        yield f"<b>{prompt}</b>!"

    config: dict[str, Any] = {
        "permissions": {"update-row": {"id": "ana"}, "alter-table": {"id": "ana"}},
        "plugins": {
            "datasette-llm": {
                "default_model": "fake",
                "concurrency": 2,
                "prices": {"fake": {"input": 1.5, "output": 6}},
            }
        },
    }
    with (
        registered(FakeModel(script)),
        hooked(actor_from_request=lambda request: ANA),
        socket.create_server(("127.0.0.1", port)) as listening,
    ):
        datasette = Datasette([path], config=config)
        server = uvicorn.Server(
            uvicorn.Config(datasette.app(), log_level="warning", ws="none", lifespan="on")
        )
        print(listening.getsockname()[1], flush=True)
        await server.serve([listening])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))

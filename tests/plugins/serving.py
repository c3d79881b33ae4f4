"""A Datasette that is served for a browser, in the event loop of the test."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

uvicorn = pytest.importorskip("uvicorn")

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def served(datasette: Any) -> AsyncIterator[str]:
    """Serve a Datasette on a free port; yields its address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(datasette.app(), log_level="warning", ws="none", lifespan="on")
        server = uvicorn.Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listening])
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            server.should_exit = True

"""Who owns jobs where Datasette cannot: the lifespan of the server."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import anyio

from datasette_llm.pages.jobs.owner import is_possible, start_task, with_lifespan

asked_by: ContextVar[str] = ContextVar("asked_by", default="nobody")


class OldDatasette:
    """One that owns no background tasks."""


async def test_tasks_belong_to_the_lifespan_and_end_with_it() -> None:
    heard: list[str] = []
    datasette, stop = OldDatasette(), anyio.Event()
    up, begun = anyio.Event(), anyio.Event()
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append(scope["type"])
        while scope["type"] == "lifespan":
            message = (await receive())["type"]
            heard.append(message)
            up.set()
            if message == "lifespan.shutdown":
                return

    async def receive() -> dict[str, str]:
        if up.is_set():
            await stop.wait()
        return {"type": next(messages)}

    async def end() -> None:
        heard.append("jobs end")

    async def job(owner: Any) -> None:
        assert owner is datasette
        heard.append(f"asked by {asked_by.get()}")
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            heard.append("job left")

    served = with_lifespan(datasette, app, end)
    assert not is_possible(datasette)
    await served({"type": "http"}, receive, None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(served, {"type": "lifespan"}, receive, None)
        await up.wait()
        assert is_possible(datasette)
        asked_by.set("a request")
        start_task(datasette, job, "a job")
        await begun.wait()
        stop.set()
    assert not is_possible(datasette)
    assert heard[:4] == ["http", "lifespan", "lifespan.startup", "asked by nobody"]
    assert heard[4:] == ["jobs end", "lifespan.shutdown", "job left"]

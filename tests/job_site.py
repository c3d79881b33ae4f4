"""A Datasette whose pages start jobs, as somebody sees it: on newer ones and on those that own no tasks."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm.pages.jobs import live
from datasette_llm.pages.jobs.owner import owns_tasks

from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .enrich_tables import TableFile

ANA = {"id": "ana"}
BEN = {"id": "ben"}
FORM = "/data/-/llm/enrich/words"
ASK = {"model": "fake", "prompt": "Say {{ word }}", "column": "said"}


class Site:
    """Datasette's pages as somebody sees them."""

    def __init__(self, datasette: Any) -> None:
        self.datasette = datasette

    async def get(self, path: str, actor: dict[str, Any] | None = ANA) -> Any:
        return await self.datasette.client.get(path, cookies=self._cookies(actor))

    async def post(
        self,
        path: str,
        data: dict[str, Any] | None = None,
        actor: dict[str, Any] | None = ANA,
        headers: dict[str, str] | None = None,
    ) -> Any:
        """Send a form, as a browser does that has opened its page before."""
        cookies, data = self._cookies(actor), dict(data or {})
        if headers is None and not owns_tasks(self.datasette):
            # Older Datasettes ask for the token of their own form, newer ones where a form comes from.
            page = await self.datasette.client.get("/-/logout", cookies=cookies)
            token = re.search(r'name="csrftoken" value="([^"]+)"', page.text)
            cookies |= dict(page.cookies)
            data["csrftoken"] = token[1] if token else ""
        return await self.datasette.client.post(path, data=data, cookies=cookies, headers=headers or {})

    async def run(self, path: str = FORM, **fields: str) -> str:
        """Start a job and return the path of its page."""
        answer = await self.post(path, {**ASK, **fields, "action": "run"})
        assert answer.status_code == 302, text_of(answer)
        return str(answer.headers["location"])

    async def ended(self, path: str) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE_SECONDS):
            job = live.find(self.datasette, "data", int(path.rpartition("/")[2]))
            assert job is not None
            await job.ended.wait()
        return dict((await self.get(path + ".json")).json())

    def _cookies(self, actor: dict[str, Any] | None) -> dict[str, str]:
        return {"ds_actor": self.datasette.client.actor_cookie(actor)} if actor else {}


@asynccontextmanager
async def site(file: TableFile, **settings: Any) -> AsyncIterator[Site]:
    """Serve a database, without a server; keywords are settings of the plugin."""
    datasette = file.datasette(
        config={
            "permissions": {"update-row": ANA, "alter-table": ANA},
            "databases": {"data": {"tables": {"secret": {"allow": ANA}}}},
            "plugins": {"datasette-llm": {"default_model": "fake", "concurrency": 1, **settings}},
        }
    )
    async with started(datasette):
        yield Site(datasette)


@asynccontextmanager
async def started(datasette: Any) -> AsyncIterator[None]:
    """Start a Datasette as a server does; it is stopped when the block is left."""
    if owns_tasks(datasette):
        await datasette.start_background_tasks()
        try:
            yield
        finally:
            await datasette.invoke_shutdown()
        return
    up, stop, down = anyio.Event(), anyio.Event(), anyio.Event()
    asked = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, str]:
        if up.is_set():
            await stop.wait()
        return {"type": next(asked)}

    async def send(message: dict[str, str]) -> None:
        (up if message["type"] == "lifespan.startup.complete" else down).set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(datasette.app(), {"type": "lifespan"}, receive, send)
        await up.wait()
        try:
            yield
        finally:
            stop.set()
            await down.wait()


def text_of(answer: Any) -> str:
    """Return what a person reads."""
    body = re.sub(r"(?s)<(script|style).*?</\1>", "", answer.text)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())

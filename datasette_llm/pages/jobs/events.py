"""Progress as server-sent events: what the page shows, once a second, the same text for all who watch.

A stream is short, and the browser opens the next: a server that is told to stop waits for the answers that it
is sending, and nothing tells an application that this is why. So each ends by itself, soon.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
from datasette.utils.asgi import AsgiStream

from . import live
from .story import page_of
from .views import seen_run

if TYPE_CHECKING:
    from .live import LiveJob

#: How long a stream is at most, and how soon the browser opens the next, in seconds.
STREAM_SECONDS = 5.0
RETRY_SECONDS = 0.5


async def events(datasette: Any, request: Any) -> Any:
    """Answer with the events of a job, or with the one that says that it is not under way here."""
    database, run = await seen_run(datasette, request)
    job = live.find(datasette, database.name, run["id"])

    async def make() -> str:
        return await _parts(datasette, database, run)

    async def write(writer: Any) -> None:
        await writer.write(f"retry: {int(RETRY_SECONDS * 1000)}\n\n")
        if job is None or job.ended.is_set():
            await writer.write("event: end\ndata: ended\n\n")
            return
        async with anyio.create_task_group() as tasks:
            # Nobody listens any more, or for long enough.
            tasks.start_soon(_until_gone, request, tasks.cancel_scope)
            with anyio.move_on_after(STREAM_SECONDS):
                await _tell(job, make, writer)
            tasks.cancel_scope.cancel()

    return AsgiStream(
        write,
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        content_type="text/event-stream",
    )


async def _tell(job: LiveJob, make: Any, writer: Any) -> None:
    while True:
        changed = job.changed
        if job.ended.is_set():
            await writer.write("event: end\ndata: ended\n\n")
            return
        await writer.write(f"data: {await job.shown(make)}\n\n")
        await changed.wait()


async def _until_gone(request: Any, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _parts(datasette: Any, database: Any, run: Any) -> str:
    """Return the parts of the page that change, as JSON in one line."""
    context = await page_of(datasette, database, run)
    html = await datasette.render_template("_llm_job_live.html", context)
    job = context["job"]
    said = f"{job['state_in_words']}: {dict(context['figures'])['Rows done']} rows done"
    return json.dumps({"state": job["state"], "html": html, "said": said})

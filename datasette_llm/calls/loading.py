"""What the first prompt of a process would have to load: anyio's backend, openai's modules, certificates.

That takes 0.4 seconds, in which an event loop answers no page. So it is done while Datasette starts, for
the models that are the defaults there, and else in a worker thread.
"""

from __future__ import annotations

from typing import Any

import anyio
import anyio.to_thread

from .clients import http_library, makes_openai_clients, shared_ssl_context

_loaded = False


def load_now(model: Any) -> None:
    """Load what the prompts to a model need; for the time when nothing is served yet."""
    anyio.current_time()  # anyio loads its backend when it is first asked for something.
    if not _loaded and makes_openai_clients(model):
        _load()


async def load_in_thread(model: Any) -> None:
    """Load the same without keeping the event loop from its work."""
    if not _loaded and makes_openai_clients(model):
        await anyio.to_thread.run_sync(_load)


def _load() -> None:
    global _loaded
    import openai

    found = http_library()
    if found is not None:
        factory, library = found
        # Never used: looking at its parts makes openai import them.
        client = openai.AsyncOpenAI(api_key="-", http_client=factory(verify=shared_ssl_context(library)))
        _ = client.chat.completions, client.responses
    _loaded = True

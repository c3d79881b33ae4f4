"""What the first prompt of a process has to load: llm's model plugins, openai's modules, certificates.

That takes half a second, in which an event loop would answer no page. So it is done in a worker thread.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import anyio.to_thread

from .clients import http_library, makes_openai_clients, shared_ssl_context

logger = logging.getLogger("datasette_llm")

#: Of llm itself; whoever has listed models has imported it.
_FIRST_PLUGIN = "llm.default_plugins.openai_models"
_loaded = False


async def import_model_plugins() -> None:
    """Import the modules of llm's plugins without keeping the event loop from its work.

    llm registers them afterwards, from these modules, when it is first asked for a model.
    """
    if _FIRST_PLUGIN not in sys.modules:
        await anyio.to_thread.run_sync(_import_model_plugins)


def _import_model_plugins() -> None:
    import_module(_FIRST_PLUGIN)
    if os.environ.get("LLM_LOAD_PLUGINS") is not None:
        return  # llm is told not to load what is installed.
    for entry_point in entry_points(group="llm"):
        try:
            entry_point.load()
        except Exception as error:
            # llm says more about it when it loads the plugin itself.
            logger.debug("The llm plugin %s cannot be imported: %r", entry_point.name, error)


async def load_in_thread(model: Any) -> None:
    """Load what prompts to a model need without keeping the event loop from its work."""
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

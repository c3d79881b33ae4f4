"""What the first prompt of a process has to load: llm's model plugins, an SDK's modules, certificates.

That takes half a second, in which an event loop would answer no page. So it is done in a worker thread.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import anyio.to_thread

from ..backends.datasette_side import backend
from .clients.adoption import load_parts, may_share_clients
from .clients.openai_models import load_openai, makes_openai_clients

logger = logging.getLogger("datasette_llm")

#: Of llm itself; whoever has listed models has imported it.
_FIRST_PLUGIN = "llm.default_plugins.openai_models"
#: The classes of models for which it is done.
_loaded: set[type] = set()


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
    if _is_left_for(model):
        await anyio.to_thread.run_sync(_load, model, backend())


async def load_for_workers() -> None:
    """Load what groups with workers need, if it is installed, in the same way."""
    with suppress(ImportError):
        from .remote.dask_source import load_distributed

        await anyio.to_thread.run_sync(load_distributed)


def _is_left_for(model: Any) -> bool:
    return type(model) not in _loaded and may_share_clients(model)


def _load(model: Any, backend: str) -> None:
    if makes_openai_clients(model):
        load_openai(backend)
    load_parts(model)
    _loaded.add(type(model))

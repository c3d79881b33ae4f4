"""What the first form of a process has to load: this package's own modules, llm's plugins, prices.

An event loop would answer no page meanwhile, so it is done in a thread; and as soon as the way to the form is
shown to somebody who may go it, so that it is there when they do.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from .owner import is_possible, start_task

_FORM = "datasette_llm.pages.jobs.forms"
#: It has been loaded, or is being loaded by a task of its own.
_begun = False


def load_form_soon(datasette: Any) -> None:
    """Load what the form needs while other things are done, once a process."""
    global _begun  # Modules are loaded once a process.
    if not _begun and is_possible(datasette):
        _begun = True
        start_task(datasette, _load, "datasette-llm: load what the form of jobs needs")


async def load_form() -> Any:
    """Return the module of the form, loaded without keeping the event loop from its work."""
    if _FORM not in sys.modules:
        import anyio.to_thread

        await anyio.to_thread.run_sync(import_module, _FORM)
    return import_module(_FORM)


async def _load(datasette: Any) -> None:
    """Load what the form needs, and look models and a price up once: what that is made of is kept."""
    from ...calls.loading import import_model_plugins

    await import_model_plugins()
    await load_form()
    from .form import prepare

    await prepare(datasette)

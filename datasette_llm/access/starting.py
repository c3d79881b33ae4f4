"""What a Datasette that starts waits for, and what is done in the quiet after that.

A wrong configuration stops the start. What needs the installed models (warnings of models that are not
there) or prepares the first prompt takes half a second of imports, which no start should wait for.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .settings import get_settings

if TYPE_CHECKING:
    from datasette.app import Datasette

logger = logging.getLogger("datasette_llm")

#: Whoever opens a browser on a server that has just started asks for its first pages within this time.
QUIET_SECONDS = 1.0


def check_now(datasette: Datasette) -> None:
    """Check what must not wait.

    Raises:
        StartupError: the configuration is wrong, whatever is installed.
    """
    if any(reference.options for _, reference in get_settings(datasette).references()):
        from .checks import check_options

        check_options(datasette)


def warn(datasette: Datasette) -> None:
    """Log a sentence for everything in the configuration that can't have its effect here."""
    from .checks import problems

    for problem in problems(datasette):
        logger.warning("%s", problem)


async def prepare(datasette: Datasette) -> None:
    """Warn, and load what prompts to the default models need, without keeping pages waiting."""
    import anyio

    from ..calls.loading import import_model_plugins, load_for_workers, load_in_thread
    from .checks import default_models

    await anyio.sleep(QUIET_SECONDS)
    await import_model_plugins()
    warn(datasette)
    for model in default_models(datasette):
        await load_in_thread(model)
    if get_settings(datasette).may_use_workers:
        await load_for_workers()

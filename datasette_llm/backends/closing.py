"""Closing an async generator of somebody else's, whatever it makes of that."""

from __future__ import annotations

import logging
from typing import Any

from .._compat import BaseExceptionGroup

logger = logging.getLogger("datasette_llm")


async def close_quietly(generator: Any, what: str) -> None:
    """Close an async generator; one that fails at it is logged.

    A generator that holds a task group around its ``yield`` leaves it with ``GeneratorExit`` in an exception
    group, which Python does not take for the end that it is.

    Args:
        generator: an async generator, or any object; one without ``aclose()`` is left alone.
        what: what it is, for the log.

    Raises:
        BaseException: what is neither an error nor that: a cancellation, ``KeyboardInterrupt``.
    """
    close = getattr(generator, "aclose", None)
    if close is None:
        return
    failure: BaseException | None = None
    try:
        await close()
    except BaseExceptionGroup as group:
        _, failure = group.split(GeneratorExit)
        if failure is not None and not isinstance(failure, Exception):
            raise
    except Exception as error:
        failure = error
    if failure is not None:
        logger.error("Closing %s failed", what, exc_info=failure)

"""What an exception says about why a task ended: cancelled, stopped with the program, or failed of itself."""

from __future__ import annotations

from anyio import get_cancelled_exc_class

from .._compat import BaseExceptionGroup
from ..errors import PromptCancelled, leaves_of


def misplaced(stop: BaseException) -> RuntimeError:
    """Return the error of a prompt whose task was cancelled by code that it called."""
    error = RuntimeError("asyncio code that a plugin or the model called cancelled the prompt's task")
    error.__cause__ = stop
    return error


def comes_of_cancellation(error: BaseException) -> bool:
    """Whether an error was raised while a cancellation was handled, by a library that words it its way."""
    stop = get_cancelled_exc_class()
    pending: list[BaseException | None] = [error]
    seen = set()
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        if isinstance(found, stop):
            return True
        seen.add(id(found))
        pending += [found.__cause__, found.__context__]
    return False


def ends_program(error: BaseException) -> bool:
    """Whether an exception asks the whole program to stop."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup((KeyboardInterrupt, SystemExit)) is not None
    return isinstance(error, (KeyboardInterrupt, SystemExit))


def without_echo(error: BaseExceptionGroup[BaseException], failure: Exception | None) -> BaseException:
    """Return what a wrapper really raised, if it holds a task group around its ``yield``.

    What was raised at the ``yield`` leaves a task group in an exception group. If that is all there is in
    it, the prompt has ended with just that. If it was a cancellation, what is beside it is the error.

    Args:
        error: what came out of the wrapper.
        failure: what the work inside of the wrapper ended with.
    """
    leaves = list(leaves_of(error))
    echoes = [leaf for leaf in leaves if leaf is failure or isinstance(leaf, PromptCancelled)]
    if not echoes:
        # A group of the plugin's own, or of the model's.
        return error
    if len(echoes) == len(leaves):
        return next((echo for echo in echoes if not isinstance(echo, PromptCancelled)), echoes[0])
    _, rest = error.split(PromptCancelled)
    assert rest is not None
    found = list(leaves_of(rest))
    return found[0] if len(found) == 1 else rest

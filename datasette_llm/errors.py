"""The exceptions this package raises itself; everything else arrives as it was raised, maybe in groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import llm

from ._compat import BaseExceptionGroup

if TYPE_CHECKING:
    from collections.abc import Iterator


class ModelNotFoundError(llm.UnknownModelError):
    """No such model, or not one this purpose and actor may use.

    Also caught by ``except llm.UnknownModelError`` (and so by ``except KeyError``).
    """

    def __str__(self) -> str:
        # KeyError's own __str__ is the repr of its argument: quotes around a sentence.
        return str(self.args[0]) if self.args else ""


class PromptCancelled(Exception):
    """The prompt was cancelled before it was complete.

    Hook wrappers see it at their ``yield``; readers of the response get it from every read.
    It is an ordinary exception, so ``except Exception`` settles what has to be settled.
    """


class GroupClosed(RuntimeError):
    """A prompt was asked of a group whose block has already been left."""


class ProviderUnreachable(Exception):
    """A provider could not be reached for as long as the prompt's owner waits for it.

    The provider's own last error is its ``__cause__``.

    Attributes:
        address: whom it was tried to reach, if that is known: host and port.
        what: what happened at the last try.
        seconds: for how long.
        reached: whether it had answered anything before.
    """

    def __init__(self, address: str | None, what: str, seconds: float, *, reached: bool) -> None:
        super().__init__(address, what, seconds)
        self.address = address
        self.what = what
        self.seconds = seconds
        self.reached = reached

    def __str__(self) -> str:
        return (
            f"no connection to {self.address or 'the provider'} for {self.seconds:.0f} seconds: {self.what}"
        )


class WorkersError(Exception):
    """Model calls cannot be made by workers as it was asked."""


class NoWorkers(ProviderUnreachable):
    """There was no worker for as long as prompts wait for one."""

    def __str__(self) -> str:
        return f"no worker for {self.seconds:.0f} seconds: {self.what}"


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group, however deep they are; of any other, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves_of(inner)
    else:
        yield error

"""What goes wrong with a whole job, and what goes wrong with one row of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datasette_llm.errors import NoWorkers, WorkersError, leaves_of

if TYPE_CHECKING:
    from datasette_llm._compat import BaseExceptionGroup


class EnrichError(Exception):
    """The job cannot start or go on; everything that was written stays written."""


class EnrichInputError(EnrichError, ValueError):
    """What was asked cannot be done: nothing was sent and nothing was written."""


class DatabaseError(EnrichError):
    """The database cannot be read or written.

    Attributes:
        trouble: what is in the way, in words, if it is something that may pass; else ``None``.
    """

    def __init__(self, message: str, trouble: str | None = None) -> None:
        super().__init__(message)
        self.trouble = trouble


class AlreadyRunning(EnrichError):
    """Another job is writing to the same column right now."""


class RowError(ValueError):
    """One row's prompt is no good; the other rows are not concerned.

    Attributes:
        kind: what happened, in a word or two: failures are counted by it.
    """

    kind = "cannot be rendered"


class AnswerError(RowError):
    """A row got an answer that is not written: it is not whole, says nothing, or fits nowhere."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def concerns_one_row(error: Exception) -> bool:
    """Say whether a failure tells nothing about the next row.

    A hundred answers of which none is any good have been paid for: that is the doing of the model, its
    options or the schema.
    """
    return isinstance(error, RowError) and not isinstance(error, AnswerError)


def raise_bare(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the one exception in a group bare, or the first if the database failed several tasks."""
    leaves = list(leaves_of(group))
    if len(leaves) == 1 or all(isinstance(leaf, EnrichError) for leaf in leaves):
        raise _as_the_jobs(leaves[0])
    raise group


def _as_the_jobs(error: BaseException) -> BaseException:
    """Return what the job ends with: that there are no workers for it is nothing that was not foreseen."""
    if isinstance(error, WorkersError):
        return EnrichInputError(f"The workers cannot be used: {error}")
    if isinstance(error, NoWorkers):
        return EnrichError(f"Nothing was sent: {error}")
    return error

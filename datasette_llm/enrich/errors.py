"""What goes wrong with a whole job, and what goes wrong with one row of it."""

from __future__ import annotations


class EnrichError(Exception):
    """The job cannot start or go on; everything that was written stays written."""


class EnrichInputError(EnrichError, ValueError):
    """What was asked cannot be done: nothing was sent and nothing was written."""


class AlreadyRunning(EnrichError):
    """Another job is writing to the same column right now."""


class RowError(ValueError):
    """One row's prompt or answer is no good; the other rows are not concerned."""

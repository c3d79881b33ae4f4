"""What a provider's batches look like from here: one way to speak of those of all providers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from .offline import Reply, Request


#: In a provider's batch, under this name, is our own reference to it.
REFERENCE = "datasette_llm"


class BatchError(Exception):
    """A provider does not do what is asked of its batches.

    Attributes:
        status: the HTTP status, if there was an answer.
        code: the error's code or type in the provider's own words, if it has one.
        sent: whether it may have been done all the same: the connection broke before there was an answer.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, sent: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.sent = sent


class OddLine(ValueError):
    """A line of results says nothing that can be used."""


class NoBatchesError(BatchError):
    """Requests of this kind cannot be sent in batches."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a provider takes in one batch."""

    requests: int
    size: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as the provider tells of it.

    Attributes:
        id: the provider's.
        state: ``failed`` is one that was never begun; its requests have not been billed.
        says: the state in the provider's own word.
        total: how many requests it has, if that is known by now.
        answered: those answered, refused ones included.
        expires: when the provider gives up what is not answered, in seconds since the epoch.
        results: where the results are, in the protocol's own terms.
        code: why it has failed, in the provider's own word.
        message: the same in words.
    """

    id: str
    state: Literal["running", "ended", "failed"]
    says: str
    total: int | None = None
    answered: int = 0
    expires: float | None = None
    results: tuple[str, ...] = ()
    code: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the results.

    Attributes:
        custom_id: whose it is.
        reply: the answer, or the refusal, as it would have come to a single request; ``None`` if the request
            was not carried out: the batch expired, or was cancelled, before.
    """

    custom_id: str
    reply: Value | None


@dataclass(frozen=True, slots=True)
class Value:
    """An answer or a refusal: a status, and what JSON says."""

    status: int
    body: Any = field(repr=False)


class BatchProtocol(Protocol):
    """How one family of providers takes batches.

    Attributes:
        name: the family.
        limits: of one batch.
        has_references: whether a batch has our reference, by which it is found again.
    """

    name: str
    limits: Limits
    has_references: bool

    def line(self, custom_id: str, request: Request) -> bytes:
        """Return one request as a line of a batch's file.

        Raises:
            NoBatchesError: the request is none that can be sent in a batch.
        """
        ...

    async def upload(self, path: Path, reference: str) -> str:
        """Send the file of a batch; return what `create` needs to know of it. Nothing is billed for this."""
        ...

    async def create(self, path: Path, uploaded: str, reference: str) -> Batch:
        """Have a batch begun."""
        ...

    async def find(self, reference: str, since: float, total: int) -> list[Batch]:
        """Return the batch that was begun under this reference, if there is one.

        Where batches have no references, those that may be it, latest first.

        Args:
            since: it was begun after that, in seconds since the epoch.
            total: how many requests it has.
        """
        ...

    async def look(self, batch_id: str) -> Batch: ...

    async def cancel(self, batch_id: str) -> None: ...

    def results(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        """Yield the lines of the results as they come."""
        ...

    def read(self, line: bytes) -> Line:
        """Read a line of the results.

        Raises:
            ValueError: it is none.
        """
        ...

    def reply(self, value: Value, request: Request) -> Reply:
        """Return an answer as it would have come over HTTP to this request."""
        ...

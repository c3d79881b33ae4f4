"""What a provider's batches look like from here: one way to speak of those of all providers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .offline import Reply, Request

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path


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
    """

    name: str
    limits: Limits

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

    async def find(self, reference: str, since: float, total: int, known: Sequence[str]) -> Batch | None:
        """Return the batch that was begun under this reference, if there is one.

        Args:
            since: it was begun after that, in seconds since the epoch.
            total: how many requests it has.
            known: batches that have other references.
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


def json_reply(value: Value) -> Reply:
    """Return an unstreamed answer."""
    return Reply(value.status, json.dumps(value.body).encode())


def json_line(value: dict[str, Any]) -> bytes:
    """Return a value as one line of a file."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # Half of a character, which only an escape can say.
        return json.dumps(value).encode()


def sse_reply(events: list[dict[str, Any]], *, named: bool = False, done: bool = False) -> Reply:
    """Return an answer in server-sent events.

    Args:
        named: name each event by its ``type``.
        done: end as OpenAI's streams do.
    """
    parts = []
    for event in events:
        name = f"event: {event['type']}\n" if named else ""
        parts.append(f"{name}data: {json.dumps(event)}\n\n")
    if done:
        parts.append("data: [DONE]\n\n")
    return Reply(200, "".join(parts).encode(), "text/event-stream")


def read_json(line: bytes) -> dict[str, Any]:
    """Return the object that a line is.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(line)
    if not isinstance(value, dict):
        raise OddLine
    return value


def size_of(path: Path) -> int:
    """Return the size of a file."""
    return path.stat().st_size


def as_dict(value: Any) -> dict[str, Any]:
    """Return a part of an answer, empty if it is missing or something else."""
    return value if isinstance(value, dict) else {}


def as_count(value: Any) -> int:
    """Return a number of requests; some providers write it as text."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError):
        return 0

"""What the interfaces of a pretended provider of batches have in common; each has a module of its own."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from .http_server import whole_reply
from .provider import Reply, json_reply

if TYPE_CHECKING:
    from .batch_provider import BatchProvider
    from .http_server import HTTPRequest

#: Custom id and body of one request of a batch.
Line = tuple[str, dict[str, Any]]
DAY = 86_400
TOKEN_CHARACTERS = 4


@dataclass
class Held:
    """A batch.

    Attributes:
        api: whose it is.
        endpoint: what its requests are for, where the interface says so.
        name: what whoever sent it calls it.
        state: in OpenAI's word.
        output: the lines of its results, as they are when it is over.
        errors: those that are kept apart, where the interface does so.
    """

    id: str
    api: Api
    lines: list[Line]
    begun: float
    tokens: int
    endpoint: str = ""
    name: dict[str, str] = field(default_factory=dict)
    state: str = "in_progress"
    code: str | None = None
    output: bytes = field(default=b"", repr=False)
    errors: bytes = field(default=b"", repr=False)

    @property
    def is_done(self) -> bool:
        """Whether it is over."""
        return self.state != "in_progress"


class Asked:
    """A request, its path taken apart."""

    def __init__(self, request: HTTPRequest) -> None:
        parts = urlsplit(request.target)
        self.method = request.method
        self.path = parts.path
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.headers = request.headers
        self.body = request.body

    @property
    def json(self) -> Any:
        """What the body says."""
        return json.loads(self.body)

    def under(self, base: str) -> str | None:
        """Return the rest of the path if it is that, or below it."""
        if self.path != base and not self.path.startswith(base + "/"):
            return None
        return self.path[len(base) + 1 :]


class Api:
    """How one provider's batches are spoken to.

    Attributes:
        keeps_errors_apart: whether what failed is in a file of its own.
    """

    keeps_errors_apart: ClassVar[bool] = False

    def __init__(self, provider: BatchProvider) -> None:
        self.provider = provider

    def handle(self, asked: Asked) -> Reply | None:
        """Answer a request, or return ``None`` if it is for another interface."""
        raise NotImplementedError

    # How a single request and its answer look

    def prompt(self, body: dict[str, Any]) -> str:
        """Return what the user said."""
        content = body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        """Return an answer."""
        raise NotImplementedError

    def error(self, message: str) -> dict[str, Any]:
        """Return a refusal."""
        return {"error": {"message": message, "type": "invalid_request_error", "code": None}}

    # How a batch and the lines of its results look

    def shown(self, held: Held) -> dict[str, Any]:
        """Return how a batch stands."""
        raise NotImplementedError

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        """Return a line of results."""
        raise NotImplementedError

    def unanswered(self, custom_id: str) -> bytes:
        """Return a line of a request that was not carried out."""
        raise NotImplementedError

    # For all of them

    def begun(self, held: Held) -> Reply:
        """Answer that a batch has begun, unless the connection is to break now."""
        if self.provider.settings.lost_answers > 0:
            self.provider.settings.lost_answers -= 1
            return broken()
        return json_reply(200, self.shown(held))

    def page(self, after: str | None, limit: int) -> tuple[list[Held], bool]:
        """Return batches after one, latest first, and whether there are more."""
        latest = [held for held in reversed(self.provider.batches.values()) if held.api is self]
        if after is not None:
            latest = latest[[held.id for held in latest].index(after) + 1 :]
        return latest[:limit], len(latest) > limit

    def sent(self, content: bytes) -> Reply:
        """Answer with a file, cut in the middle where that is set."""
        settings = self.provider.settings
        cut = settings.cut_downloads > 0 and bool(content)
        settings.cut_downloads -= cut
        return whole_reply(200, "application/jsonl", content, cut=cut)


def missing(what: str) -> Reply:
    """Answer that there is no such thing."""
    return json_reply(404, {"error": {"message": f"There is no {what}"}})


def broken() -> Reply:
    """Close the connection instead of an answer."""
    return Reply(0, [], then="close")


def rfc(seconds: float) -> str:
    """Return a moment as RFC 3339 writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

"""One HTTP server in a thread: it says what a test scripts, and counts what it sees."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.http_server import reply_head, serving, whole_reply
from benchmarks.provider import Provider, Reply, Settings

from .answers import Answer, Protocol, Raw, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.http_server import HTTPRequest


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    json: Any

    @property
    def is_retry(self) -> bool:
        """Whether an SDK says of itself that it sends this once more."""
        return self.headers.get("x-stainless-retry-count", "0") != "0"


class ProtocolServer:
    """A server that speaks one protocol.

    Attributes:
        url: where it is, without a path.
        script: what to answer: one thing for all, a list (its last is for all that follow), or a function
            of the request.
        requests: every request, in order of arrival.
    """

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.url = ""
        self.script: Any = Answer()
        self.requests: list[Request] = []
        # The benchmarks' counters, and their HTTP: this server differs in what it says.
        self._provider = Provider(Settings())

    def model(self, **options: Any) -> Any:
        """Make the family's async model, from the plugin itself, that talks to this server."""
        return self.protocol.model(self.url, **options)

    def prompt(self, request: Request) -> str:
        """What the user said in a request."""
        return self.protocol.prompt(request)

    @property
    def connections(self) -> int:
        """Connections accepted until now."""
        return self._provider.counts.connections

    @property
    def open_connections(self) -> int:
        """Connections open now."""
        return self._provider.counts.open_connections

    @property
    def disconnects(self) -> int:
        """Clients that went away before their answer was complete."""
        return self._provider.counts.client_disconnects

    @property
    def hidden_retries(self) -> int:
        """Requests that an SDK sent again by itself."""
        return sum(request.is_retry for request in self.requests)

    def answer(self, request: Request) -> Raw:
        """Take the next thing from the script."""
        self.requests.append(request)
        script = self.script
        if callable(script):
            said = script(request)
        elif isinstance(script, (Answer, Raw)):
            said = script
        else:
            said = script[min(len(self.requests), len(script)) - 1]
        if isinstance(said, Raw):
            return said
        if said.status >= 400:
            return whole(self.protocol.error(said), said)
        return self.protocol.render(said, request)

    @contextmanager
    def running(self) -> Iterator[ProtocolServer]:
        """Serve until the block is left; then every connection is closed."""
        with serving(self._handle, self._provider) as self.url:
            yield self

    def _handle(self, request: HTTPRequest) -> Reply:
        asked = Request(request.target, request.headers, json.loads(request.body) if request.body else None)
        return _reply(self.answer(asked))


def _reply(raw: Raw) -> Reply:
    if isinstance(raw.body, list):
        parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in raw.body]
        if raw.then == "keep":
            parts.append(b"0\r\n\r\n")
        head = reply_head(raw.status, raw.content_type, raw.headers)
        parts.insert(0, f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    else:
        body = raw.body.encode("utf-8", "surrogatepass") if isinstance(raw.body, str) else raw.body
        parts = whole_reply(raw.status, raw.content_type, body, raw.headers).parts
    return Reply(raw.status, parts, raw.delay, raw.gap, raw.then, counted=True)

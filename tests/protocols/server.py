"""One HTTP server in a thread: it says what a test scripts, and counts what it sees."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from benchmarks.provider import Provider, Reply, Settings
from benchmarks.wire import Connection

from .answers import Answer, Protocol, Raw, whole

if TYPE_CHECKING:
    from collections.abc import Iterator


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
        loop = asyncio.SelectorEventLoop()
        connections: list[_Connection] = []
        ready, end = threading.Event(), asyncio.Event()

        def connect() -> _Connection:
            connections.append(_Connection(self, self._provider))
            return connections[-1]

        async def serve() -> None:
            listening = await loop.create_server(connect, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
            ready.set()
            await end.wait()
            listening.close()
            for connection in connections:
                connection.close()
            # A turn in which the transports close their sockets.
            await asyncio.sleep(0)

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            ready.wait()
            yield self
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join()
            loop.close()


class _Connection(Connection):
    def __init__(self, server: ProtocolServer, provider: Provider) -> None:
        super().__init__(provider)
        self._server = server

    def close(self) -> None:
        self._transport.abort()

    def _route(self, head: bytes, body: bytes) -> Reply:
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        request = Request(first.split(" ")[1], headers, json.loads(body) if body else None)
        self._provider.counts.requests += 1
        try:
            raw = self._server.answer(request)
        except Exception as error:
            # A fault of the script: the test shall see it as what was answered.
            raw = Raw(f"{type(error).__name__}: {error}", "text/plain", 418)
        return _reply(raw)


def _reply(raw: Raw) -> Reply:
    head = f"HTTP/1.1 {raw.status} {HTTPStatus(raw.status).phrase}\r\ncontent-type: {raw.content_type}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in raw.headers.items())
    if isinstance(raw.body, list):
        parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in raw.body]
        if raw.then == "keep":
            parts.append(b"0\r\n\r\n")
        parts.insert(0, f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    else:
        body = raw.body.encode("utf-8", "surrogatepass") if isinstance(raw.body, str) else raw.body
        parts = [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body]
    return Reply(raw.status, parts, raw.delay, raw.gap, raw.then, counted=True)

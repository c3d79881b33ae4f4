"""An HTTP server in a thread, around a function that answers requests: for tests and pretended providers."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from .provider import Provider, Reply
from .wire import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@dataclass(frozen=True)
class HTTPRequest:
    """A request as it arrived.

    Attributes:
        target: path and query.
        headers: by lower-case name.
    """

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


def whole_reply(
    status: int,
    content_type: str,
    body: bytes,
    headers: Mapping[str, str] | None = None,
    *,
    cut: bool = False,
) -> Reply:
    """Return a reply that is sent in one piece.

    Args:
        cut: send half of the body, and close the connection.
    """
    head = f"{reply_head(status, content_type, headers)}content-length: {len(body)}\r\n\r\n".encode()
    return Reply(status, [head + (body[: len(body) // 2] if cut else body)], then="close" if cut else "keep")


def reply_head(status: int, content_type: str, headers: Mapping[str, str] | None = None) -> str:
    """Return the first lines of a reply, without those that say how long it is."""
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {content_type}\r\n"
    return head + "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())


@contextmanager
def serving(handle: Callable[[HTTPRequest], Reply], counting: Provider) -> Iterator[str]:
    """Serve from a thread until the block is left, then close every connection; the value is the address.

    Args:
        handle: answers a request; what it raises is answered with status 418.
        counting: has the counts of requests and connections.
    """
    loop = asyncio.SelectorEventLoop()
    connections: list[_Handled] = []
    ready, end = threading.Event(), asyncio.Event()
    address: list[str] = []

    def connect() -> _Handled:
        connections.append(_Handled(handle, counting))
        return connections[-1]

    async def serve() -> None:
        listening = await loop.create_server(connect, "127.0.0.1", 0)
        address.append(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        ready.set()
        await end.wait()
        listening.close()
        for connection in connections:
            connection.abort()
        # A turn in which the transports close their sockets.
        await asyncio.sleep(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        ready.wait()
        yield address[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()
        loop.close()


class _Handled(Connection):
    def __init__(self, handle: Callable[[HTTPRequest], Reply], counting: Provider) -> None:
        super().__init__(counting)
        self._handle = handle

    def abort(self) -> None:
        self._transport.abort()

    def _route(self, head: bytes, body: bytes) -> Reply:
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._provider.counts.requests += 1
        try:
            return self._handle(HTTPRequest(method, target, headers, body))
        except Exception as error:
            # A fault of the test's own: it shall see it as what was answered.
            return whole_reply(418, "text/plain", f"{type(error).__name__}: {error}".encode())

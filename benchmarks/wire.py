"""HTTP/1.1 over asyncio: as little of it as a provider's client needs, and little work per request.

One ``Connection`` per socket, in one of three states: reading a request; carrying out a reply (a
timer is set, bytes that arrive meanwhile wait); hanging, for a request that is never answered. A
client that goes away while a reply is carried out is counted, and its timer cancelled.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, cast

from .provider import Reply, json_reply

if TYPE_CHECKING:
    from .provider import Provider

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_AUTHORIZATION = re.compile(rb"\r\nauthorization:[ \t]*([^\r]*)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_LARGEST_HEAD = 64 * 1024
_LARGEST_BODY = 64 * 1024 * 1024


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._buffer = b""
        self._reply: Reply | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last = False
        self._sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._provider.counts.connections += 1
        self._provider.counts.open_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        counts = self._provider.counts
        counts.open_connections -= 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reply is not None:
            counts.client_disconnects += 1
            if self._reply.counted:
                counts.running -= 1
            self._reply = None

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if self._reply is None:
            self._read_request()

    def _read_request(self) -> None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > _LARGEST_HEAD:
                self._refuse_to_read("the request head is too long")
            return
        head = buffer[:end]
        if _CHUNKED.search(head):
            self._refuse_to_read("send a content-length")
            return
        length = _LENGTH.search(head)
        stop = end + 4 + (int(length[1]) if length else 0)
        if stop > _LARGEST_BODY:
            self._refuse_to_read("the request body is too long")
            return
        if len(buffer) < stop:
            return
        self._buffer = buffer[stop:]
        self._last = _CLOSE.search(head) is not None
        self._start(self._route(head, buffer[end + 4 : stop]))

    def _refuse_to_read(self, why: str) -> None:
        self._buffer = b""
        reply = json_reply(400, {"error": {"message": why}})
        reply.then = "close"
        self._start(reply)

    def _route(self, head: bytes, body: bytes) -> Reply:
        provider = self._provider
        request = head.split(b"\r\n", 1)[0].split(b" ")
        method, target = (request[0], request[1]) if len(request) == 3 else (b"", b"")
        path, _, query = target.partition(b"?")
        if method == b"POST" and path == b"/v1/chat/completions":
            authorization = _AUTHORIZATION.search(head)
            reply = provider.answer(body, authorization[1].decode("latin-1") if authorization else "")
            provider.counts.statuses[reply.status] += 1
            return reply
        if method == b"GET" and path == b"/v1/models":
            return provider.models()
        if method == b"GET" and path == b"/counts":
            return json_reply(200, provider.counts.as_dict(prompts=query == b"prompts=1"))
        if method == b"POST" and path == b"/reset":
            provider.reset()
            return json_reply(200, {"ok": True})
        if method == b"POST" and path == b"/settings":
            try:
                provider.configure(type(provider.settings)().changed(json.loads(body)))
            except (ValueError, TypeError) as error:
                return json_reply(400, {"error": {"message": str(error)}})
            return json_reply(200, {"ok": True})
        return json_reply(404, {"error": {"message": "there is no such page"}})

    def _start(self, reply: Reply) -> None:
        self._reply = reply
        self._sent = 0
        if reply.counted:
            counts = self._provider.counts
            counts.running += 1
            counts.peak = max(counts.peak, counts.running)
        if reply.then == "hang" and not reply.parts:
            return
        if reply.delay > 0:
            self._timer = self._loop.call_later(reply.delay, self._continue)
        else:
            self._continue()

    def _continue(self) -> None:
        reply = self._reply
        assert reply is not None
        if reply.gap and self._sent < len(reply.parts):
            self._transport.write(reply.parts[self._sent])
            self._sent += 1
            if self._sent < len(reply.parts):
                self._timer = self._loop.call_later(reply.gap, self._continue)
                return
        elif reply.parts:
            self._transport.write(b"".join(reply.parts) if len(reply.parts) > 1 else reply.parts[0])
        self._timer = None
        self._reply = None
        counts = self._provider.counts
        if reply.counted:
            counts.running -= 1
        if reply.prompt is not None:
            self._provider.sent(reply.prompt)
        if self._last or reply.then == "close":
            self._transport.close()
        elif self._buffer:
            self._read_request()

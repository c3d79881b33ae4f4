"""Requests about batches: files up and down in streams, answers read, refusals in words."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import stamina

from ..clients.transport import shared_ssl_context
from ..retry import quietly
from .protocol import BatchError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from .offline import Request

#: Seconds without a byte from the provider. Some check a large file before they answer.
SILENCE_SECONDS = 120.0
#: A request that changes nothing is made so often, and for so many seconds, while the provider is unwell.
ATTEMPTS, ATTEMPT_SECONDS = 6, 90.0
#: A longer line is no result.
LONGEST_LINE = 64_000_000

#: Headers of a recorded request that are that request's alone.
_OWN = frozenset(
    {"content-length", "content-type", "host", "connection", "accept-encoding", "transfer-encoding"}
)
_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class Endpoint:
    """A provider's address, with the headers that a model's own requests have.

    Args:
        request: one of these, recorded.
        ending: the end of its path that is not the provider's base address.
    """

    def __init__(self, request: Request, ending: str) -> None:
        parts = urlsplit(request.url)
        path = parts.path[: len(parts.path) - len(ending)]
        self.base = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.root = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        # An SDK's query, such as the version of the interface, goes with what belongs to batches too.
        self.query = f"?{parts.query}" if parts.query else ""
        self._headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in _OWN and not name.lower().startswith("x-stainless")
        }
        self._client = httpx.AsyncClient(
            headers=self._headers, timeout=SILENCE_SECONDS, verify=shared_ssl_context(httpx)
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def ask(self, method: str, url: str, **kwargs: Any) -> dict[str, Any]:
        """Ask for something that may be asked for twice; return its JSON.

        Raises:
            BatchError: the provider refuses, or is not there.
        """
        with quietly():
            async for attempt in stamina.retry_context(
                on=_may_pass, attempts=ATTEMPTS, timeout=ATTEMPT_SECONDS
            ):
                with attempt:
                    return await self.do(method, url, **kwargs)
        raise AssertionError  # stamina raises the last error

    async def do(self, method: str, url: str, **kwargs: Any) -> dict[str, Any]:
        """Make a request once; return its JSON."""
        return (await self.send(method, url, **kwargs))[0]

    async def send(self, method: str, url: str, **kwargs: Any) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Make a request once; return its JSON and its headers.

        Raises:
            BatchError: the provider refuses, or is not there.
        """
        try:
            response = await self._client.request(method, url, **kwargs)
        except httpx.TransportError as error:
            raise _broken(error) from error
        _check(response.status_code, response.content)
        try:
            value = response.json() if response.content else {}
        except ValueError:
            raise BatchError("the provider's answer about a batch is no JSON") from None
        return (value if isinstance(value, dict) else {}), response.headers

    async def lines(self, url: str) -> AsyncGenerator[bytes, None]:
        """Yield the lines of a file as they come.

        Raises:
            BatchError: the provider refuses, or the connection breaks before the end.
        """
        async with self._streamed(url) as response:
            rest = b""
            try:
                async for chunk in response.aiter_bytes():
                    *whole, rest = (rest + chunk).split(b"\n")
                    for line in whole:
                        if line.strip():
                            yield line
                    if len(rest) > LONGEST_LINE:
                        rest = b""
            except httpx.TransportError as error:
                raise _broken(error) from error
            if rest.strip():
                yield rest

    @asynccontextmanager
    async def _streamed(self, url: str) -> AsyncIterator[httpx.Response]:
        request = self._client.build_request("GET", url)
        try:
            response = await self._client.send(request, stream=True, follow_redirects=True)
        except httpx.TransportError as error:
            raise _broken(error) from error
        try:
            if response.status_code >= 400:
                _check(response.status_code, await response.aread())
            yield response
        finally:
            await response.aclose()


def _broken(error: httpx.TransportError) -> BatchError:
    never = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout))
    return BatchError(f"the provider cannot be reached: {str(error) or type(error).__name__}", sent=not never)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, BatchError) and (error.sent or error.status in _PASSING or _unreached(error))


def _unreached(error: BatchError) -> bool:
    return isinstance(error.__cause__, httpx.TransportError)


def may_pass(error: BatchError) -> bool:
    """Say whether the same request may succeed a little later."""
    return _may_pass(error)


def _check(status: int, content: bytes) -> None:
    if status < 400:
        return
    message, code = _told(content)
    raise BatchError(message or f"the provider answered with status {status}", status=status, code=code)


def _told(content: bytes) -> tuple[str, str | None]:
    try:
        value = json.loads(content)
    except ValueError:
        return content[:300].decode(errors="replace").strip(), None
    if isinstance(value, list) and value:
        value = value[0]
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return str(error)[:300], None
    code = (
        error.get("code") if isinstance(error.get("code"), str) else error.get("type") or error.get("status")
    )
    return str(error.get("message") or ""), code if isinstance(code, str) else None

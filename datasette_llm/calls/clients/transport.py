"""HTTP clients as all makes of SDK get them: certificates loaded once, answers told, connections kept."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from ...backends.datasette_side import backend
from .. import http_answers
from .keepalive import keep_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

#: Connections a client may open.
MOST_CONNECTIONS = 512

#: Seconds an idle connection is kept: longer than a cooldown usually lasts.
KEEPALIVE_SECONDS = 30.0

#: How long the rest of an answer is waited for whose last event was read, in seconds.
DRAIN_SECONDS = 0.1

#: What ends a stream of events: nothing follows but the end of the answer.
END_OF_EVENTS = b"data: [DONE]"

_SENT = "datasette_llm.sent"


class Observe(Protocol):
    """Is told each response's status and headers, and how many seconds after its request they came.

    One with an attribute ``transport`` has the clients get their answers from what that makes, for an HTTP
    library, in place of the network.
    """

    def __call__(self, status: int, headers: Mapping[str, str], age: float = 0.0, /) -> object: ...


def http_options(
    library: Any, observe: Observe | None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the keyword arguments with which a client is made that many prompts share.

    Args:
        library: ``httpx`` or ``httpx2``, whichever the client is of.
        observe: called for each response.
        given: what the client's maker asked for, which comes first.
    """
    options: dict[str, Any] = {
        "limits": library.Limits(
            max_connections=MOST_CONNECTIONS,
            max_keepalive_connections=MOST_CONNECTIONS,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
        "event_hooks": {"request": [_stamp], "response": [_reporter(library, observe)]},
    }
    given = {} if given is None else given
    offline = _offline(observe)
    if offline is not None:
        options["transport"] = offline(library)
    if given.get("verify", True) is True and given.get("cert") is None:
        options["verify"] = shared_ssl_context(library)
    return {
        **options,
        **{name: value for name, value in given.items() if name != "verify" or value is not True},
    }


def sdk_client(package: Any, factory: Any, library: Any, observe: Observe | None) -> Any:
    """Return an HTTP client for an SDK that many prompts share.

    Args:
        package: the SDK.
        factory: what it makes clients with.
        library: the HTTP library of these.
        observe: called for each response.
    """
    if _offline(observe) is None:
        factory = leanest(package, factory, library, backend())
    return keep_alive(factory(**http_options(library, observe)))


def _offline(observe: Observe | None) -> Callable[[Any], Any] | None:
    """Return what makes the transport of clients that reach nobody, where an observer brings one."""
    return getattr(observe, "transport", None)


def shared_ssl_context(library: Any) -> Any:
    """Return the certificates that all clients use, loaded once per process (20 milliseconds)."""
    return _ssl_context(library, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=8)
def _ssl_context(library: Any, *_variables: str | None) -> Any:
    """Load the certificates: what makes a client expensive, and belongs to no key and no event loop."""
    return library.create_ssl_context()


async def _stamp(request: Any) -> None:
    request.extensions[_SENT] = anyio.current_time()


def _reporter(library: Any, observe: Observe | None) -> Callable[[Any], Any]:
    read_on = _read_on(library)

    async def report(response: Any) -> None:
        http_answers.saw(response)
        if "text/event-stream" in response.headers.get("content-type", ""):
            response.stream = read_on(response.stream)
        if observe is not None:
            now = anyio.current_time()
            sent = response.request.extensions.get(_SENT, now)
            observe(response.status_code, response.headers, now - sent)

    return report


@functools.cache
def _read_on(library: Any) -> Any:
    """Return a class of byte streams that keep their connection when they are closed after the last event.

    Some SDKs close an answer when they have seen its last event. What is left to read is the end of the body,
    without which the connection cannot be used again.
    """

    class ReadOn(library.AsyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any) -> None:
            self._stream = stream
            self._chunks: Any = None
            self._tail = b""
            self._ended = False

        async def __aiter__(self) -> Any:
            self._chunks = self._stream.__aiter__()
            async for chunk in self._chunks:
                self._tail = (self._tail + chunk)[-64:]
                yield chunk
            self._ended = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

        async def aclose(self) -> None:
            chunks, self._chunks = self._chunks, None
            if chunks is not None and not self._ended and END_OF_EVENTS in self._tail:
                # Cancelled, this ends at once.
                try:
                    with anyio.move_on_after(DRAIN_SECONDS):
                        async for _ in chunks:
                            pass
                finally:
                    await self._stream.aclose()
            else:
                await self._stream.aclose()

    return ReadOn


def library_of(value: type) -> ModuleType | None:
    """Return the HTTP library, ``httpx`` or ``httpx2``, that a class uses where it is defined."""
    for base in value.__mro__:
        library = _library_in(sys.modules.get(base.__module__))
        if library is not None:
            return library
    return None


def library_that(module: Any) -> ModuleType:
    """Return the HTTP library that a module uses; ``httpx`` if it uses none."""
    return _library_in(module) or importlib.import_module("httpx")


def _library_in(module: Any) -> ModuleType | None:
    for name in ("httpx2", "httpx"):
        library = getattr(module, name, None)
        if is_http_library(library):
            return library
    return None


def is_http_library(value: Any) -> bool:
    """Say whether this is the module of httpx or httpx2, or another that has all that is used of it here."""
    return all(hasattr(value, name) for name in ("AsyncClient", "Client", "Limits", "create_ssl_context"))


def client_factory(package: Any) -> tuple[Any, Any] | None:
    """Return what makes async HTTP clients with an SDK's defaults, and the library these come from.

    Args:
        package: an SDK that Stainless generated, such as ``openai``. Newer versions of openai are built on
            httpx2 and have a class for httpx beside; most have one name for both.

    Returns:
        ``None`` if this version has neither.
    """
    for name in ("DefaultAsyncHttpx2Client", "DefaultAsyncHttpxClient"):
        factory = getattr(package, name, None)
        for base in getattr(factory, "__mro__", ()):
            if base.__name__ == "AsyncClient":
                return factory, importlib.import_module(base.__module__.partition(".")[0])
    return None


def leanest(package: Any, factory: Any, library: Any, backend: str) -> Any:
    """Return what an SDK makes HTTP clients with that take the least CPU, where that is installed.

    On asyncio that is the SDK's own client on aiohttp (``datasette-llm[fast]``): a tenth to four tenths less.

    Args:
        package: the SDK.
        factory: what it makes clients with otherwise.
        library: the HTTP library of these.
        backend: what they will be used on, ``asyncio`` or ``trio``.
    """
    fast = getattr(package, "DefaultAioHttpClient", None)
    if fast is None or backend != "asyncio":
        return factory
    # Without aiohttp there is a class of that name that cannot be used.
    on_aiohttp = any(base.__name__.lower().endswith("aiohttpclient") for base in fast.__mro__[1:])
    return fast if on_aiohttp and issubclass(fast, library.AsyncClient) else factory

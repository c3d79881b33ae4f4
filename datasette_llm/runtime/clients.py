"""HTTP clients that are made once and used by many prompts.

llm's OpenAI-family models make a client for each prompt: 25 ms of CPU, nearly all of it to load
certificates, and a new connection. A ``ClientPool`` gives a model object (a copy that nobody else
holds) an instance attribute ``get_client`` that remembers the clients it made. No class and no
module is patched, so a model whose plugin makes its clients inside of ``execute()`` stays as it is.

A pool lives as long as its owner: a group, or the supervisor of an event loop's standalone prompts.
Clients are kept per API key, address and headers, so two keys never share one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

#: How many requests one HTTP client is given at a time before another one is made beside it: httpcore
#: looks through all connections of a pool for each request, which at 500 in flight costs as much CPU as
#: the request itself.
REQUESTS_PER_CLIENT = 64

#: Connections a client may open; it is given more requests than ``REQUESTS_PER_CLIENT`` only when all
#: the ``MOST_CLIENTS`` are that busy.
MOST_CONNECTIONS = 512
MOST_CLIENTS = 8

#: Seconds an idle connection is kept: longer than a cooldown usually lasts.
KEEPALIVE_SECONDS = 30.0

#: How long closing all clients may take, in seconds.
CLOSE_SECONDS = 5.0


class Observe(Protocol):
    """Is told each response's status and headers, and how many seconds after its request they came."""

    def __call__(self, status: int, headers: Mapping[str, str], age: float = 0.0, /) -> object: ...


class ClientPool:
    """The clients of one owner, closed together."""

    def __init__(self) -> None:
        self._sets: dict[Hashable, _ClientSet] = {}
        self.closed = False

    def adopt(self, model: Any, observe: Observe | None = None) -> bool:
        """Have a model take its OpenAI clients from this pool.

        Args:
            model: a model object that nobody else holds; it gets instance attributes.
            observe: called for each HTTP response, with its status and headers.

        Returns:
            whether the model is of a kind this can be done for; any other is left alone.
        """
        if not makes_openai_clients(model) or os.environ.get("LLM_OPENAI_SHOW_RESPONSES"):
            # With that variable llm gives each client a transport of its own, which prints.
            return False
        original = model.get_client

        def get_client(key: str | None, *, async_: bool = False) -> Any:
            if not async_ or self.closed:
                return original(key, async_=async_)
            identity = (
                model.key if model.key is not None else key,
                model.api_base,
                model.api_type,
                model.api_version,
                model.api_engine,
                tuple(sorted((model.headers or {}).items())),
                observe,
            )
            try:
                clients = self._sets[identity]
            except KeyError:
                template = original(key, async_=True)
                clients = self._sets[identity] = _ClientSet(template, observe)
            return clients.lease()

        model.get_client = get_client
        return True

    async def aclose(self) -> None:
        """Close every client; afterwards models get clients of their own again. Never hangs."""
        self.closed = True
        sets, self._sets = list(self._sets.values()), {}
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            for clients in sets:
                await clients.aclose()


def makes_openai_clients(model: Any) -> bool:
    """Say whether a model makes its clients with ``get_client(key, *, async_)``, as llm's own do."""
    from llm.default_plugins import openai_models

    if not isinstance(model, openai_models._Shared):
        return False
    try:
        parameters = inspect.signature(model.get_client).parameters
    except (TypeError, ValueError):  # pragma: no cover - a get_client written in C
        return False
    return list(parameters) == ["key", "async_"]


_prepared = False


async def prepare_clients(model: Any) -> None:
    """Have a worker thread do what the first client of a process takes, if this model is to make one.

    Loading certificates and openai's modules takes some 0.3 seconds: an event loop that serves pages
    has to go on meanwhile.
    """
    global _prepared
    if not _prepared and makes_openai_clients(model):
        await anyio.to_thread.run_sync(_prepare)
        _prepared = True


def _prepare() -> None:
    import openai

    found = http_library()
    if found is not None:
        factory, library = found
        # Never used: looking at its parts makes openai import them.
        client = openai.AsyncOpenAI(api_key="-", http_client=factory(verify=_shared_ssl_context(library)))
        _ = client.chat.completions, client.responses


class _ClientSet:
    """Clients that are alike, each with connections of its own; the first that has room is used next."""

    def __init__(self, template: Any, observe: Observe | None) -> None:
        self._template = template
        self._observe = observe
        self._clients: list[_Client] = []
        self._http_library = http_library()

    def lease(self) -> Any:
        if self._http_library is None:
            # This version of openai has nothing to make a transport with: one client, kept.
            return self._template
        least = None
        for client in self._clients:
            # Filling one after the other keeps few connections open, and those warm.
            if client.busy < REQUESTS_PER_CLIENT:
                return _Lease(client)
            if least is None or client.busy < least.busy:
                least = client
        if least is None or len(self._clients) < MOST_CLIENTS:
            factory, library = self._http_library
            least = _Client(self._template, factory, library, self._observe)
            self._clients.append(least)
        return _Lease(least)

    async def aclose(self) -> None:
        try:
            await self._template.close()
        finally:
            for client in self._clients:
                await client.http.aclose()


class _Client:
    """One OpenAI client on a transport of its own, without the retries that openai makes in secret."""

    def __init__(self, template: Any, factory: Any, library: Any, observe: Observe | None) -> None:
        self.busy = 0
        hooks = {} if observe is None else {"request": [_stamp], "response": [_reporter(observe)]}
        self.http = factory(
            limits=library.Limits(
                max_connections=MOST_CONNECTIONS,
                max_keepalive_connections=MOST_CONNECTIONS,
                keepalive_expiry=KEEPALIVE_SECONDS,
            ),
            event_hooks=hooks,
            verify=_shared_ssl_context(library),
        )
        self.openai = template.with_options(max_retries=0, http_client=self.http)


class _Lease:
    """A client as one prompt sees it: the client counts as busy for as long as this object lives.

    A model keeps its client in a local variable of ``execute()``, so that is until the answer is
    complete, failed or given up, streamed or not.
    """

    __slots__ = ("_leased",)

    def __init__(self, client: _Client) -> None:
        client.busy += 1
        self._leased = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._leased.openai, name)

    def __del__(self) -> None:
        self._leased.busy -= 1


def _shared_ssl_context(library: Any) -> Any:
    return _ssl_context(library, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=4)
def _ssl_context(library: Any, *_variables: str | None) -> Any:
    """Load the certificates: what makes a client expensive, and belongs to no key and no event loop."""
    return library.create_ssl_context()


_SENT = "datasette_llm.sent"


async def _stamp(request: Any) -> None:
    request.extensions[_SENT] = anyio.current_time()


def _reporter(observe: Observe) -> Callable[[Any], Any]:
    async def report(response: Any) -> None:
        now = anyio.current_time()
        observe(response.status_code, response.headers, now - response.request.extensions.get(_SENT, now))

    return report


def http_library() -> tuple[Any, Any] | None:
    """Return what makes async HTTP clients with openai's defaults, and the library these come from.

    Newer versions of openai are built on httpx2, older ones on httpx; ``None`` if this one has neither.
    """
    # Not before it is needed: importing openai takes a third of a second.
    import openai

    for name, library in (("DefaultAsyncHttpx2Client", "httpx2"), ("DefaultAsyncHttpxClient", "httpx")):
        factory = getattr(openai, name, None)
        if factory is not None:
            return factory, importlib.import_module(library)
    return None

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
import logging
import os
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

logger = logging.getLogger("datasette_llm")

#: How many requests one HTTP client is given at a time before another one is made beside it: httpcore
#: looks through all connections of a pool twice for each request. Against 64, and with 500 in flight, 8 saves
#: a tenth of the CPU that a prompt takes.
REQUESTS_PER_CLIENT = 8

#: Beyond that many clients, the one that is least busy is given the next request.
MOST_CLIENTS = 64

#: Connections a client may open.
MOST_CONNECTIONS = 512

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
        model.get_client = _PooledFactory(self, model, observe)
        return True

    async def prepare(self, model: Any, key: str | None) -> None:
        """Have a worker thread make the first client that an adopted model will ask for.

        It loads the certificates, 20 milliseconds for which an event loop that serves pages would stand
        still. A model that was not adopted is left alone. Does not raise: what is wrong with a client is
        found again, and told, by the first prompt.

        Args:
            model: the model, as it was adopted.
            key: the API key that its prompts will be sent with.
        """
        factory = getattr(model, "get_client", None)
        if isinstance(factory, _PooledFactory):
            try:
                await anyio.to_thread.run_sync(factory.clients_for, key)
            except Exception as error:
                logger.debug("No client for %s yet: %s", model.model_id, type(error).__name__)

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


class _PooledFactory:
    """A model's ``get_client``: what the model's own makes, made once and kept in a pool."""

    def __init__(self, pool: ClientPool, model: Any, observe: Observe | None) -> None:
        self._pool = pool
        self._model = model
        self._original = model.get_client
        self._observe = observe

    def __call__(self, key: str | None, *, async_: bool = False) -> Any:
        if not async_ or self._pool.closed:
            return self._original(key, async_=async_)
        return self.clients_for(key).lease()

    def clients_for(self, key: str | None) -> _ClientSet:
        """Return the clients for a key, the first of them made now if need be."""
        model = self._model
        identity = (
            model.key if model.key is not None else key,
            model.api_base,
            model.api_type,
            model.api_version,
            model.api_engine,
            tuple(sorted((model.headers or {}).items())),
            self._observe,
        )
        sets = self._pool._sets
        try:
            return sets[identity]
        except KeyError:
            return sets.setdefault(identity, _ClientSet(self._original(key, async_=True), self._observe))


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
            verify=shared_ssl_context(library),
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


def shared_ssl_context(library: Any) -> Any:
    """Return the certificates that all clients use, loaded once per process (20 milliseconds)."""
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

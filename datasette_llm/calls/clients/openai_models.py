"""llm's own models of the OpenAI family, and those that stem from them: a method ``get_client()``.

What it makes is made once for each key, address and headers. openai loads its parts when they are first used,
and an instance attribute is all that it takes: nothing is made anew.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from ..listening import listening
from .leases import ClientSet, Made
from .transport import client_factory, leanest, sdk_client, shared_ssl_context

if TYPE_CHECKING:
    from .leases import ClientSets
    from .transport import Observe


def makes_openai_clients(model: Any) -> bool:
    """Say whether a model makes its clients with ``get_client(key, *, async_)``, as llm's own do."""
    from llm.default_plugins import openai_models

    if not isinstance(model, openai_models._Shared):
        return False
    if os.environ.get("LLM_OPENAI_SHOW_RESPONSES"):
        # With that variable llm gives each client a transport of its own, which prints.
        return False
    try:
        parameters = inspect.signature(model.get_client).parameters
    except (TypeError, ValueError):  # pragma: no cover - a get_client written in C
        return False
    return list(parameters) == ["key", "async_"]


def is_openai_model(value: Any) -> bool:
    """Say whether this is a class of llm's own OpenAI models, which some models ask in their stead."""
    if not inspect.isclass(value) or not value.__module__.startswith("llm.default_plugins."):
        return False
    return has_get_client(value) and value.__name__.startswith("Async")


def has_get_client(kind: type) -> bool:
    """Say whether a model class stems from llm's own for OpenAI, which have a method ``get_client()``."""
    return any(
        base.__module__ == "llm.default_plugins.openai_models" and "get_client" in vars(base)
        for base in kind.__mro__
    )


class PooledFactory:
    """A model's ``get_client``: what the model's own makes, made once and kept in a pool."""

    def __init__(self, pool: ClientSets, model: Any, observe: Observe | None) -> None:
        self._pool = pool
        self._model = model
        self._original = model.get_client
        self._observe = observe

    def __call__(self, key: str | None, *, async_: bool = False) -> Any:
        if not async_ or self._pool.closed:
            client = self._original(key, async_=async_)
            return listening(client) if async_ else client
        return listening(self.clients_for(key).lease())

    def clients_for(self, key: str | None) -> ClientSet:
        """Return the clients for a key, the first of them made now if need be."""
        model = self._model
        identity = (
            model.key if model.key is not None else key,
            model.needs_key,
            model.api_base,
            model.api_type,
            model.api_version,
            model.api_engine,
            tuple(sorted((model.headers or {}).items())),
            self._observe,
        )
        return self._pool.clients(identity, lambda: self._clients_like(self._original(key, async_=True)))

    def _clients_like(self, template: Any) -> ClientSet:
        # Not before it is needed: importing openai takes a third of a second.
        import openai

        found = client_factory(openai)
        if found is None:
            # This version of openai has nothing to make a transport with: one client, kept.
            return ClientSet(lambda: Made(template, template.close), most=1)
        factory, library = found

        def make() -> Made:
            http = sdk_client(openai, factory, library, self._observe)
            return Made(template.with_options(max_retries=0, http_client=http), http.aclose)

        return ClientSet(make, template.close)


def load_openai(backend: str) -> None:
    """Load what the first client and the first prompt need, certificates among it; for a thread.

    Args:
        backend: what the prompts will run on, ``asyncio`` or ``trio``.
    """
    import openai

    found = client_factory(openai)
    if found is not None:
        factory, library = found
        http = leanest(openai, factory, library, backend)(verify=shared_ssl_context(library))
        # Never used: looking at its parts makes openai import them.
        client = openai.AsyncOpenAI(api_key="-", http_client=http)
        _ = client.chat.completions, client.responses

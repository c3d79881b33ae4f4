"""The makes of HTTP clients and SDKs that can be shared, each told by what it is, not by its plugin.

``make_of()`` looks at a class and says which make it is of. A make knows how one of its clients is made so
that many prompts can use it, without the retries that SDKs make in secret.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, Protocol

from .identity import CannotShareError
from .keepalive import keep_alive
from .leases import Made
from .speakeasy import speakeasy_make
from .transport import (
    client_factory,
    http_options,
    is_http_library,
    library_of,
    sdk_client,
    shared_ssl_context,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .transport import Observe


class Make(Protocol):
    """A kind of client class.

    Attributes:
        library: the HTTP library that its clients are built on.
        speaks_chat: whether they have OpenAI's chat completions, as Groq's and others' do.
    """

    library: Any
    speaks_chat: bool

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any], observe: Observe | None) -> Made:
        """Make a client with these arguments for many prompts.

        Raises:
            CannotShareError: it does not take what sharing needs.
        """
        ...

    def warm(self, names: tuple[str, ...]) -> None:
        """Load what the first use of a client would load; for a thread.

        Args:
            names: attributes that the model's code uses, of whatever it uses.
        """
        ...


def make_of(value: Any) -> Make | None:
    """Return the make of a class, or ``None`` if it is no client class that can be shared.

    A plugin's own subclass of a client is of no make: what it adds is not known.
    """
    return _make_of(value) if isinstance(value, type) else None


@functools.lru_cache(maxsize=256)
def _make_of(value: Hashable) -> Make | None:
    assert isinstance(value, type)
    for make in (_http, _stainless, speakeasy_make, _wrapper):
        try:
            found = make(value)
        except (TypeError, ValueError):  # pragma: no cover - a class without a signature
            found = None
        if found is not None:
            return found
    return None


def _root(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _http(value: type) -> Make | None:
    """``httpx.AsyncClient`` itself."""
    library = sys.modules.get(_root(value))
    if value.__name__ != "AsyncClient" or not is_http_library(library):
        return None
    return HttpMake(value, library) if getattr(library, "AsyncClient", None) is value else None


def _stainless(value: type) -> Make | None:
    """The async client of an SDK that Stainless generated: OpenAI's, Anthropic's, Groq's and others'."""
    base = next((base for base in value.__mro__[1:] if base.__name__ == "AsyncAPIClient"), None)
    if base is None or _root(base) != _root(value):
        return None
    if not {"http_client", "max_retries", "base_url"} <= set(inspect.signature(value).parameters):
        return None
    found = client_factory(sys.modules.get(_root(value)))
    return None if found is None else StainlessMake(value, *found)


def _wrapper(value: type) -> Make | None:
    """A client around an ``AsyncClient`` to which it passes on its keyword arguments: Ollama's."""
    code = getattr(vars(value).get("__init__"), "__code__", None)
    if code is None or "AsyncClient" not in code.co_names:
        return None
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(value).parameters.values()):
        return None
    library = library_of(value)
    return None if library is None else WrapperMake(value, library)


class HttpMake:
    """A client of the HTTP library, used as it is."""

    speaks_chat = False

    def __init__(self, kind: Any, library: Any) -> None:
        self._kind = kind
        self.library = library

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any], observe: Observe | None) -> Made:
        client = keep_alive(self._kind(*args, **http_options(self.library, observe, kwargs)))
        return Made(client, client.aclose)

    def warm(self, names: tuple[str, ...]) -> None:
        # Its connections' library is imported with the first one.
        self._kind(verify=shared_ssl_context(self.library))


class StainlessMake:
    """An SDK client on a shared HTTP client, without retries of its own."""

    def __init__(self, kind: Any, factory: Any, library: Any) -> None:
        self._kind = kind
        self._factory = factory
        self.library = library
        self.speaks_chat = hasattr(kind, "chat")

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any], observe: Observe | None) -> Made:
        if kwargs.get("http_client") is not None:
            raise CannotShareError("it was given an HTTP client")
        http = sdk_client(sys.modules.get(_root(self._kind)), self._factory, self.library, observe)
        client = self._kind(*args, **{**kwargs, "max_retries": 0, "http_client": http})
        return Made(client, http.aclose)

    def warm(self, names: tuple[str, ...]) -> None:
        http = self._factory(verify=shared_ssl_context(self.library))
        client = self._kind(api_key="-", base_url="http://127.0.0.1", http_client=http)
        _touch(client, names, depth=3)


class WrapperMake:
    """A client that makes its HTTP client itself, with what it is given for it."""

    speaks_chat = False

    def __init__(self, kind: Any, library: Any) -> None:
        self._kind = kind
        self.library = library

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any], observe: Observe | None) -> Made:
        options = http_options(self.library, observe, kwargs)
        client = self._kind(*args, **options)
        for held in vars(client).values():
            if isinstance(held, self.library.AsyncClient):
                hooks: Any = held.event_hooks
                if hooks["response"] == options["event_hooks"]["response"]:
                    return Made(client, keep_alive(held).aclose)
        raise CannotShareError("it does not pass on what its HTTP client is to be made with")

    def warm(self, names: tuple[str, ...]) -> None:
        self._kind(verify=shared_ssl_context(self.library))


def _touch(value: Any, names: tuple[str, ...], depth: int) -> None:
    """Look at those parts of a client that code uses: SDKs import them when they are first looked at."""
    for name in names:
        if depth and isinstance(inspect.getattr_static(type(value), name, None), functools.cached_property):
            try:
                _touch(getattr(value, name), names, depth - 1)
            except Exception:
                # What is wrong is found again by the first prompt.
                continue

"""SDKs that Speakeasy generates, with a sync and an async client inside: Mistral's.

Such an SDK makes a class of pydantic's for each value that it reads or writes, ten for a prompt and one for
each piece of a streamed answer, and sends each request twice through a thread. The methods of the shared
client's parts are made anew: a class is made once for each type, and what goes through a thread, on asyncio
alone, is called in place where it only looks at a request.
"""

from __future__ import annotations

import functools
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

import pydantic

from .identity import CannotShareError
from .keepalive import keep_alive
from .leases import Made
from .rebinding import rebind
from .survey import survey_of
from .transport import http_options, library_of, shared_ssl_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from .survey import Survey
    from .transport import Observe

#: For so many types classes are kept.
MOST_TYPES = 2000


def speakeasy_make(value: type) -> SpeakeasyMake | None:
    """Return the make of an SDK's class that Speakeasy generated; ``None`` if this is none."""
    parameters = inspect.signature(value).parameters
    if not {"client", "async_client", "retry_config", "server_url"} <= set(parameters):
        return None
    library = library_of(value)
    return None if library is None else SpeakeasyMake(value, library)


class SpeakeasyMake:
    """An SDK object on shared HTTP clients, without retries of its own."""

    speaks_chat = False

    def __init__(self, kind: Any, library: Any) -> None:
        self._kind = kind
        self.library = library

    def build(self, args: tuple[Any, ...], kwargs: dict[str, Any], observe: Observe | None) -> Made:
        if kwargs.get("async_client") is not None or kwargs.get("client") is not None:
            raise CannotShareError("it was given an HTTP client")
        options = http_options(self.library, observe, {"follow_redirects": True})
        http = keep_alive(self.library.AsyncClient(**options))
        # Never used, and made by the SDK if nobody else does.
        sync = self.library.Client(verify=shared_ssl_context(self.library))
        client = self._kind(*args, **{**kwargs, "client": sync, "async_client": http, "retry_config": None})

        async def aclose() -> None:
            sync.close()
            await http.aclose()

        # Without a key of its own an SDK may look for one in files, in its thread.
        keyed = bool(args or kwargs.get("api_key"))
        return Made(Light(client, keyed), aclose)

    def warm(self, names: tuple[str, ...]) -> None:
        made = self.build((), {"api_key": "-"}, None)
        for name in names:
            if name in _parts_of(self._kind):
                getattr(made.client, name)
        made.client.sdk_configuration.client.close()


def _parts_of(kind: type) -> Any:
    return getattr(kind, "_sub_sdk_map", ())


class Light:
    """An SDK object whose parts do no needless work."""

    def __init__(self, sdk: Any, keyed: bool) -> None:
        self._sdk = sdk
        self._keyed = keyed

    def __getattr__(self, name: str) -> Any:
        part = getattr(self._sdk, name)
        if name in _parts_of(type(self._sdk)):
            self._lighten(part)
            # Found without this method from now on.
            self.__dict__[name] = part
        return part

    def _lighten(self, part: Any) -> None:
        for name, function in vars(type(part)).items():
            if inspect.iscoroutinefunction(function) and isinstance(function, FunctionType):
                kind: Any = type(part)
                found = _survey(kind, function)
                if found.anew:
                    vars(part)[name] = rebind(found, part, self._stand_in)

    def _stand_in(self, value: Any) -> Any:
        if value is pydantic.create_model:
            return create_model_once
        if self._keyed and _runs_in_thread(value):
            return _in_place
        return value


@functools.lru_cache(maxsize=256)
def _survey(kind: Any, function: FunctionType) -> Survey:
    return survey_of(kind, function, lambda value: value is pydantic.create_model or _runs_in_thread(value))


def _runs_in_thread(value: Any) -> bool:
    """Whether a value is the SDK's function that runs another one in a thread of asyncio's."""
    return (
        isinstance(value, FunctionType)
        and inspect.iscoroutinefunction(value)
        and value.__code__.co_names == ("asyncio", "to_thread")
    )


async def _in_place(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_models: dict[tuple[str, Any], tuple[Any, Any]] = {}


def create_model_once(name: str, /, **definitions: Any) -> Any:
    """Do what ``pydantic.create_model()`` does for a class with one field ``body``, once for each type."""
    body = definitions.get("body")
    if not isinstance(body, tuple) or set(definitions) != {"body", "__config__"}:
        return pydantic.create_model(name, **definitions)
    key = (name, _structure(body[0]))
    known = _models.get(key)
    if known is None:
        if len(_models) >= MOST_TYPES:
            _models.clear()
        # The type is kept with its class: what it is made of has no other's identity.
        known = _models[key] = (body[0], pydantic.create_model(name, **definitions))
    return known[1]


def _structure(kind: Any) -> Any:
    """Return what two types have in common that are made of the same parts in the same order.

    Equal is not enough: unions that differ in their order are, and types that cannot be hashed are made anew
    each time that ``List[...]`` is run.
    """
    if isinstance(kind, list):
        return tuple(map(_structure, kind))
    parts = get_args(kind)
    return (id(get_origin(kind)), *map(_structure, parts)) if parts else id(kind)

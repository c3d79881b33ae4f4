"""A model whose code makes its clients itself: its own copy of ``execute()`` leases them from the pool."""

from __future__ import annotations

import copy
import inspect
import logging
import sys
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..listening import listening
from .identity import CannotShareError, environment_of, frozen
from .makes import make_of
from .openai_models import PooledFactory, has_get_client, is_openai_model, makes_openai_clients
from .rebinding import rebind
from .survey import load_imports, survey_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from .leases import ClientSets
    from .makes import Make
    from .survey import Reached, Survey
    from .transport import Observe

logger = logging.getLogger("datasette_llm")

#: For so many keys a model's code is made anew; prompts with yet another key have clients of their own.
MOST_KEYS = 32

_told: set[tuple[str, str]] = set()
_loaded: set[type] = set()
_surveys: WeakKeyDictionary[type, tuple[Any, Survey]] = WeakKeyDictionary()


def survey(kind: type) -> Survey | None:
    """Read the code of ``execute()`` of a class of models, once.

    Returns:
        ``None`` if it is no plain method of a class.
    """
    execute = inspect.getattr_static(kind, "execute", None)
    if not isinstance(execute, FunctionType):
        return None
    # What an OpenAI model makes its clients with is replaced in a way of its own.
    but = {"execute", "get_client"} if has_get_client(kind) else {"execute"}
    known = _surveys.get(kind)
    if known is None or known[0] is not execute:
        known = _surveys[kind] = (execute, survey_of(kind, execute, is_client_class, but))
    return known[1]


def is_client_class(value: Any) -> bool:
    """Say whether a value is a class whose clients can be shared, or a model that has such."""
    return make_of(value) is not None or is_openai_model(value)


class AdoptedExecute:
    """A model's ``execute``: its own, made anew for each API key with leases in place of clients."""

    def __init__(self, pool: ClientSets, model: Any, found: Survey, observe: Observe | None) -> None:
        self._pool = pool
        self._model = model
        self._found = found
        self._observe = observe
        self._original = model.execute
        self._by_key: dict[str | None, Callable[..., Any]] = {}

    def __call__(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None, *rest: Any, **kwargs: Any
    ) -> Any:
        key = rest[0] if rest else kwargs.get("key")
        return self._for_key(key)(prompt, stream, response, conversation, *rest, **kwargs)

    def _for_key(self, key: str | None) -> Callable[..., Any]:
        execute = self._by_key.get(key)
        if execute is None:
            if len(self._by_key) >= MOST_KEYS or self._pool.closed:
                return self._original  # type: ignore[no-any-return]
            # Methods that are made anew are the model's attributes: one key's are no other key's.
            model = copy.copy(self._model) if self._by_key else self._model
            context = StandIns(self._pool, model, key, self._observe)
            execute = self._by_key[key] = rebind(self._found, model, context.stand_in)
        return execute


class StandIns:
    """What stands for the client classes in the code of one model, for one key."""

    def __init__(self, pool: ClientSets, model: Any, key: str | None, observe: Observe | None) -> None:
        self.pool = pool
        self.model = model
        self.key = key
        self.observe = observe

    def stand_in(self, value: Any) -> Any:
        """Return what is called in place of a class, or the value itself if it is of no known make."""
        make = make_of(value)
        if make is not None:
            return ClientStandIn(self, value, make)
        if is_openai_model(value):
            return ModelStandIn(self, value)
        return value


class _ClassStandIn:
    """A class as code sees it: its attributes, its instances, only what a call gives is another thing."""

    def __init__(self, context: StandIns, kind: Any) -> None:
        self._context = context
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._kind)

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, self._kind)


class ClientStandIn(_ClassStandIn):
    """Gives leases of clients that are alike, where the class would make a client."""

    def __init__(self, context: StandIns, kind: Any, make: Make) -> None:
        super().__init__(context, kind)
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = self._context
        pool = context.pool
        if pool.closed:
            return self._kind(*args, **kwargs)
        try:
            identity: Hashable = (
                self._kind,
                frozen(args),
                frozen(kwargs),
                environment_of(self._kind),
                context.key,
                getattr(context.model, "key", None),
                context.observe,
            )
            lease = pool.lease(identity, lambda: self._make.build(args, kwargs, context.observe))
            return listening(lease) if self._make.speaks_chat else lease
        except CannotShareError as error:
            keeps_its_own(context.model, f"{self._kind.__name__}: {error}")
        except Exception as error:
            # A missing key, say: making it as the model would raises the same again, for the right reason.
            keeps_its_own(context.model, f"{self._kind.__name__}: {type(error).__name__}")
        return self._kind(*args, **kwargs)


class ModelStandIn(_ClassStandIn):
    """Gives models that lease their clients, where one model asks another one that it makes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._kind(*args, **kwargs)
        adopt(self._context.pool, model, self._context.observe)
        return model


def adopt(pool: ClientSets, model: Any, observe: Observe | None) -> bool:
    """Give a model what it leases its clients with. Returns whether that can be done for it."""
    release(model)
    found = None if "execute" in vars(model) else survey(type(model))
    adopted = False
    if makes_openai_clients(model):
        model.get_client = PooledFactory(pool, model, observe)
        adopted = True
    if found is not None and found.anew:
        model.execute = AdoptedExecute(pool, model, found, observe)
        return True
    if found is not None and found.refused:
        keeps_its_own(model, found.refused)
    return adopted


def release(model: Any) -> None:
    """Take from a model what an earlier pool gave it."""
    held = vars(model)
    for name, kind in (("get_client", PooledFactory), ("execute", AdoptedExecute)):
        if isinstance(held.get(name), kind):
            del held[name]


def may_share_clients(model: Any) -> bool:
    """Say whether the prompts to a model share HTTP clients, as far as its code tells before it is run."""
    if makes_openai_clients(model):
        return True
    found = survey(type(model))
    return found is not None and bool(found.anew)


def load_parts(model: Any) -> None:
    """Load what the first prompt would load where a model's code makes its clients itself; for a thread."""
    kind = type(model)
    found = survey(kind)
    if found is None or kind in _loaded:
        return
    load_imports(found)
    for make in _makes_in(found):
        try:
            make.warm(found.names)
        except Exception as error:
            logger.debug("Not loaded in advance for %s: %s", model.model_id, type(error).__name__)
    _loaded.add(kind)


def shares_clients(model: Any) -> bool:
    """Say whether the prompts to a model share HTTP clients; imports what its code would import."""
    if makes_openai_clients(model):
        return True
    found = survey(type(model))
    if found is None:
        return False
    load_imports(found)
    return bool(_makes_in(found)) or any(
        is_openai_model(value) for reached in found.anew for value in _values(reached)
    )


def _makes_in(found: Survey) -> list[Make]:
    """The makes of all client classes that the functions reach."""
    makes = [make_of(value) for reached in found.anew for value in _values(reached)]
    return list({id(make): make for make in makes if make is not None}.values())


def _values(reached: Reached) -> Iterator[Any]:
    namespace = reached.function.__globals__
    holders = [namespace.get(name) for name in reached.makers]
    holders += [sys.modules.get(name) for name in reached.imports]
    for holder in holders:
        yield holder
        if isinstance(holder, ModuleType):
            yield from (getattr(holder, name, None) for name in reached.names)


def keeps_its_own(model: Any, why: str) -> None:
    """Tell, once for each model and reason, that a model's clients are not shared."""
    told = (str(model.model_id), why)
    if told not in _told:
        _told.add(told)
        logger.debug("The model %s makes a client for each prompt: %s", *told)

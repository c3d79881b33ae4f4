"""The installed llm models: one snapshot, looked up by id or alias.

llm builds its list anew for every lookup: it runs every model plugin and reads two files. Here the
list is built once and used until one of these changes, all of them checked at each lookup
(a few microseconds together): the model plugins that are registered with llm, the modification
time and size of llm's ``aliases.json`` and ``extra-openai-models.yaml``, or the snapshot's age.

A snapshot never changes. Its model objects stay inside: `Snapshot.get` gives a shallow copy, so
that no two callers share a model on which one of them sets a key or a client.
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import time
from typing import TYPE_CHECKING, Any

import llm
from llm.plugins import load_plugins, pm

from ..errors import ModelNotFoundError
from . import llm_files

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger("datasette_llm")

# A model plugin may list what its provider offers today.
MAX_AGE_SECONDS = 60.0

AnyAsyncModel = llm.AsyncModel | llm.AsyncKeyModel


class Snapshot:
    """The models that were installed at one moment.

    Attributes:
        ids: the ids of all async models, in the order in which llm lists them.
        for_hooks: a copy of each model, by id, for plugins to look at.
        key_names: what llm calls the keys that the models need (``openai``).
    """

    def __init__(self, registered: Iterable[Any]) -> None:
        self._models: dict[str, AnyAsyncModel] = {}
        self._ids: dict[str, str] = {}  # by id and by alias
        self._sync_only: set[str] = set()
        for entry in registered:
            names = [*entry.aliases, entry.model.model_id]
            if entry.async_model is None:
                self._sync_only.update(names)
                continue
            model = entry.async_model
            # As in llm: of two models with the same name or alias the later one holds it.
            self._models[model.model_id] = model
            self._ids.update(dict.fromkeys([*names, model.model_id], model.model_id))
        self.ids = tuple(self._models)
        self.for_hooks = {model_id: copy.copy(model) for model_id, model in self._models.items()}
        self.key_names = tuple(dict.fromkeys(m.needs_key for m in self._models.values() if m.needs_key))

    def resolve(self, name: str) -> str | None:
        """Return the id of the model that has this id or alias."""
        return self._ids.get(name)

    def get(self, name: str) -> AnyAsyncModel:
        """Return the caller's own copy of a model, by id or alias.

        Raises:
            ModelNotFoundError: naming the nearest known ids.
        """
        model_id = self._ids.get(name)
        if model_id is None:
            raise self.not_found(name)
        return _copy(self._models[model_id])

    def not_found(self, name: str) -> ModelNotFoundError:
        """Return the error that says what is wrong with a name."""
        return ModelNotFoundError(f"Unknown model: {name!r}{self.hint(name)}")

    def hint(self, name: str) -> str:
        """Return the end of a sentence about an unknown model."""
        if name in self._sync_only:
            return " is installed without an async version, which prompts in Datasette need"
        near = difflib.get_close_matches(name, self._ids, n=3)
        if near:
            return f"; did you mean {' or '.join(near)}?"
        if not self.ids:
            return "; no async llm models are installed"
        return "; `llm models` lists what is installed"


def _copy(model: AnyAsyncModel) -> AnyAsyncModel:
    """Return ``copy.copy(model)``, in a quarter of the time for a class without wishes of its own."""
    kind = type(model)
    if not _is_plain(kind):
        return copy.copy(model)
    twin = object.__new__(kind)
    twin.__dict__.update(model.__dict__)
    return twin


@functools.cache
def _is_plain(kind: type) -> bool:
    hooks = ("__copy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__")
    usual = all(getattr(kind, hook, None) is getattr(object, hook, None) for hook in hooks)
    return usual and not any(base.__dict__.get("__slots__") for base in kind.__mro__)


_current: tuple[Any, float, Snapshot] | None = None


def get_snapshot() -> Snapshot:
    """Return the models installed now."""
    global _current
    load_plugins()
    # HookImpl objects are made by each registration, so this sees a plugin that was taken out
    # and put back with other models, too.
    fingerprint = (pm.hook.register_models.get_hookimpls(), llm_files.check().models)
    known = _current
    if known is not None and known[0] == fingerprint and time.monotonic() - known[1] < MAX_AGE_SECONDS:
        return known[2]
    try:
        snapshot = Snapshot(llm.get_models_with_aliases())
    except Exception as error:
        # A file being edited, or one broken model plugin, must not stop a server that was running.
        if known is None or known[0][0] != fingerprint[0]:
            raise
        logger.warning("Keeping the models known so far: listing them failed with %r", error)
        snapshot = known[2]
    _current = (fingerprint, time.monotonic(), snapshot)
    return snapshot

"""Which API key a model is called with.

In this order, the first that has a value:

1. the secrets that the configuration names for this model: its purpose's, then the default model's
2. a key that the model object itself carries
3. the secret ``<PROVIDER>_API_KEY``, the provider as llm names it, in capital letters; or with ``_`` for
   each character of it that an environment variable can't have
4. the provider's key in llm's ``keys.json``
5. the provider's environment variable, as llm reads it

A secret is a ``DATASETTE_SECRETS_<NAME>`` environment variable or an encrypted row of the database
that datasette-secrets uses. One that can't be read (no such database, another encryption key) is
logged, by its name, and counts as absent.
"""

from __future__ import annotations

import json
import logging
import os
import re
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import llm
from datasette.utils import StartupError

from ..backends import datasette_side
from ..secrecy import keep_secret
from . import llm_files
from .catalog import get_snapshot
from .settings import get_settings, plugin_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasette.app import Datasette

logger = logging.getLogger("datasette_llm")


# The other spelling of a secret that is looked up now: datasette-secrets reads none that is not registered.
_looked_up: ContextVar[str | None] = ContextVar("datasette_llm_looked_up", default=None)


def provider_secret(needs_key: str) -> str:
    """Return the name of the secret for what llm calls a key: ``openai`` is ``OPENAI_API_KEY``.

    It is the one that is registered, so it is what people see and fill in at ``/-/secrets``.
    """
    return needs_key.upper() + "_API_KEY"


def provider_secrets(needs_key: str) -> tuple[str, ...]:
    """Return each name that the secret may have, the registered one first: ``my-own`` has two.

    ``MY-OWN_API_KEY`` is its name; ``MY_OWN_API_KEY`` is what a shell can export.
    """
    name = provider_secret(needs_key)
    return tuple(dict.fromkeys([name, re.sub(r"[^A-Z0-9]", "_", name)]))


def secret_names(datasette: Datasette) -> dict[str, str]:
    """Return the name of every secret that may hold a key, with a description for people."""
    try:
        references = [reference for _, reference in get_settings(datasette).references()]
    except StartupError:
        references = []  # Startup says so; other plugins' secrets keep working.
    names: dict[str, list[str]] = {}
    for reference in references:
        if reference.key:
            models = names.setdefault(reference.key, [])
            models += [] if reference.model in models else [reference.model]
    descriptions = {name: f"API key for {', '.join(models)}" for name, models in names.items()}
    for needs_key in get_snapshot().key_names:
        descriptions.setdefault(provider_secret(needs_key), f"API key for the {needs_key} models")
    looked_up = _looked_up.get()
    if looked_up is not None:
        descriptions.setdefault(looked_up, "")
    return descriptions


class FoundKey(NamedTuple):
    """A key, and where it comes from in words that name it without telling it: both, or neither.

    Attributes:
        key: the key; it is not to be shown.
        source: ``secret OPENAI_API_KEY``, ``llm keys.json``, ``environment variable OPENAI_API_KEY``, ...
    """

    key: str | None
    source: str | None

    def __repr__(self) -> str:
        return f"<FoundKey {self.source}>"


_NO_KEY = FoundKey(None, None)


class KeyRing:
    """Finds keys for one call of the facade; asks for each secret only once.

    Args:
        datasette: whose secrets to use.
        actor: noted by datasette-secrets as the last user of a secret.
    """

    __slots__ = ("_actor_id", "_datasette", "_found")

    def __init__(self, datasette: Datasette, actor: dict[str, Any] | None) -> None:
        self._datasette = datasette
        self._actor_id = actor.get("id") if actor else None
        self._found: dict[str, str | None] = {}

    async def key_for(self, model: Any, configured: Iterable[str] = ()) -> str | None:
        """Return the key to call ``model`` with, or ``None``.

        Args:
            model: an llm model object.
            configured: names of the secrets that the configuration gives this model, best first.
        """
        return (await self.find(model, configured)).key

    async def find(self, model: Any, configured: Iterable[str] = ()) -> FoundKey:
        """Return the key to call ``model`` with, and where it comes from; see `key_for`."""
        found = await self._find(model, configured)
        keep_secret(found.key)
        return found

    async def _find(self, model: Any, configured: Iterable[str]) -> FoundKey:
        for name in configured:
            if value := await self._secret(name):
                return FoundKey(value, _source_of_secret(name))
        own: str | None = getattr(model, "key", None)
        if own is not None:
            return FoundKey(own, "the model itself")
        needs_key: str | None = getattr(model, "needs_key", None)
        if needs_key is None:
            return _NO_KEY
        for name in provider_secrets(needs_key):
            if value := await self._secret(name):
                return FoundKey(value, _source_of_secret(name))
        return _llm_key(model, needs_key)

    async def can_call(self, model: Any, configured: Iterable[str] = ()) -> bool:
        """Say whether ``model`` needs no key or has one."""
        return getattr(model, "needs_key", None) is None or bool(await self.key_for(model, configured))

    async def _secret(self, name: str) -> str | None:
        # What get_secret() looks at first, for every name that is registered.
        if value := os.environ.get(_variable_of(name)):
            return value
        if name not in self._found:
            self._found[name] = await self._stored_secret(name)
        return self._found[name]

    async def _stored_secret(self, name: str) -> str | None:
        if not _has_stored_secrets(self._datasette):
            return None
        try:
            value: str | None = await datasette_side.call(_read, self._datasette, name, self._actor_id)
        except Exception as error:
            # Only the type: a message could repeat what was to be decrypted.
            logger.warning("The secret %s could not be read: %s", name, type(error).__name__)
            return None
        return value


class KeyNames(KeyRing):
    """Says where keys come from, for whoever looks at that; no stored secret counts as used by it."""

    __slots__ = ("_stored",)

    def __init__(self, datasette: Datasette) -> None:
        super().__init__(datasette, None)
        self._stored: set[str] | None = None

    async def source(self, model: Any, configured: Iterable[str] = ()) -> str | None:
        """Return where the key of ``model`` comes from, in words; ``None`` if there is none."""
        return (await self._find(model, configured)).source

    async def _stored_secret(self, name: str) -> str | None:
        if self._stored is None:
            self._stored = await self._all_stored()
        return "stored" if name in self._stored else None

    async def _all_stored(self) -> set[str]:
        if not _has_stored_secrets(self._datasette):
            return set()
        try:
            return set(await datasette_side.call(_names_of_stored, self._datasette))
        except Exception as error:
            logger.warning("The stored secrets could not be listed: %s", type(error).__name__)
            return set()


async def _names_of_stored(datasette: Datasette) -> list[str]:
    from datasette_secrets import get_database

    found = await get_database(datasette).execute("select distinct name from datasette_secrets")
    return [row[0] for row in found.rows]


def _variable_of(secret: str) -> str:
    return f"DATASETTE_SECRETS_{secret}"


def _source_of_secret(name: str) -> str:
    variable = _variable_of(name)
    return f"environment variable {variable}" if os.environ.get(variable) else f"secret {name}"


async def _read(datasette: Datasette, name: str, actor_id: str | None) -> str | None:
    from datasette_secrets import get_secret

    token = _looked_up.set(name)
    try:
        value: str | None = await get_secret(datasette, name, actor_id=actor_id)
        return value
    finally:
        _looked_up.reset(token)


def _has_stored_secrets(datasette: Datasette) -> bool:
    return bool((plugin_config(datasette, "datasette-secrets") or {}).get("encryption-key"))


def know_key(model: Any, key: str) -> None:
    """Tell a model's copy what its key is: llm reads ``keys.json`` for each prompt otherwise.

    Args:
        model: a model object that nobody else holds; it gets an instance attribute.
        key: as it was found for it.
    """
    if getattr(type(model), "get_key", None) is llm.AsyncModel.get_key and model.needs_key is not None:
        model.get_key = _KnownKey(model, key)


class _KnownKey:
    """A model's ``get_key``: its own, but for the key that is known."""

    __slots__ = ("_key", "_model")

    def __init__(self, model: Any, key: str) -> None:
        self._model = model
        self._key = key

    def __call__(self, explicit_key: str | None = None) -> str | None:
        model = self._model
        if explicit_key == self._key and model.key is None:
            return explicit_key
        return type(model).get_key(model, explicit_key)  # type: ignore[no-any-return]


_stored_keys: tuple[Any, dict[str, str]] | None = None


def _llm_key(model: Any, needs_key: str) -> FoundKey:
    """Return what llm itself would use, without reading ``keys.json`` again while it is the same."""
    global _stored_keys
    if type(model).get_key is not llm.AsyncModel.get_key:
        # A model plugin with its own idea of where keys come from.
        try:
            key = model.get_key() or None
        except llm.NeedsKeyException:
            return _NO_KEY
        return FoundKey(key, f"the plugin of {model.model_id}") if key else _NO_KEY
    files = llm_files.latest()
    if _stored_keys is None or _stored_keys[0] != files.keys:
        _stored_keys = (files.keys, _load_keys(files.keys_path))
    if needs_key in _stored_keys[1]:
        key = _stored_keys[1][needs_key] or None
        return FoundKey(key, "llm keys.json") if key else _NO_KEY
    variable = getattr(model, "key_env_var", None)
    key = (os.environ.get(variable) or None) if variable else None
    return FoundKey(key, f"environment variable {variable}") if key else _NO_KEY


def _load_keys(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("llm's keys.json could not be read: %s", type(error).__name__)
        return {}
    return stored if isinstance(stored, dict) else {}

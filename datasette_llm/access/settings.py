"""The plugin's configuration: parsed once, checked completely, and never a guess.

`parse_settings` either returns `PluginSettings` or raises Datasette's StartupError with one line
per mistake: the dotted path, the problem and, for a typo, the nearest key. Values are never shown,
because any of them may be a secret. Whatever is ``null`` or absent has its default.

`get_settings` is what everybody calls: Datasette builds a new dict at every ``plugin_config()``
(and resolves ``$env`` in it), so what was parsed is kept, per Datasette, beside an equal dict.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from datasette.utils import StartupError
from pydantic import ValidationError

from .mistakes import describe
from .sections import PLUGIN_NAME, PluginSettings

if TYPE_CHECKING:
    from datasette.app import Datasette


def parse_settings(config: Any) -> PluginSettings:
    """Check a plugin configuration.

    Raises:
        StartupError: naming every mistake with its path, and no value.
    """
    if config is None:
        return PluginSettings()
    try:
        return PluginSettings.model_validate(config)
    except ValidationError as error:
        # Not chained: pydantic's own message repeats the values, which may be secrets.
        lines = [describe(dict(details)) for details in error.errors(include_url=False)]
    raise StartupError("\n".join(lines))


_parsed: WeakKeyDictionary[Datasette, tuple[Any, Any, PluginSettings]] = WeakKeyDictionary()


def get_settings(datasette: Datasette) -> PluginSettings:
    """Return the configuration of a Datasette, whether or not its startup ran.

    The same object as long as the configuration is equal.

    Raises:
        StartupError: see `parse_settings`.
    """
    known = _parsed.get(datasette)
    written = _written(datasette, PLUGIN_NAME)
    if known is not None and known[0] == written:
        return known[2]
    config = datasette.plugin_config(PLUGIN_NAME)
    if known is not None and known[1] == config:
        return known[2]
    settings = parse_settings(config)
    # What is written with $env or $file means something else once those change, so it equals nothing.
    _parsed[datasette] = (copy.deepcopy(written) if written == config else object(), config, settings)
    return settings


def plugin_config(datasette: Datasette, name: str) -> Any:
    """Return a plugin's configuration; at once if there is none, which is the usual case."""
    return datasette.plugin_config(name) if _written(datasette, name) is not None else None


def _written(datasette: Datasette, name: str) -> Any:
    """Return a plugin's configuration as it was written, which takes a tenth of the time.

    An object that is only like a Datasette may not have it; what is returned then equals nothing.
    """
    try:
        return ((datasette.config or {}).get("plugins") or {}).get(name)
    except AttributeError:
        return object()

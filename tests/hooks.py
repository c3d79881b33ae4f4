"""Plugins made of plain functions, and Datasettes that have a configuration."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from datasette.app import Datasette
from datasette.plugins import pm
from pluggy import HookimplMarker

from .fakes import known_to_llm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import llm

hookimpl = HookimplMarker("datasette")


@contextmanager
def hooked(**functions: Callable[..., Any]) -> Iterator[None]:
    """Have Datasette call these functions as hook implementations of one plugin."""
    plugin = type("Hooked", (), {"__name__": "hooked"})()
    for name, function in functions.items():
        setattr(plugin, name, hookimpl(function))
    pm.register(plugin, name=f"hooked-{id(plugin)}")
    try:
        yield
    finally:
        pm.unregister(plugin)


def datasette_with(settings: Any = None, secrets: Any = None) -> Datasette:
    """Return a Datasette, not started, with these plugin configurations."""
    plugins = {"datasette-llm": settings, "datasette-secrets": secrets}
    return Datasette(
        config={"plugins": {name: value for name, value in plugins.items() if value is not None}}
    )


def llm_models(*models: llm.AsyncModel | llm.AsyncKeyModel) -> AbstractContextManager[None]:
    """Have llm know these async models, beside those of `fakes.registered`."""
    return known_to_llm(*((model, model) for model in models))

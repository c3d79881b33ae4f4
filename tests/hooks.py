"""Plugins made of plain functions, and Datasettes that have a configuration."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import llm
from datasette.app import Datasette
from datasette.plugins import pm
from llm.plugins import pm as llm_pm
from pluggy import HookimplMarker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


@contextmanager
def llm_models(*models: llm.AsyncModel | llm.AsyncKeyModel) -> Iterator[None]:
    """Have llm know these async models, beside those of `fakes.registered`."""

    class Plugin:
        @llm.hookimpl
        def register_models(self, register: Callable[..., None]) -> None:
            for model in models:
                register(model, model)

    plugin = Plugin()
    llm_pm.register(plugin)
    try:
        yield
    finally:
        llm_pm.unregister(plugin)

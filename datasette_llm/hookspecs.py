"""The hooks that other plugins implement to watch, limit and steer prompts.

An implementation may take any subset of the named arguments.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pluggy import HookspecMarker, PluginManager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    import llm
    from datasette.app import Datasette


hookspec = HookspecMarker("datasette")


@dataclass(frozen=True)
class Purpose:
    """Something that a plugin runs prompts for.

    Attributes:
        name: what is passed as ``purpose=`` and written in the configuration.
        description: one sentence for people.
    """

    name: str
    description: str = ""


@hookspec
def llm_prompt_context(
    datasette: Datasette,
    model_id: str,
    prompt: str | None,
    purpose: str | None,
    actor: dict[str, Any] | None,
) -> Callable[[Any], AbstractAsyncContextManager[None]] | None:
    """Return a wrapper to run around a prompt: a function that takes a ``PromptResult`` and
    returns an async context manager, or ``None``.

    What raises before the ``yield`` stops the prompt; an error of the model is raised at the ``yield``.
    """


@hookspec
def llm_group_exit(datasette: Datasette, group: Any) -> Awaitable[None] | None:
    """A group has ended and all of its prompts are finished; may return something to await."""


@hookspec
def register_llm_purposes(datasette: Datasette) -> list[Purpose] | None:
    """Return the purposes for which this plugin runs prompts."""


@hookspec
def llm_filter_models(
    datasette: Datasette,
    models: Sequence[llm.AsyncModel],
    actor: dict[str, Any] | None,
    purpose: str | None,
) -> Sequence[llm.AsyncModel] | Awaitable[Sequence[llm.AsyncModel] | None] | None:
    """Return those of ``models`` that this actor may use for this purpose, or ``None`` for no opinion.

    What any one plugin leaves out is unavailable, whatever the others answer. May be ``async``.
    """


@hookspec
def llm_default_model(
    datasette: Datasette, purpose: str | None, actor: dict[str, Any] | None
) -> str | Awaitable[str | None] | None:
    """Return the id of the model to use when none was asked for, or ``None`` for no opinion.

    The first answer wins, and comes before the configuration. May be ``async``.
    """


_manager: PluginManager | None = None


def plugin_manager() -> PluginManager:
    """Return Datasette's plugin manager, which knows these hooks from then on.

    Datasette loads all plugins when its ``plugins`` module is first imported, and those import
    names from this package: so that import happens here, at the first call, and never while this
    package is itself half imported.
    """
    global _manager
    if _manager is None:
        from datasette.plugins import pm

        # Importing it may have loaded our own plugin, which called this function.
        hook = getattr(pm.hook, "llm_filter_models", None)
        if hook is None or not hook.has_spec():
            pm.add_hookspecs(sys.modules[__name__])
        _manager = pm
    return _manager

"""Run language models over data in Datasette.

Rooms, from the top down, each importing only from those below it: ``plugin`` and ``cli``, Datasette's side;
``pages``, everything with HTML; ``enrich``, the main job; ``facade`` and ``models``, what plugins call;
``access``, who may use which model; ``tasks``, prompts and who owns them; ``calls``, one model call;
``responses``, what a caller reads; ``pace``, when a call may go; ``backends``, asyncio and trio. What is not
listed in ``__all__`` is internal.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access.purposes import get_purposes
    from .enrich import enrich
    from .errors import GroupClosed, ModelNotFoundError, PromptCancelled
    from .facade import LLM
    from .hookspecs import Purpose
    from .models import GroupModel, WrappedAsyncModel, WrappedConversation
    from .responses.response import PromptResponse
    from .tasks.group import Group
    from .tasks.hook_scope import PromptResult

__all__ = [
    "LLM",
    "Group",
    "GroupClosed",
    "GroupModel",
    "ModelNotFoundError",
    "PromptCancelled",
    "PromptResponse",
    "PromptResult",
    "Purpose",
    "WrappedAsyncModel",
    "WrappedConversation",
    "enrich",
    "get_purposes",
]

# Every `datasette` command imports this package, and few of them run a prompt: a name is imported from
# its home when it is first asked for.
_HOMES = {
    "LLM": "facade",
    "Group": "tasks.group",
    "GroupClosed": "errors",
    "GroupModel": "models",
    "ModelNotFoundError": "errors",
    "PromptCancelled": "errors",
    "PromptResponse": "responses.response",
    "PromptResult": "tasks.hook_scope",
    "Purpose": "hookspecs",
    "WrappedAsyncModel": "models",
    "WrappedConversation": "models",
    "enrich": "enrich",
    "get_purposes": "access.purposes",
}

if not TYPE_CHECKING:  # Checkers would believe that it has every name.

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``enrich`` the function that it is for users: importing the room of that name would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(
            name, value.enrich if name == "enrich" and isinstance(value, ModuleType) else value
        )


sys.modules[__name__].__class__ = _Package

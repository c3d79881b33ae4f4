"""Run language models over data in Datasette.

Layers, each importing only from those above it: ``runtime`` (prompts as supervised tasks), ``settings``,
``catalog`` and ``access`` (which model, for whom), ``models`` and ``facade`` (what plugins call), and the
glue: ``hookspecs``, ``enrich``, ``plugin`` and ``cli``. What is not listed in ``__all__`` is internal.
"""

from __future__ import annotations

from .enrich import enrich
from .errors import GroupClosed, ModelNotFoundError, PromptCancelled
from .facade import LLM
from .models import GroupModel, WrappedAsyncModel, WrappedConversation
from .purposes import Purpose, get_purposes
from .runtime.group import Group
from .runtime.hook_scope import PromptResult
from .runtime.response import PromptResponse

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

"""Run language models over data in Datasette.

Rooms, from the top down, each importing only from those below it: ``plugin`` and ``cli``, Datasette's side;
``pages``, everything with HTML; ``enrich``, the main job; ``facade`` and ``models``, what plugins call;
``access``, who may use which model; ``tasks``, prompts and who owns them; ``calls``, one model call;
``responses``, what a caller reads; ``pace``, when a call may go; ``backends``, asyncio and trio. What is not
listed in ``__all__`` is internal.
"""

from __future__ import annotations

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

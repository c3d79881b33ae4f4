"""Why a model stopped, in one vocabulary for all providers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import llm

FinishReason = Literal["stop", "length", "content_filter", "refusal", "tool_calls", "error", "unknown"]


def finish_reason(response: llm.AsyncResponse) -> FinishReason:
    """Return why the model of a complete response stopped; ``unknown`` where nothing tells."""
    return "unknown"

"""Why a model stopped, in one vocabulary for all providers.

llm keeps a provider's answer in ``response_json``, each plugin in its own way. An adapter for each family
knows where that family says why its model stopped, and tells by the shape of what is kept whether it is one
of its own: no plugin is imported. What llm drops was noted on the response as it passed (``note()``).

Nothing is computed until somebody asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import PromptCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import llm

FinishReason = Literal["stop", "length", "content_filter", "refusal", "tool_calls", "error", "unknown"]

#: What each family calls the reasons, in lower case. A word that is not here is ``unknown``.
WORDS: dict[str, dict[str, FinishReason]] = {
    # OpenAI's chat completions and those who imitate them: Groq, OpenRouter, litellm, vLLM, llama.cpp, ...
    "chat": {
        "stop": "stop",
        "eos": "stop",
        "eos_token": "stop",
        "end_turn": "stop",
        "stop_sequence": "stop",
        "length": "length",
        "max_tokens": "length",
        "model_length": "length",
        "content_filter": "content_filter",
        "safety": "content_filter",
        "recitation": "content_filter",
        "refusal": "refusal",
        "tool_calls": "tool_calls",
        "tool_use": "tool_calls",
        "function_call": "tool_calls",
        "error": "error",
        "insufficient_system_resource": "error",  # DeepSeek
    },
    "responses": {
        "completed": "stop",
        "max_output_tokens": "length",
        "content_filter": "content_filter",
        "incomplete": "length",
        "failed": "error",
        "cancelled": "error",
    },
    "anthropic": {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "model_context_window_exceeded": "length",
        # A long turn with the provider's own tools was interrupted: what there is is a part of it.
        "pause_turn": "length",
        "compaction": "length",
        "refusal": "refusal",
        "tool_use": "tool_calls",
    },
    "gemini": {
        "stop": "stop",
        "max_tokens": "length",
        "safety": "content_filter",
        "recitation": "content_filter",
        "language": "content_filter",
        "blocklist": "content_filter",
        "prohibited_content": "content_filter",
        "spii": "content_filter",
        "image_safety": "content_filter",
        "image_prohibited_content": "content_filter",
        "image_recitation": "content_filter",
        "model_armor": "content_filter",
        "malformed_function_call": "error",
        "malformed_response": "error",
        "unexpected_tool_call": "error",
        "too_many_tool_calls": "error",
        "missing_thought_signature": "error",
        "no_image": "error",
        "image_other": "error",
        "other": "error",
    },
    "mistral": {
        "stop": "stop",
        "length": "length",
        "model_length": "length",
        "content_filter": "content_filter",
        "tool_calls": "tool_calls",
        "error": "error",
    },
    "ollama": {
        "stop": "stop",
        "length": "length",
        # Not answers: a model was loaded into memory, or out of it.
        "load": "error",
        "unload": "error",
    },
}


class Said(NamedTuple):
    """What a provider said of the end of its answer.

    Attributes:
        family: whose words it uses, a key of ``WORDS``.
        reason: its word, ``None`` where it should have said one and did not.
        refusal: what its model said for refusing, if it did.
        blocked: whether the prompt was refused before any model saw it.
    """

    family: str
    reason: str | None
    refusal: str | None = None
    blocked: bool = False


def finish_reason(response: llm.AsyncResponse) -> FinishReason:
    """Return why the model of a complete response stopped; ``unknown`` where nothing tells."""
    found = said(response)
    if found is None:
        return "unknown"
    if found.blocked:
        return "content_filter"
    reason = WORDS[found.family].get(str(found.reason).lower(), "unknown")
    if reason in ("stop", "unknown"):
        if found.refusal is not None:
            return "refusal"
        if response._tool_calls:
            # Gemini and Ollama say "stop" for a turn that ends in tool calls, some imitators of OpenAI too.
            return "tool_calls"
    return reason


def refusal_words(response: llm.AsyncResponse) -> str | None:
    """Return what a model that refused said for it, where its provider has a place for that."""
    found = said(response)
    return None if found is None else found.refusal


def said(response: llm.AsyncResponse) -> Said | None:
    """Return what the provider said of the end of its answer; ``None`` for a family that is not known."""
    noted: Said | None = getattr(response, _NOTED, None)
    kept: Any = response.response_json
    # llm-gemini before 0.15 keeps all events of an answer: the last one has the reason.
    for part in reversed(kept) if isinstance(kept, list) else (kept,):
        for adapter in _ADAPTERS if isinstance(part, dict) else ():
            found = adapter(part)
            if found is not None:
                return found if noted is None else _completed(found, noted)
    return noted


def note(
    response: llm.AsyncResponse, family: str, reason: str | None = None, refusal: str | None = None
) -> None:
    """Keep with a response what its plugin drops, as it passes; what was noted before is completed."""
    new, old = Said(family, reason, refusal), getattr(response, _NOTED, None)
    setattr(response, _NOTED, new if old is None else _completed(new, old))


def noted(response: llm.AsyncResponse) -> Said | None:
    """Return what was noted of the end of an answer as it passed."""
    found: Said | None = getattr(response, _NOTED, None)
    return found


def was_noted(response: llm.AsyncResponse) -> bool:
    """Say whether the end of an answer was noted as it passed."""
    return hasattr(response, _NOTED)


_NOTED = "_datasette_llm_said"


def _completed(found: Said, by: Said) -> Said:
    reason = by.reason if found.reason is None else found.reason
    refusal = by.refusal if found.refusal is None else found.refusal
    return found._replace(reason=reason, refusal=refusal)


# An adapter for each family: what it said, or None if this is not one of its answers.


def _openai_chat(kept: Mapping[str, Any]) -> Said | None:
    """An unstreamed completion as OpenAI sends it, or what llm makes of the chunks of a streamed one."""
    choices = kept.get("choices")
    if isinstance(choices, list):
        if str(kept.get("object", "")).endswith(".chunk"):
            return None
        choice = choices[0] if choices and isinstance(choices[0], dict) else {}
        message = choice.get("message")
        refusal = message.get("refusal") if isinstance(message, dict) else None
        return Said("chat", choice.get("finish_reason"), refusal or None)
    # llm drops keys whose value is None: a stream that never gave a reason has none of these.
    if "finish_reason" in kept or (
        "content" in kept and str(kept.get("object", "")).startswith(_CHAT_OBJECTS)
    ):
        return Said("chat", kept.get("finish_reason"), kept.get("refusal"))
    return None


_CHAT_OBJECTS = ("chat.completion", "text_completion")


def _openai_responses(kept: Mapping[str, Any]) -> Said | None:
    status = kept.get("status")
    if kept.get("object") != "response" and not ("output" in kept or status in WORDS["responses"]):
        return None
    details = kept.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else None
    refusals = [
        part.get("refusal")
        for item in kept.get("output") or []
        if isinstance(item, dict) and item.get("type") == "message"
        for part in item.get("content") or []
        if isinstance(part, dict) and part.get("type") == "refusal"
    ]
    return Said("responses", reason or status, refusals[0] if refusals else None)


def _anthropic(kept: Mapping[str, Any]) -> Said | None:
    if kept.get("type") != "message" or not ("stop_reason" in kept or "content" in kept):
        return None
    details = kept.get("stop_details")
    explanation = details.get("explanation") if isinstance(details, dict) else None
    return Said("anthropic", kept.get("stop_reason"), explanation)


def _gemini(kept: Mapping[str, Any]) -> Said | None:
    feedback = kept.get("promptFeedback")
    blocked = feedback.get("blockReason") if isinstance(feedback, dict) else None
    if blocked:
        return Said("gemini", blocked, blocked=True)
    candidates = kept.get("candidates")
    if not isinstance(candidates, list):
        return None
    candidate = candidates[0] if candidates and isinstance(candidates[0], dict) else {}
    return Said("gemini", candidate.get("finishReason"))


def _mistral_stream(kept: Mapping[str, Any]) -> Said | None:
    chunks = kept.get("chunks")
    if not isinstance(chunks, list):
        return None
    for chunk in reversed(chunks):
        for choice in chunk.get("choices") or []:
            if choice.get("finish_reason"):
                return Said("mistral", choice["finish_reason"])
    return Said("mistral", None)


def _ollama(kept: Mapping[str, Any]) -> Said | None:
    if "done" not in kept or "choices" in kept:
        return None
    # Before 0.1.36 Ollama said that it was done, and not why.
    return Said("ollama", kept.get("done_reason") or ("unknown" if kept.get("done") else None))


_ADAPTERS: tuple[Callable[[Mapping[str, Any]], Said | None], ...] = (
    _openai_responses,
    _anthropic,
    _gemini,
    _mistral_stream,
    _ollama,
    _openai_chat,
)


def ended_because(observed: llm.AsyncResponse, error: Exception | None) -> FinishReason | None:
    """Why the model of a response stopped that ends with this error or without one."""
    if isinstance(error, PromptCancelled):
        return None
    reason = finish_reason(observed)
    return "error" if error is not None and reason == "unknown" else reason

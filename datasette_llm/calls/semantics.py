"""What OpenTelemetry's conventions for generative AI call things: who was asked for what, and what came back.

Spans (`tracing`) and metrics (`metrics`) describe a model call in the same words. They are those of
https://github.com/open-telemetry/semantic-conventions-genai; what begins with ``datasette_llm.`` is our own.
Nothing of what was said is among them: no prompt, no answer, no error message, which may quote a key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .prices import usage_of

if TYPE_CHECKING:
    import llm

    from .choice import Choice

Attributes = dict[str, str | bool | int | float | list[str]]

#: Where llm's plugins call a provider's key by another name than the conventions call the provider.
_PROVIDERS = {
    "claude": "anthropic",
    "gemini": "gcp.gemini",
    "grok": "x_ai",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "vertex": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}
#: Where plugins keep the name that the provider knows a model by.
_NAMES = ("model_name", "claude_model_id", "gemini_model_id", "model_id")
#: Options that the conventions have a name for, and the kind of their values. Stop sequences are words of
#: somebody's, so they are not among them.
_OPTIONS: dict[str, tuple[str, type]] = {
    "frequency_penalty": ("frequency_penalty", float),
    "max_output_tokens": ("max_tokens", int),
    "max_tokens": ("max_tokens", int),
    "num_predict": ("max_tokens", int),
    "presence_penalty": ("presence_penalty", float),
    "seed": ("seed", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", float),
    "top_p": ("top_p", float),
}


def provider_of(model: Any) -> str:
    """Return the name of the provider of one of llm's models; of one without a key, its plugin's."""
    needs_key = getattr(model, "needs_key", None)
    if isinstance(needs_key, str) and needs_key:
        return _PROVIDERS.get(needs_key, needs_key)
    root = type(model).__module__.partition(".")[0]
    return root.removeprefix("llm_") or root


def name_of(model: Any) -> str:
    """Return the name that the provider knows a model by."""
    names = (getattr(model, name, None) for name in _NAMES)
    return next((name for name in names if isinstance(name, str) and name), str(model.model_id))


def of_request(choice: Choice, operation: str = "chat") -> Attributes:
    """Return who is asked, and for whom."""
    model = choice.model
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": provider_of(model),
        "gen_ai.request.model": name_of(model),
    }
    if choice.purpose:
        attributes["datasette_llm.purpose"] = choice.purpose
    if choice.batch:
        attributes["datasette_llm.batch"] = True
    address = getattr(model, "api_base", None)
    if isinstance(address, str):
        attributes |= _server(address)
    return attributes


def _server(address: str) -> Attributes:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    if not host:
        return {}
    return {"server.address": host, "server.port": port or (80 if parts.scheme == "http" else 443)}


def of_settings(observed: llm.AsyncResponse) -> Attributes:
    """Return how it is asked: streamed or not, for what form, with which options."""
    prompt = observed.prompt
    attributes: Attributes = {}
    if observed.stream:
        attributes["gen_ai.request.stream"] = True
    if prompt.schema is not None:
        attributes["gen_ai.output.type"] = "json"
    if observed.conversation is not None:
        attributes["gen_ai.conversation.id"] = str(observed.conversation.id)
    for option, (name, kind) in _OPTIONS.items():
        value = getattr(prompt.options, option, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            attributes[f"gen_ai.request.{name}"] = kind(value)
    return attributes


def response_model(observed: llm.AsyncResponse) -> str | None:
    """Return the name of the model that answered, if the provider says so."""
    told = getattr(observed, "resolved_model", None) or _told(observed, "model", "modelVersion")
    return told if isinstance(told, str) and told else None


def of_answer(observed: llm.AsyncResponse) -> Attributes:
    """Return what came back: from which model, under which id, for how many tokens as they are billed."""
    attributes: Attributes = {}
    if model := response_model(observed):
        attributes["gen_ai.response.model"] = model
    answer_id = _told(observed, "id", "responseId")
    if isinstance(answer_id, str) and answer_id:
        attributes["gen_ai.response.id"] = answer_id
    details = observed.token_details if isinstance(observed.token_details, dict) else {}
    usage = usage_of(observed.input_tokens, observed.output_tokens, details)
    if usage is not None:
        attributes["gen_ai.usage.input_tokens"] = usage.input
        attributes["gen_ai.usage.output_tokens"] = usage.output
        if usage.cached:
            attributes["gen_ai.usage.cache_read.input_tokens"] = usage.cached
        if usage.cache_written:
            attributes["gen_ai.usage.cache_creation.input_tokens"] = usage.cache_written
        if reasoning := _reasoning(details):
            attributes["gen_ai.usage.reasoning.output_tokens"] = reasoning
    return attributes


def error_type(error: BaseException) -> str:
    """Return what an error is called: the name of its class."""
    return type(error).__qualname__


def _told(observed: llm.AsyncResponse, *names: str) -> Any:
    told = observed.response_json
    return next((told[name] for name in names if told.get(name)), None) if isinstance(told, dict) else None


def _reasoning(details: dict[str, Any]) -> int:
    for inner in (details.get("completion_tokens_details"), details.get("output_tokens_details"), details):
        if isinstance(inner, dict):
            for name in ("reasoning_tokens", "thoughtsTokenCount"):
                value = inner.get(name)
                if isinstance(value, int) and value > 0:
                    return value
    return 0

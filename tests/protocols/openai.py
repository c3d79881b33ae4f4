"""OpenAI's chat completions, as llm's own plugin speaks them; the base of those who imitate it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .answers import Answer, Protocol, Raw, events, whole

if TYPE_CHECKING:
    from .server import Request


class ChatCompletions(Protocol):
    """``POST /v1/chat/completions``."""

    def render(self, answer: Answer, request: Request) -> Raw:
        if request.json.get("stream"):
            return self.streamed(answer, request)
        body = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": request.json.get("model"),
            "choices": [{"index": 0, "message": self.message(answer), "finish_reason": self.finish(answer)}],
        }
        if answer.usage is not None:
            body["usage"] = usage_of(answer)
        return whole(body, answer)

    def message(self, answer: Answer) -> dict[str, Any]:
        """The message of the one choice."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.refusal is not None:
            message |= {"content": None, "refusal": answer.refusal}
        if answer.reasoning is not None:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message |= {"content": None, "tool_calls": calls_of(answer)}
        return message

    def streamed(self, answer: Answer, request: Request) -> Raw:
        deltas: list[dict[str, Any]] = []
        if answer.reasoning is not None:
            deltas.append({"role": "assistant", "reasoning_content": answer.reasoning})
        if answer.refusal is not None:
            half = len(answer.refusal) // 2
            deltas += [{"role": "assistant", "refusal": answer.refusal[:half]}]
            deltas += [{"refusal": answer.refusal[half:]}]
        elif answer.tool_calls:
            calls = [{"index": index, **call} for index, call in enumerate(calls_of(answer))]
            deltas.append({"role": "assistant", "tool_calls": calls})
        elif answer.text is not None:
            deltas += [{"role": "assistant", "content": piece} for piece in answer.cut()]
        chunks = [self.chunk(request, delta, None) for delta in deltas]
        last = self.chunk(request, {}, self.finish(answer))
        chunks.append(last)
        if answer.usage is not None:
            self.add_usage(chunks, answer, request)
        return events(chunks, answer)

    def chunk(self, request: Request, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        """One chunk of a stream."""
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": request.json.get("model"),
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }

    def add_usage(self, chunks: list[dict[str, Any]], answer: Answer, request: Request) -> None:
        """Say the usage at the end of a stream."""
        if (request.json.get("stream_options") or {}).get("include_usage"):
            chunks.append(self.chunk(request, {}, None) | {"choices": [], "usage": usage_of(answer)})

    def model(self, url: str, **options: Any) -> Any:
        from llm.default_plugins.openai_models import AsyncChat

        settings = {"model_name": "m", "key": "sk-test", "supports_tools": True, "supports_schema": True}
        return AsyncChat(options.pop("model_id", "openai-test"), api_base=f"{url}/v1", **(settings | options))


def usage_of(answer: Answer) -> dict[str, int]:
    """The usage in OpenAI's words."""
    sent, received = answer.usage or (0, 0)
    return {"prompt_tokens": sent, "completion_tokens": received, "total_tokens": sent + received}


def calls_of(answer: Answer) -> list[dict[str, Any]]:
    """The tool calls in OpenAI's words."""
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for number, call in enumerate(answer.tool_calls)
    ]


PROTOCOL = ChatCompletions()

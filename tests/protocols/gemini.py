"""Google's generateContent, as llm-gemini speaks it: always streamed, as the items of one JSON array."""

from __future__ import annotations

import json
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest

from .answers import Answer, Protocol, Raw, whole

if TYPE_CHECKING:
    from .server import Request

_ADDRESS = "https://generativelanguage.googleapis.com"


class GenerateContent(Protocol):
    """``POST /v1beta/models/NAME:streamGenerateContent``, and ``:generateContent``."""

    usual = "STOP"

    def prompt(self, request: Request) -> str:
        return "".join(part.get("text", "") for part in request.json["contents"][-1]["parts"])

    def render(self, answer: Answer, request: Request) -> Raw:
        said = self._items(answer)
        if ":streamGenerateContent" not in request.path:
            return whole(said[-1], answer)
        if "alt=sse" in request.path:
            parts = [f"data: {json.dumps(item)}\r\n\r\n".encode() for item in said]
            return Raw(parts, "text/event-stream", 200, answer.headers, answer.delay, answer.gap)
        lead = [b"[", *[b",\r\n"] * (len(said) - 1)]
        parts = [before + json.dumps(item).encode() for before, item in zip(lead, said, strict=True)]
        parts.append(b"]")
        return Raw(parts, "application/json", 200, answer.headers, answer.delay, answer.gap)

    def _items(self, answer: Answer) -> list[dict[str, Any]]:
        common: dict[str, Any] = {"modelVersion": "gemini-test", "responseId": "r1"}
        if answer.usage is not None:
            sent, received = answer.usage
            common["usageMetadata"] = {
                "promptTokenCount": sent,
                "candidatesTokenCount": received,
                "totalTokenCount": sent + received,
            }
        if answer.blocked is not None:
            return [{"promptFeedback": {"blockReason": answer.blocked}, **common}]
        parts: list[list[dict[str, Any]]] = []
        if answer.reasoning is not None:
            parts.append([{"text": answer.reasoning, "thought": True}])
        if answer.tool_calls:
            parts += [
                [{"functionCall": {"name": call.name, "args": call.arguments}}] for call in answer.tool_calls
            ]
        elif answer.text is not None:
            parts += [[{"text": piece}] for piece in answer.cut()]
        items = []
        for number, each in enumerate(parts or [[]]):
            candidate: dict[str, Any] = {"index": 0}
            if each:
                candidate["content"] = {"role": "model", "parts": each}
            if number == max(0, len(parts) - 1) and self.finish(answer) is not None:
                candidate["finishReason"] = self.finish(answer)
            items.append({"candidates": [candidate], **common})
        return items

    def error(self, answer: Answer) -> Any:
        error = {"code": answer.status, "message": answer.message, "status": answer.code}
        # The streaming method answers with an array, errors included.
        return [{"error": error}]

    def model(self, url: str, **options: Any) -> Any:
        plugin = pytest.importorskip("llm_gemini", reason="llm-gemini is not installed")
        key = options.pop("key", "gemini-test-key")
        # The address is in the code of execute(): the same code with another address, in the same module.
        execute = plugin.AsyncGeminiPro.execute
        code = execute.__code__
        constants = tuple(
            constant.replace(_ADDRESS, url) if isinstance(constant, str) else constant
            for constant in code.co_consts
        )
        assert constants != code.co_consts
        local = FunctionType(
            code.replace(co_consts=constants),
            execute.__globals__,
            execute.__name__,
            execute.__defaults__,
            execute.__closure__,
        )
        cls = type("AsyncGeminiPro", (plugin.AsyncGeminiPro,), {"execute": local, "__module__": "llm_gemini"})
        model = cls(options.pop("model_id", "gemini-test"), **options)
        model.key = key
        return model


PROTOCOL = GenerateContent()

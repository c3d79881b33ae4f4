"""Ollama's chat, as llm-ollama speaks it: lines of JSON."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from .answers import Answer, Protocol, Raw, whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .server import Request


class OllamaChat(Protocol):
    """``POST /api/chat``."""

    def render(self, answer: Answer, request: Request) -> Raw:
        common = {"model": request.json.get("model"), "created_at": "2026-01-01T00:00:00Z"}
        end: dict[str, Any] = {"done": True, "total_duration": 1}
        if self.finish(answer) is not None:
            end["done_reason"] = self.finish(answer)
        if answer.usage is not None:
            end["prompt_eval_count"], end["eval_count"] = answer.usage
        message: dict[str, Any] = {"role": "assistant", "content": answer.text or ""}
        if answer.reasoning is not None:
            message["thinking"] = answer.reasoning
        if answer.tool_calls:
            message["content"] = ""
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": call.arguments}} for call in answer.tool_calls
            ]
        if request.json.get("stream") is False:
            return whole(common | end | {"message": message}, answer)
        said = [{"message": message, "done": False}]
        if answer.text and not answer.tool_calls:
            said = [{"message": message | {"content": piece}, "done": False} for piece in answer.cut()]
        said.append(end | {"message": {"role": "assistant", "content": ""}})
        lines = [json.dumps(common | item).encode() + b"\n" for item in said]
        return Raw(lines, "application/x-ndjson", 200, answer.headers, answer.delay, answer.gap)

    def error(self, answer: Answer) -> Any:
        return {"error": answer.message}

    def model(self, url: str, **options: Any) -> Any:
        # It makes a directory among llm's files when it is imported: not before a test has its own.
        chat = pytest.importorskip("llm_ollama.models.chat", reason="llm-ollama is not installed")
        key = options.pop("key", "ollama-test-key")
        name = options.pop("model_id", "ollama-test")
        options.setdefault("capabilities", ["completion", "tools", "thinking"])
        model = chat.AsyncOllamaChatModel(model_id=f"ollama/{name}", ollama_name=name, **options)
        model.key = key
        return model

    @contextmanager
    def pointed_at(self, url: str) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OLLAMA_HOST", url)
            yield


PROTOCOL = OllamaChat()

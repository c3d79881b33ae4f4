"""Anthropic's Messages, as llm-anthropic speaks them: on the wire always streamed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from .answers import Answer, Protocol, Raw, events, whole

if TYPE_CHECKING:
    from .server import Request


class Messages(Protocol):
    """``POST /v1/messages``."""

    usual = "end_turn"

    def render(self, answer: Answer, request: Request) -> Raw:
        sent, received = answer.usage or (0, 0)
        finish = self.finish(answer)
        details = (
            None
            if finish != "refusal"
            else {"type": "refusal", "category": "bio", "explanation": answer.refusal}
        )
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": request.json.get("model"),
            "content": self._content(answer),
            "stop_reason": finish,
            "stop_sequence": None,
            "stop_details": details,
            "usage": {"input_tokens": sent, "output_tokens": received},
        }
        if not request.json.get("stream"):
            return whole(message, answer)
        begun = message | {"content": [], "stop_reason": None, "stop_details": None}
        said: list[dict[str, Any]] = [{"type": "message_start", "message": begun}, {"type": "ping"}]
        for index, block in enumerate(self._content(answer)):
            said += self._block_events(block, index, answer)
        delta: dict[str, Any] = {"stop_reason": finish, "stop_sequence": None}
        if details is not None:
            delta["stop_details"] = details
        said.append({"type": "message_delta", "delta": delta, "usage": {"output_tokens": received}})
        said.append({"type": "message_stop"})
        return events(said, answer, named=True, done=False)

    @staticmethod
    def _content(answer: Answer) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        if answer.reasoning is not None:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": "s"})
        if answer.text is not None and not answer.tool_calls:
            content.append({"type": "text", "text": answer.text})
        return content + [
            {"type": "tool_use", "id": f"toolu_{number}", "name": call.name, "input": call.arguments}
            for number, call in enumerate(answer.tool_calls)
        ]

    @staticmethod
    def _block_events(block: dict[str, Any], index: int, answer: Answer) -> list[dict[str, Any]]:
        if block["type"] == "text":
            empty = block | {"text": ""}
            deltas = [{"type": "text_delta", "text": piece} for piece in answer.cut()]
        elif block["type"] == "thinking":
            empty = block | {"thinking": "", "signature": ""}
            deltas = [{"type": "thinking_delta", "thinking": block["thinking"]}]
        else:
            empty = block | {"input": {}}
            deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        return [
            {"type": "content_block_start", "index": index, "content_block": empty},
            *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
            {"type": "content_block_stop", "index": index},
        ]

    def error(self, answer: Answer) -> Any:
        return {"type": "error", "error": {"type": answer.code, "message": answer.message}}

    def model(self, url: str, **options: Any) -> Any:
        plugin = pytest.importorskip("llm_anthropic", reason="llm-anthropic is not installed")
        key = options.pop("key", "sk-ant-test")
        model = plugin.AsyncClaudeMessages(options.pop("model_id", "claude-test"), base_url=url, **options)
        model.key = key
        return model


PROTOCOL = Messages()

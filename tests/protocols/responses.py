"""OpenAI's Responses, as llm's own plugin speaks them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .answers import Answer, Protocol, Raw, events, whole

if TYPE_CHECKING:
    from .server import Request


class Responses(Protocol):
    """``POST /v1/responses``.

    ``finish`` is ``completed``, or the reason of an incomplete one (``max_output_tokens``,
    ``content_filter``), or another status (``failed``, ``cancelled``).
    """

    usual = "completed"

    def prompt(self, request: Request) -> str:
        content = request.json["input"]
        if not isinstance(content, str):
            content = content[-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    def render(self, answer: Answer, request: Request) -> Raw:
        final = self._response(answer, request)
        if not request.json.get("stream"):
            return whole(final, answer)
        begun = final | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        said: list[dict[str, Any]] = [{"type": "response.created", "response": begun}]
        for index, item in enumerate(final["output"]):
            said += self._item_events(item, index, answer)
        said.append({"type": f"response.{final['status']}", "response": final})
        for number, event in enumerate(said):
            event["sequence_number"] = number
        return events(said, answer, named=True, done=False)

    def _response(self, answer: Answer, request: Request) -> dict[str, Any]:
        finish = self.finish(answer)
        status, details, error = finish, None, None
        if finish in ("max_output_tokens", "content_filter"):
            status, details = "incomplete", {"reason": finish}
        elif finish == "failed":
            error = {"code": answer.code, "message": answer.message}
        sent, received = answer.usage or (0, 0)
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "model": request.json.get("model"),
            "status": status,
            "error": error,
            "incomplete_details": details,
            "instructions": None,
            "metadata": {},
            "output": self._output(answer, status),
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "usage": None
            if answer.usage is None
            else {
                "input_tokens": sent,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": received,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": sent + received,
            },
        }

    @staticmethod
    def _output(answer: Answer, status: str | None) -> list[dict[str, Any]]:
        if answer.tool_calls:
            return [
                {
                    "type": "function_call",
                    "id": f"fc_{number}",
                    "call_id": f"call_{number}",
                    "name": call.name,
                    "arguments": json.dumps(call.arguments),
                    "status": "completed",
                }
                for number, call in enumerate(answer.tool_calls)
            ]
        if answer.refusal is not None:
            content: dict[str, Any] = {"type": "refusal", "refusal": answer.refusal}
        elif answer.text is not None:
            content = {"type": "output_text", "text": answer.text, "annotations": []}
        else:
            return []
        return [
            {"type": "message", "id": "msg_1", "role": "assistant", "status": status, "content": [content]}
        ]

    @staticmethod
    def _item_events(item: dict[str, Any], index: int, answer: Answer) -> list[dict[str, Any]]:
        place = {"item_id": item["id"], "output_index": index}
        said = []
        if item["type"] == "function_call":
            said.append({"type": "response.output_item.added", "item": item | {"arguments": ""}, **place})
            said.append(
                {"type": "response.function_call_arguments.delta", "delta": item["arguments"], **place}
            )
        else:
            said.append({"type": "response.output_item.added", "item": item | {"content": []}, **place})
            if answer.refusal is not None:
                said.append(
                    {
                        "type": "response.refusal.delta",
                        "delta": answer.refusal,
                        "content_index": 0,
                        **place,
                    }
                )
            else:
                said += [
                    {
                        "type": "response.output_text.delta",
                        "delta": piece,
                        "content_index": 0,
                        "logprobs": [],
                        **place,
                    }
                    for piece in answer.cut()
                ]
        said.append({"type": "response.output_item.done", "item": item, **place})
        return said

    def model(self, url: str, **options: Any) -> Any:
        from llm.default_plugins import openai_models

        settings = {"model_name": "m", "key": "sk-test", "supports_tools": True, "supports_schema": True}
        return openai_models.AsyncResponses(
            options.pop("model_id", "responses-test"), api_base=f"{url}/v1", **(settings | options)
        )


PROTOCOL = Responses()

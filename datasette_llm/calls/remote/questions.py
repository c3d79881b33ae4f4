"""A prompt as data: what a worker has to know to make the same request.

Tools cross as their definitions, since they run where the prompt's owner lives. A file that is attached
crosses as its content, since the worker may be on another machine.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm
from llm.models import Prompt, Tool, ToolResult

from . import answers

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What is not sent when it is empty, as most of it is.
_PLAIN = ("system", "schema", "prompt_json", "hide_reasoning")


def question_of(prompt: Prompt, stream: bool, conversation: llm.AsyncConversation | None) -> dict[str, Any]:
    """Return what is asked, as data that fits into JSON."""
    asked: dict[str, Any] = {"prompt": prompt.prompt, "stream": stream}
    for name in _PLAIN:
        value = getattr(prompt, name, None)
        if value:
            asked[name] = value
    options = prompt.options.model_dump(exclude_none=True, mode="json")
    if options:
        asked["options"] = options
    if prompt.attachments:
        asked["attachments"] = [_attachment(each) for each in prompt.attachments]
    if prompt.tools:
        asked["tools"] = [_tool(each) for each in prompt.tools]
    if prompt.tool_results:
        asked["tool_results"] = [_result(each) for each in prompt.tool_results]
    messages = getattr(prompt, "_explicit_messages", None)
    if messages is not None:
        asked["messages"] = [_with_content(message.to_dict()) for message in messages]
    if conversation is not None and conversation.responses:
        # Plugins of before llm 0.32 read what was said before from here, the others from the messages.
        asked["turns"] = [_turn(response) for response in conversation.responses]
    return asked


def _turn(response: Any) -> dict[str, Any]:
    return {"question": question_of(response.prompt, False, None), "answer": answers.answer_of(response)}


def _attachment(attachment: llm.Attachment) -> dict[str, Any]:
    told: dict[str, Any] = {"type": attachment.type}
    content = attachment.content
    if not content and attachment.path:
        content = Path(attachment.path).read_bytes()
        told["type"] = attachment.type or attachment.resolve_type()
    if content:
        told["content"] = base64.b64encode(content).decode("ascii")
    elif attachment.url:
        told["url"] = attachment.url
    return told


def _with_content(value: Any) -> Any:
    """Put the content of files into messages that name them."""
    if isinstance(value, dict):
        if value.get("path") and not value.get("content") and ("url" in value or "type" in value):
            return _attachment(llm.Attachment(type=value.get("type"), path=value["path"]))
        return {name: _with_content(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_content(part) for part in value]
    return value


def _tool(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Tool):
        return {
            "name": tool.name,
            "description": tool.description,
            "input_schema": tool.input_schema,
            "plugin": tool.plugin,
        }
    kind = type(tool)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "config": tool._config}


def _result(result: ToolResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "output": result.output,
        "attachments": [_attachment(each) for each in result.attachments or []],
        "tool_call_id": result.tool_call_id,
        "failed": None if result.exception is None else _formatted(result.exception),
    }


def _formatted(error: Exception) -> list[str]:
    return [type(error).__name__, str(error)]


def prompt_from(asked: Mapping[str, Any], model: Any) -> Prompt:
    """Return the prompt that these data are, for a worker's own copy of the model."""
    more: dict[str, Any] = {}
    if "hide_reasoning" in asked:
        more["hide_reasoning"] = asked["hide_reasoning"]
    if "messages" in asked:
        from llm.parts import Message

        more["messages"] = [Message.from_dict(each) for each in asked["messages"]]
    return Prompt(
        asked["prompt"],
        model,
        system=asked.get("system"),
        schema=asked.get("schema"),
        prompt_json=asked.get("prompt_json"),
        options=model.Options(**asked.get("options", {})),
        attachments=[_attachment_from(each) for each in asked.get("attachments", ())],
        tools=[_tool_from(each, model) for each in asked.get("tools", ())],
        tool_results=[_result_from(each) for each in asked.get("tool_results", ())],
        **more,
    )


def conversation_from(asked: Mapping[str, Any], model: Any) -> Any:
    """Return the conversation so far, for plugins that look there; ``None`` if there is none."""
    turns = asked.get("turns")
    if not turns:
        return None
    conversation = model.conversation()
    for turn in turns:
        response = llm.AsyncResponse(
            prompt_from(turn["question"], model), model, stream=False, conversation=conversation
        )
        answers.fill(response, turn["answer"])
        response._done = True
        conversation.responses.append(response)
    return conversation


def _attachment_from(told: Mapping[str, Any]) -> llm.Attachment:
    content = told.get("content")
    return llm.Attachment(
        type=told.get("type"),
        url=told.get("url"),
        content=None if content is None else base64.b64decode(content),
    )


def _tool_from(told: Mapping[str, Any], model: Any) -> Any:
    if "class" not in told:
        return Tool(**told)
    for kind in model.supported_server_side_tools():
        if f"{kind.__module__}:{kind.__qualname__}" == told["class"]:
            return kind(**told["config"])
    from llm.models import ServerSideTool

    return ServerSideTool(**told["config"])


def _result_from(told: Mapping[str, Any]) -> ToolResult:
    failed = told["failed"]
    return ToolResult(
        name=told["name"],
        output=told["output"],
        attachments=[_attachment_from(each) for each in told["attachments"]],
        tool_call_id=told["tool_call_id"],
        exception=None if failed is None else type(failed[0], (Exception,), {})(failed[1]),
    )


def packed(value: Any) -> bytes:
    """Return data as bytes."""
    return json.dumps(value, separators=(",", ":"), default=_as_data).encode()


def unpacked(content: bytes) -> Any:
    """Return the data that bytes are."""
    return json.loads(content)


def _as_data(value: Any) -> Any:
    """What JSON has no word for: plugins keep whatever their SDK gave them."""
    dump = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)

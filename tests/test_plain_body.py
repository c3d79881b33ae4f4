"""What goes past an SDK's walk through a request arrives as it would have."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage

from datasette_llm.calls.clients.transport import client_factory
from datasette_llm.calls.listening import listening
from datasette_llm.calls.plain_body import past_the_walk

MESSAGES = [
    {"role": "system", "content": "Briefly."},
    {"role": "user", "content": [{"type": "text", "text": "Über"}, {"type": "image_url", "image_url": {}}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"default": 1.5}}}}}
]
ANSWER = {"id": "1", "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}


async def body_sent(**kwargs: Any) -> list[tuple[str, Any]]:
    """Return what a server gets, with its keys in order."""
    bodies: list[Any] = []
    found = client_factory(openai)
    assert found is not None
    library = found[1]

    def answer(request: Any) -> Any:
        bodies.append(json.loads(request.content, object_pairs_hook=list))
        return library.Response(200, json=ANSWER)

    async with library.AsyncClient(transport=library.MockTransport(answer)) as http:
        client = openai.AsyncOpenAI(api_key="sk-x", http_client=http)
        await client.chat.completions.create(**kwargs)
        await listening(client).chat.completions.create(**kwargs)
    usual, lean = bodies
    assert lean == usual
    return list(lean)


@pytest.mark.real_clock
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tools": TOOLS, "temperature": 0.5, "stop": openai.NOT_GIVEN},
        {"extra_body": {"provider": {"order": ["a"]}, "tools": []}, "tools": TOOLS},
        {"messages": [ChatCompletionMessage(role="assistant", content="pydantic")]},
        {"messages": ({"role": "user", "content": "in a tuple"},)},
    ],
    ids=["messages", "tools", "extra_body", "a model of pydantic", "a tuple"],
)
async def test_the_same_request_is_sent(more: dict[str, Any]) -> None:
    sent = dict(await body_sent(**{"model": "m", "messages": MESSAGES, **more}))
    assert sent["model"] == "m"
    assert sent["messages"]


def test_only_plain_json_goes_past_the_walk_and_nothing_is_changed() -> None:
    kwargs = {"model": "m", "messages": MESSAGES, "tools": [{"f": object()}]}
    assert past_the_walk(kwargs) == {**kwargs, "messages": (), "extra_body": {"messages": MESSAGES}}
    assert kwargs["messages"] is MESSAGES
    odd = {"messages": [{1: "no name"}]}
    assert past_the_walk(odd) is odd

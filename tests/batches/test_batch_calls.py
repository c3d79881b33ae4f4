"""What goes into a batch is what the model would have sent, and what comes out of it is its answer."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from datasette_llm import LLM
from datasette_llm.calls.batches.known import batches_of
from datasette_llm.calls.batches.offline import Exchange, NotOfflineError, Recorded
from datasette_llm.calls.batches.openapi import plain_schema
from datasette_llm.calls.batches.protocol import NoBatchesError, Value

from ..fakes import FakeModel, registered
from ..hooks import datasette_with, hooked
from ..protocols import PLUGIN_MARKS, Answer, Request, protocol_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from datasette_llm.calls.batches import offline
    from datasette_llm.responses.response import PromptResponse

pytestmark = PLUGIN_MARKS

FAMILIES = ("openai", "responses", "anthropic", "gemini")
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


async def ask(
    model_id: str,
    items: list[tuple[str, Callable[[offline.Request], offline.Reply] | None]],
    datasette: Any = None,
    **kwargs: Any,
) -> list[tuple[Exchange, PromptResponse]]:
    """Prompt an offline group, each prompt with what it is answered with."""

    def to_prompt(item: tuple[str, Exchange]) -> str:
        item[1].use()
        return item[0]

    asked = [(prompt, Exchange(reply)) for prompt, reply in items]
    async with LLM(datasette or datasette_with())._offline_group(model_id) as model:
        found = [(item[1], response) async for item, response in model.map(asked, to_prompt, **kwargs)]
    order = [exchange for _, exchange in asked]
    return sorted(found, key=lambda pair: order.index(pair[0]))


def result_line(family: str, custom_id: str, status: int, body: Any) -> bytes:
    """One line of results, in the family's words."""
    if family in ("openai", "responses"):
        line = {"id": "r1", "custom_id": custom_id, "response": {"status_code": status, "body": body}}
    elif family == "anthropic":
        result = (
            {"type": "succeeded", "message": body} if status == 200 else {"type": "errored", "error": body}
        )
        line = {"custom_id": custom_id, "result": result}
    else:
        line = {"key": custom_id, **({"response": body} if status == 200 else {"error": body[0]["error"]})}
    return json.dumps(line).encode()


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_request_is_recorded_and_its_answer_replayed(family: str) -> None:
    text = '{"name": "ana"}'
    said = Answer(text, usage=(7, 4), pieces=1)
    with protocol_server(family) as server:
        model = server.model(**({"can_schema": True} if family == "gemini" else {}))
        with registered(model):
            server.script = said
            live = await LLM(datasette_with()).model(model.model_id)
            expected = await live.prompt("who?", schema=SCHEMA, stream=False)
            assert await expected.text() == text
            sent = server.requests[-1]

            ((recorded, response),) = await ask(model.model_id, [("who?", None)], schema=SCHEMA)
            assert isinstance(response.error, Recorded)
            assert len(server.requests) == 1
            assert recorded.request is not None
            assert json.loads(recorded.request.body) == sent.json
            assert "test" not in repr(recorded.request)

            batches, endpoint = batches_of(recorded.request)
            await endpoint.aclose()
            line = json.loads(batches.line("row-1", recorded.request))
            body = line.get("body") or line.get("params") or line.get("request")
            assert not body.get("stream")
            path = "/v1beta/models/m:generateContent" if family == "gemini" else sent.path
            raw = server.protocol.render(said, Request(path, {}, body))
            refusal = server.protocol.error(
                Answer(status=400, message="too odd", code="invalid_request_error")
            )
            assert isinstance(raw.body, str)
            good = batches.read(result_line(family, "row-1", 200, json.loads(raw.body)))
            bad = batches.read(result_line(family, "row-2", 400, refusal))
            assert good.custom_id == "row-1"
            replies = [lambda request, it=each.reply: batches.reply(it, request) for each in (good, bad)]
            (_, replayed), (_, refused) = await ask(
                model.model_id, [("who?", replies[0]), ("what?", replies[1])], schema=SCHEMA
            )
        assert await replayed.text() == text
        assert replayed.finish_reason == expected.finish_reason == "stop"
        usage, usual = await replayed.usage(), await expected.usage()
        assert (usage.input, usage.output) == (usual.input, usual.output) == (7, 4)
        with pytest.raises(Exception, match="too odd"):
            await refused.text()
        assert len(server.requests) == 1


async def test_wrappers_can_refuse_a_request_and_see_the_answer() -> None:
    seen: list[str] = []

    def policy(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            if prompt == "forbidden":
                raise PermissionError("not that")
            try:
                yield
            except Exception as error:
                seen.append(type(error).__name__)
                raise
            seen.append(await result.response.text())

        return wrapper

    datasette = datasette_with()
    with protocol_server("openai") as server, registered(server.model()), hooked(llm_prompt_context=policy):
        (one, refused), (two, _) = await ask("openai-test", [("forbidden", None), ("fine", None)], datasette)
        assert one.request is None
        assert isinstance(refused.error, PermissionError)
        assert two.request is not None
        assert seen == ["Recorded"]
        batches, endpoint = batches_of(two.request)
        await endpoint.aclose()
        body = json.loads(server.protocol.render(Answer("hi"), Request("", {}, {})).body)  # type: ignore[arg-type]
        await ask(
            "openai-test", [("fine", lambda request: batches.reply(Value(200, body), request))], datasette
        )
        assert seen == ["Recorded", "hi"]
        assert not server.requests


async def test_a_model_that_makes_its_own_clients_takes_no_batches() -> None:
    with registered(FakeModel()), pytest.raises(NotOfflineError):
        await ask("fake", [("x", None)])


async def test_a_request_to_another_address_is_for_no_batch() -> None:
    with protocol_server("ollama") as server, registered(server.model()):
        ((recorded, _),) = await ask(server.model().model_id, [("x", None)])
        assert recorded.request is not None
        with pytest.raises(NoBatchesError, match="/api/chat"):
            batches_of(recorded.request)


def test_a_schema_in_the_words_of_openapi() -> None:
    schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "age": {"type": ["integer", "null"]},
            "kind": {"const": "a"},
            "pet": {"$ref": "#/$defs/Pet"},
            "owner": {"anyOf": [{"type": "string"}, {"type": "null"}], "title": "Owner"},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/Pet"}},
        },
        "$defs": {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}}},
    }
    pet = {"type": "object", "properties": {"name": {"type": "string"}}}
    assert plain_schema(schema) == {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "nullable": True},
            "kind": {"enum": ["a"]},
            "pet": pet,
            "owner": {"type": "string", "nullable": True, "title": "Owner"},
            "tags": {"type": "array", "items": pet},
        },
    }

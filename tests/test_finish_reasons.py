"""Why a model stopped: each family through its real plugin, streamed and not, in one vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest

from datasette_llm import LLM, PromptCancelled
from datasette_llm.responses.finish import WORDS

from .fakes import FakeModel, registered
from .hooks import datasette_with
from .protocols import FAMILIES, PLUGIN_MARKS, Answer, Raw, ToolCall, protocol_server, skip_unless_spoken

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from datasette_llm import PromptResponse

    from .protocols import ProtocolServer, Request

pytestmark = PLUGIN_MARKS

CALL = (ToolCall("look_up", {"name": "ana"}),)

#: What a family sends, and what that is called here.
SAID: dict[str, list[tuple[Answer, str]]] = {
    "openai": [
        (Answer(), "stop"),
        (Answer(finish="length"), "length"),
        (Answer(None, finish="length", reasoning="hm"), "length"),
        (Answer(None, finish="content_filter"), "content_filter"),
        (Answer(refusal="I will not do that."), "refusal"),
        (Answer(tool_calls=CALL, finish="tool_calls"), "tool_calls"),
        (Answer(tool_calls=CALL), "tool_calls"),
        (Answer(finish="function_call"), "tool_calls"),
        (Answer(finish="error"), "error"),
        (Answer(finish="something new"), "unknown"),
        (Answer(finish=None), "unknown"),
        (Answer(usage=None, finish="length"), "length"),
    ],
    "responses": [
        (Answer(), "stop"),
        (Answer(finish="max_output_tokens"), "length"),
        (Answer(None, finish="max_output_tokens"), "length"),
        (Answer(finish="content_filter"), "content_filter"),
        (Answer(refusal="I will not do that."), "refusal"),
        (Answer(tool_calls=CALL), "tool_calls"),
        (Answer(usage=None), "stop"),
    ],
    "anthropic": [
        (Answer(), "stop"),
        (Answer(finish="stop_sequence"), "stop"),
        (Answer(finish="max_tokens"), "length"),
        (Answer(None, finish="max_tokens", reasoning="hm"), "length"),
        (Answer(finish="model_context_window_exceeded"), "length"),
        (Answer(finish="pause_turn"), "length"),
        (Answer(tool_calls=CALL, finish="tool_use"), "tool_calls"),
        (Answer(finish="something_new"), "unknown"),
    ],
    "gemini": [
        (Answer(), "stop"),
        (Answer(finish="MAX_TOKENS"), "length"),
        (Answer(None, finish="MAX_TOKENS", reasoning="hm"), "length"),
        (Answer(None, finish="SAFETY"), "content_filter"),
        (Answer("half", finish="RECITATION"), "content_filter"),
        (Answer(None, finish="PROHIBITED_CONTENT"), "content_filter"),
        (Answer(blocked="SAFETY"), "content_filter"),
        (Answer(blocked="OTHER"), "content_filter"),
        (Answer(None, finish="MALFORMED_FUNCTION_CALL"), "error"),
        (Answer(tool_calls=CALL), "tool_calls"),
        (Answer(finish="FINISH_REASON_UNSPECIFIED"), "unknown"),
    ],
    "mistral": [
        (Answer(), "stop"),
        (Answer(finish="length"), "length"),
        (Answer(finish="model_length"), "length"),
        (Answer(finish="error"), "error"),
        (Answer(tool_calls=CALL, finish="tool_calls"), "tool_calls"),
    ],
    "groq": [
        (Answer(), "stop"),
        (Answer(finish="length"), "length"),
        (Answer(finish="content_filter"), "content_filter"),
        (Answer(usage=None), "stop"),
        (Answer(finish=None), "unknown"),
    ],
    "ollama": [
        (Answer(), "stop"),
        (Answer(finish="length"), "length"),
        (Answer("", finish="load"), "error"),
        (Answer(finish=None), "unknown"),
        (Answer(tool_calls=CALL), "tool_calls"),
    ],
}


# One test for all that a family says: what plugins leave open is collected after each.
@pytest.mark.parametrize("family", SAID)
async def test_a_family_says_why_its_model_stopped(family: str, anyio_backend: tuple[str, Any]) -> None:
    skip_unless_spoken(family, anyio_backend)
    with protocol_server(family) as server:
        model = server.model()
        found: list[tuple[Answer, object, object, str]] = []
        with registered(model):
            async with LLM(datasette_with()).group(model.model_id) as group:
                for answer, expected in SAID[family]:
                    server.script = answer
                    for stream in (True, False):
                        response = await group.prompt("x", stream=stream)
                        text = await response.text()
                        found.append((answer, stream, response.finish_reason, expected))
                        if answer.text and not (answer.tool_calls or answer.refusal or answer.blocked):
                            assert text == answer.text
                    async for _, mapped in group.map(["x"]):
                        assert mapped.error is None
                        found.append((answer, "map", mapped.finish_reason, expected))
        assert [each for each in found if each[2] != each[3]] == []
        assert len(server.requests) == 3 * len(SAID[family])


@pytest.mark.parametrize("stream", [True, False])
async def test_what_anthropic_refuses_is_an_error_and_a_refusal(stream: bool) -> None:
    with protocol_server("anthropic") as server:
        model = server.model()
        server.script = Answer("half an ans", finish="refusal", refusal="not about that")
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            response = await wrapped.prompt("x", stream=stream)
            with pytest.raises(llm.ModelError, match=r"Claude refused this request .*not about that"):
                await response.text()
        assert response.finish_reason == "refusal"
        assert len(server.requests) == 1


async def test_a_response_that_failed_on_its_providers_side_is_an_error() -> None:
    with protocol_server("responses") as server:
        model = server.model()
        server.script = Answer(None, finish="failed", code="invalid_prompt", message="no such thing")
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            for stream in (True, False):
                response = await wrapped.prompt("x", stream=stream)
                with pytest.raises(llm.ModelError, match="answered with an error: no such thing"):
                    await response.text()
                assert response.finish_reason == "error"
        assert len(server.requests) == 2


async def test_a_chain_and_a_conversation_say_it_of_each_response() -> None:
    def look_up(name: str) -> str:
        """Look a name up."""
        return f"{name} found"

    with protocol_server("openai") as server:
        model = server.model()
        server.script = [
            Answer(tool_calls=CALL, finish="tool_calls"),
            Answer("half", finish="length"),
            Answer("one"),
            Answer("two", finish="length"),
        ]
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            chain = wrapped.chain("x", tools=[look_up])
            reasons = []
            async for response in chain.responses():
                await response.text()
                reasons.append(response.finish_reason)
            conversation = wrapped.conversation()
            for prompt in ("a", "b"):
                response = await conversation.prompt(prompt)
                await response.text()
                reasons.append(response.finish_reason)
        assert reasons == ["tool_calls", "length", "stop", "length"]


async def test_it_is_none_until_the_answer_is_complete_and_unknown_where_nobody_says() -> None:
    seen: list[PromptResponse] = []

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        await there.wait()
        yield "half"
        assert seen[0].finish_reason is None
        if prompt == "fail":
            raise ValueError("no")

    with registered(FakeModel(script)):
        model = await LLM(datasette_with()).model("fake")
        for prompt, expected in (("answer", "unknown"), ("fail", "error")):
            there = anyio.Event()
            seen[:] = [await model.prompt(prompt)]
            there.set()
            await seen[0].wait()
            assert seen[0].finish_reason == expected
        there = anyio.Event()
        cancelled = await model.prompt("x")
        cancelled.cancel()
        with pytest.raises(PromptCancelled):
            await cancelled.text()
        assert cancelled.finish_reason is None


KEPT: list[tuple[Any, str]] = [
    ({}, "unknown"),
    ({"choices": []}, "unknown"),
    ({"choices": [None]}, "unknown"),
    ({"choices": [{"finish_reason": 7}]}, "unknown"),
    ({"choices": [{"finish_reason": "STOP"}]}, "stop"),
    ({"object": "response"}, "unknown"),
    ({"object": "response", "status": "incomplete"}, "length"),
    ({"type": "message", "content": []}, "unknown"),
    ({"candidates": []}, "unknown"),
    ({"candidates": [None], "promptFeedback": None}, "unknown"),
    ({"chunks": []}, "unknown"),
    ({"chunks": [{}]}, "unknown"),
    ({"done": True, "done_reason": "length"}, "length"),
    ({"content": "text", "object": "chat.completion.chunk"}, "unknown"),
    (["not", "an", "object"], "unknown"),
    ([{"candidates": [{}]}, {"candidates": [{"finishReason": "MAX_TOKENS"}]}, {}], "length"),
    ("text", "unknown"),
]


async def test_whatever_a_plugin_keeps_is_survived() -> None:
    kept: Any = None

    class Keeps(FakeModel):
        async def execute(
            self, prompt: Any, stream: bool, response: Any, conversation: Any = None
        ) -> AsyncGenerator[Any, None]:
            response.response_json = kept
            yield "text"

    found = []
    with registered(Keeps()):
        model = await LLM(datasette_with()).model("fake")
        for kept, _expected in KEPT:
            response = await model.prompt("x", stream=False)
            assert await response.text() == "text"
            found.append((kept, response.finish_reason))
    assert found == KEPT


def test_the_documentation_has_the_words_of_each_family() -> None:
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "prompts.md").read_text()
    missing = [
        word
        for words in WORDS.values()
        for word in words
        if f"`{word}`" not in page and f"`{word.upper()}`" not in page
    ]
    assert missing == []


def half(server: ProtocolServer) -> Callable[[Request], Raw]:
    """An answer whose stream ends in the middle, cleanly and without a word."""

    def script(request: Request) -> Raw:
        whole = server.protocol.render(Answer("one two three four", pieces=4), request)
        assert isinstance(whole.body, list)
        said = next(number for number, part in enumerate(whole.body) if b"two" in part)
        return replace(whole, body=whole.body[: said + 1])

    return script


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_stream_that_ends_half_way_is_no_answer(family: str, anyio_backend: tuple[str, Any]) -> None:
    skip_unless_spoken(family, anyio_backend)
    with protocol_server(family) as server:
        model = server.model()
        server.script = half(server)
        with registered(model):
            settings = {"retries": {"attempts": 1, "timeout": 5}}
            wrapped = await LLM(datasette_with(settings)).model(model.model_id)
            response = await wrapped.prompt("x")
            with pytest.raises(ConnectionError, match="ended before the provider said"):
                await response.text()
        assert response.finish_reason == "error"

"""Spans for whoever traces Datasette: one per prompt, nothing of what was said."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from datasette_llm import LLM
from datasette_llm.calls import tracing
from datasette_llm.calls.choice import Choice
from datasette_llm.calls.semantics import of_answer, of_request
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with, hooked
from tests.protocols import Answer, ToolCall, protocol_server

from .remote_workers import fake_workers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from opentelemetry.sdk.trace import ReadableSpan


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """The spans that have ended, on a provider of this test's own."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    return exporter


async def test_a_prompt_is_a_span_with_its_model_purpose_and_tokens(spans: InMemorySpanExporter) -> None:
    with registered(FakeModel()):
        model = await LLM(datasette_with()).model("fake", purpose="testing")
        await (await model.prompt("one two three")).text()
        async with LLM(datasette_with()).group("fake") as group:
            async for _, _response in group.map(["four"]):
                pass
    ended = spans.get_finished_spans()
    assert [span.name for span in ended] == ["chat fake", "chat fake"]
    assert dict(ended[0].attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "tests",
        "gen_ai.request.model": "fake",
        "gen_ai.request.stream": True,
        "datasette_llm.purpose": "testing",
        "gen_ai.response.time_to_first_chunk": 0.0,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 1,
    }
    assert ended[0].kind is trace.SpanKind.CLIENT
    # map() asks for unstreamed answers.
    assert "gen_ai.request.stream" not in (ended[1].attributes or {})


@pytest.mark.real_clock
async def test_a_chain_is_an_agent_with_its_turns_and_tools_inside(spans: InMemorySpanExporter) -> None:
    def look_up(name: str) -> str:
        """Look a name up."""
        raise LookupError(f"nobody is called {name}")

    call = Answer(tool_calls=(ToolCall("look_up", {"name": "ana"}),), finish="tool_calls")
    with protocol_server("openai") as server:
        model = server.model()
        server.script = [call, Answer("done")]
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            await wrapped.chain("x", tools=[look_up], stream=False).text()
    first, tool, second, agent = _ended(spans, 4)
    assert agent.name == "invoke_agent"
    assert agent.kind is trace.SpanKind.INTERNAL
    assert tool.name == "execute_tool look_up"
    tool_attributes = dict(tool.attributes or {})
    assert tool_attributes.pop("gen_ai.tool.call.id")
    assert tool_attributes == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "look_up",
        "gen_ai.tool.type": "function",
        "error.type": "LookupError",
    }
    assert agent.context is not None
    assert {span.parent and span.parent.span_id for span in (first, tool, second)} == {agent.context.span_id}
    for kind in ("input", "output"):
        used = [(span.attributes or {})[f"gen_ai.usage.{kind}_tokens"] for span in (first, second, agent)]
        assert used[0] + used[1] == used[2]  # type: ignore[operator]
    assert "ana" not in "".join(span.to_json() for span in (first, tool, second, agent))


@pytest.mark.real_clock
async def test_a_span_says_what_was_asked_of_whom_and_who_answered(spans: InMemorySpanExporter) -> None:
    with protocol_server("openai") as server:
        model = server.model()
        settings = {"prices": {model.model_id: {"input": 1_000_000, "output": 0}}}
        with registered(model):
            wrapped = await LLM(datasette_with(settings)).model(model.model_id)
            conversation = wrapped.conversation()
            response = await conversation.prompt("x", stream=False, temperature=0.5, max_tokens=50)
            await response.text()
    (span,) = _ended(spans, 1)
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.provider.name"] == "openai"
    assert attributes["gen_ai.request.temperature"] == 0.5
    assert attributes["gen_ai.request.max_tokens"] == 50
    assert attributes["gen_ai.conversation.id"] == conversation.id
    assert attributes["server.address"] == "127.0.0.1"
    assert isinstance(attributes["server.port"], int)
    assert attributes["gen_ai.response.model"]
    assert attributes["gen_ai.response.id"]
    assert attributes["datasette_llm.cost"] == attributes["gen_ai.usage.input_tokens"]


async def test_a_wrappers_span_is_a_child_and_holds_during_the_model_call(
    spans: InMemorySpanExporter, anyio_backend: tuple[str, Any]
) -> None:
    if anyio_backend[0] == "trio":
        pytest.skip("on trio, wrappers run on Datasette's side, in a context of their own")
    current = []

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        current.append(trace.get_current_span().get_span_context().span_id)
        yield "answer"

    @asynccontextmanager
    async def wrapper(result: Any) -> AsyncIterator[None]:
        with tracing._tracer.start_as_current_span("wrapper"):
            yield

    with (
        registered(FakeModel(script)),
        hooked(llm_prompt_context=lambda datasette: wrapper),
    ):
        model = await LLM(datasette_with()).model("fake")
        await (await model.prompt("x")).text()
    inner, outer = spans.get_finished_spans()
    assert (inner.name, outer.name) == ("wrapper", "chat fake")
    assert inner.parent is not None
    assert outer.context is not None
    assert inner.parent.span_id == outer.context.span_id
    assert inner.context is not None
    assert current == [inner.context.span_id]


async def test_a_span_goes_with_a_call_to_its_worker_and_names_it(spans: InMemorySpanExporter) -> None:
    there: list[int] = []

    async def script(prompt: str) -> AsyncGenerator[Any, None]:
        there.append(trace.get_current_span().get_span_context().span_id)
        yield "answer"

    with registered(FakeModel(script)):
        async with (
            fake_workers("a") as workers,
            LLM(datasette_with()).group("fake", workers=workers.spec) as group,
        ):
            await (await group.prompt("x")).text()
    (ended,) = spans.get_finished_spans()
    assert ended.context is not None
    assert there == [ended.context.span_id]
    assert (ended.attributes or {})["datasette_llm.worker"] == "a"


async def test_an_error_is_named_and_not_quoted(spans: InMemorySpanExporter) -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        raise ValueError("incorrect key sk-12345")
        yield ""

    with registered(FakeModel(script)):
        model = await LLM(datasette_with()).model("fake")
        response = await model.prompt("secret question")
        with pytest.raises(ValueError, match="incorrect key"):
            await response.text()
    (span,) = spans.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"
    assert "sk-12345" not in span.to_json()
    assert "secret question" not in span.to_json()


@pytest.mark.real_clock
async def test_a_span_says_why_each_model_call_stopped(spans: InMemorySpanExporter) -> None:
    def look_up(name: str) -> str:
        """Look a name up."""
        return f"{name} found"

    call = Answer(tool_calls=(ToolCall("look_up", {"name": "ana"}),), finish="tool_calls")
    with protocol_server("openai") as server:
        model = server.model()
        server.script = [Answer(finish="length"), call, Answer("done"), Answer(status=400)]
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            await (await wrapped.prompt("x", stream=False)).text()
            await wrapped.chain("x", tools=[look_up], stream=False).text()
            await (await wrapped.prompt("x", stream=False)).wait()
    ended = [span for span in _ended(spans, 6) if not span.name.startswith("execute_tool")]
    reasons = [(span.attributes or {}).get("gen_ai.response.finish_reasons") for span in ended]
    assert reasons == [("length",), ("tool_calls",), ("stop",), ("tool_calls", "stop"), ("error",)]


def _ended(spans: InMemorySpanExporter, count: int) -> Sequence[ReadableSpan]:
    ended = spans.get_finished_spans()
    assert len(ended) == count
    return ended


def test_what_is_told_of_a_request_and_its_answer_in_the_words_of_the_conventions() -> None:
    model: Any = SimpleNamespace(model_id="m", needs_key="claude", api_base="http://host/v1")
    asked = of_request(Choice(model, "m", purpose="p", batch=True))
    assert asked == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "m",
        "datasette_llm.purpose": "p",
        "datasette_llm.batch": True,
        "server.address": "host",
        "server.port": 80,
    }
    for address in ("nowhere", "http://[::1"):
        model.api_base = address
        assert "server.address" not in of_request(Choice(model, "m"))
    answer: Any = SimpleNamespace(
        response_json={"id": "a1", "model": "m-2026"},
        input_tokens=100,
        output_tokens=50,
        token_details={
            "cache_read_input_tokens": 20,
            "cache_creation_input_tokens": 10,
            "output_tokens_details": {"reasoning_tokens": 30},
        },
    )
    told = of_answer(answer)
    assert (told["gen_ai.response.id"], told["gen_ai.response.model"]) == ("a1", "m-2026")
    assert told["gen_ai.usage.cache_read.input_tokens"] == 20
    assert told["gen_ai.usage.cache_creation.input_tokens"] == 10
    assert told["gen_ai.usage.reasoning.output_tokens"] == 30

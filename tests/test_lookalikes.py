"""Servers that only look like OpenAI: what they send is read as it is meant, or put in words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest

from datasette_llm import LLM
from datasette_llm.calls.heard_stream import HeardStream
from datasette_llm.calls.wording import error_of, quoted

from .fakes import FakeModel, registered
from .hooks import datasette_with
from .protocols import PLUGIN_MARKS, Answer, Raw, protocol_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from datasette_llm import PromptResponse

pytestmark = PLUGIN_MARKS

FAST = {"retries": {"attempts": 2, "timeout": 20}}
EVENTS = "text/event-stream"


def completion(message: Any = None, **changes: Any) -> dict[str, Any]:
    """An unstreamed completion."""
    message = {"role": "assistant", "content": "hello"} if message is None else message
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return body | {"choices": choices, "usage": usage} | changes


def chunk(delta: Any, finish: str | None = None) -> bytes:
    """A chunk of a stream."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    return f"data: {json.dumps(body)}\n\n".encode()


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def raw(body: Any, content_type: str = "application/json") -> Raw:
    return Raw(json.dumps(body), content_type)


HELLO = [chunk({"role": "assistant", "content": "hel"}), chunk({"content": "lo"}), chunk({}, "stop")]
DONE = b"data: [DONE]\n\n"
PARTS = [
    {"type": "thinking", "thinking": "hm"},
    {"type": "text", "text": "hel"},
    {"type": "text", "text": "lo"},
]

#: What is as good as an answer: streamed or not, what is sent, text, finish reason.
ANSWERS: dict[str, tuple[bool, Raw, str, str]] = {
    "no usage": (False, raw(without(completion(), "usage")), "hello", "stop"),
    "usage null": (False, raw(completion(usage=None)), "hello", "stop"),
    "no finish reason": (
        False,
        raw(completion(choices=[{"index": 0, "message": {"role": "assistant", "content": "hello"}}])),
        "hello",
        "unknown",
    ),
    "content in parts": (False, raw(completion({"role": "assistant", "content": PARTS})), "hello", "stop"),
    "a streamed delta in parts": (
        True,
        Raw([chunk({"content": PARTS}), chunk({}, "stop"), DONE], EVENTS),
        "hello",
        "stop",
    ),
    "a stream without usage": (True, Raw([*HELLO, DONE], EVENTS), "hello", "stop"),
    "no [DONE]": (True, Raw(HELLO, EVENTS), "hello", "stop"),
    "null to the end": (True, Raw([*HELLO[:2], chunk({}), DONE], EVENTS), "hello", "unknown"),
    "comments and keep-alives": (
        True,
        Raw([b": PROCESSING\n\n", b": a\n\n\n\n", HELLO[0], b":\n\n", *HELLO[1:], DONE], EVENTS),
        "hello",
        "stop",
    ),
    "events without a content type": (True, Raw([*HELLO, DONE], "application/octet-stream"), "hello", "stop"),
    "events called text": (True, Raw([*HELLO, DONE], "text/plain; charset=utf-8"), "hello", "stop"),
    "chunks without choices": (
        True,
        Raw([b'data: {"id":"1","object":"chat.completion.chunk"}\n\n', *HELLO, DONE], EVENTS),
        "hello",
        "stop",
    ),
    "JSON to a streaming request": (True, raw(completion()), "hello", "stop"),
    "JSON called events to a streaming request": (True, raw(completion(), EVENTS), "hello", "stop"),
    "a lone surrogate": (False, Raw(json.dumps(completion({"content": "a\ud800b"}))), "a\ud800b", "stop"),
    "a NUL": (True, Raw([chunk({"content": "a\0b"}), chunk({}, "stop"), DONE], EVENTS), "a\0b", "stop"),
    "content in bare strings": (False, raw(completion({"content": ["hel", "lo", 1]})), "hello", "stop"),
    "a choice without a delta": (
        True,
        Raw([*HELLO[:2], b'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}\n\n', DONE], EVENTS),
        "hello",
        "stop",
    ),
    "events and no end": (True, Raw(HELLO, EVENTS), "hello", "stop"),
    "ten megabytes": (False, raw(completion({"content": "x" * 10_000_000})), "x" * 10_000_000, "stop"),
    "ten megabytes in a stream": (
        True,
        Raw([*[chunk({"content": "x" * 100_000})] * 100, chunk({}, "stop"), DONE], EVENTS),
        "x" * 10_000_000,
        "stop",
    ),
}

#: What is no answer: streamed or not, what is sent, what the error says, how often it is asked.
ERRORS: dict[str, tuple[bool, Raw, str, int]] = {
    "no choices": (False, raw(completion(choices=[])), r'without choices: \{"id": "1"', 1),
    "choices null": (False, raw(completion(choices=None)), "without choices", 1),
    "choices left out": (False, raw(without(completion(), "choices")), "without choices", 1),
    "a choice without a message": (False, raw(completion(choices=[{"index": 0}])), "without a message", 1),
    "an empty object": (False, raw({}), r"without choices: \{\}", 1),
    "an error": (False, raw({"error": {"message": "no such deployment"}}), "error: no such deployment", 1),
    "an error of words": (False, raw({"error": "out of memory"}), "error: out of memory", 1),
    "a rate limit": (
        False,
        raw({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}),
        "error: slow down",
        2,
    ),
    "an overload as a number": (False, raw({"error": {"message": "busy", "code": 503}}), "error: busy", 2),
    "an overload as a type": (False, raw({"error": {"message": "busy", "type": "overloaded"}}), "busy", 2),
    "a fault of the server": (
        False,
        raw({"error": {"message": "oh", "type": "server_error"}}),
        "error: oh",
        2,
    ),
    "HTML": (False, Raw("<html>\n<h1>Sign in</h1>", "text/html"), "no JSON: <html> <h1>Sign in", 1),
    "text": (False, Raw("upstream", "text/plain"), "no JSON: upstream", 1),
    "a list": (False, raw([1, 2]), r"no object: \[1, 2\]", 1),
    "null": (False, raw(None), "no object", 1),
    "a string": (False, raw("hello"), "no (object|JSON): .?hello", 1),
    "nothing": (False, Raw(""), "JSON|no object", 2),
    "half of the JSON": (False, Raw(json.dumps(completion())[:80]), "JSONDecodeError", 2),
    "an error in a stream": (
        True,
        Raw([HELLO[0], b'data: {"error":{"message":"it broke","code":400}}\n\n'], EVENTS),
        "error in the middle of its stream: it broke",
        1,
    ),
    "an error of words in a stream": (
        True,
        Raw([HELLO[0], b'data: {"error":"it broke"}\n\n'], EVENTS),
        "in the middle of its stream: it broke",
        1,
    ),
    "an overload in a stream": (
        True,
        Raw([b'data: {"error":{"message":"busy","type":"overloaded_error"}}\n\n'], EVENTS),
        "stream: busy",
        2,
    ),
    "a stream that ends": (True, Raw(HELLO[:2], EVENTS), "ended before the provider said", 2),
    "a stream of nothing": (True, Raw([DONE], EVENTS), "", 1),
    "HTML to a streaming request": (
        True,
        Raw("<html>Sign in</html>", "text/html"),
        "no stream of events: <html>Sign in",
        1,
    ),
    "HTML called events": (True, Raw("<html>Sign in</html>", EVENTS), "no stream of events: <html>", 1),
    "an error to a streaming request": (
        True,
        raw({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}),
        "error: slow down",
        2,
    ),
    "no choices to a streaming request": (True, raw(completion(choices=[])), "without choices", 1),
}


async def asked(model: Any, stream: bool, settings: Any = None) -> PromptResponse:
    """Ask once, and wait for what comes of it."""
    async with LLM(datasette_with(settings or FAST)).group(model.model_id) as group:
        response = await group.prompt("x", stream=stream)
        await response.wait()
        return response


async def test_what_is_as_good_as_an_answer_is_one() -> None:
    with protocol_server("openai") as server:
        model = server.model()
        with registered(model):
            for name, (stream, sent, text, reason) in ANSWERS.items():
                server.script, before = sent, len(server.requests)
                response = await asked(model, stream)
                assert (name, response.error) == (name, None)
                assert (name, await response.text() == text) == (name, True)
                assert (name, response.finish_reason) == (name, reason)
                assert (name, len(server.requests) - before) == (name, 1)


async def test_what_is_no_answer_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasette_llm.calls.retry.WAIT_FIRST", (0.0, 0.01))
    bare = (AttributeError, IndexError, KeyError, TypeError, ValueError)
    with protocol_server("openai") as server:
        # A lane for each, or a refusal would find the cooldown of the one before.
        models = {name: server.model(model_id=f"openai-test {name}") for name in ERRORS}
        with registered(*models.values()):
            for name, (stream, sent, words, requests) in ERRORS.items():
                server.script, before = sent, len(server.requests)
                response = await asked(models[name], stream)
                if not words:
                    assert (name, response.error, response.finish_reason) == (name, None, "unknown")
                    continue
                error = response.error
                assert (name, type(error) in bare) == (name, False)
                assert isinstance(error, (llm.ModelError, ConnectionError)), (name, error)
                assert pytest.raises(Exception, match=words).matches(error), (name, error)
                assert (name, len(server.requests) - before) == (name, requests)
                assert (name, response.finish_reason) == (name, "error")


async def test_every_row_is_asked_once_where_a_server_gives_no_usage() -> None:
    with protocol_server("openai") as server:
        model = server.model()
        server.script = Answer(usage=None)
        with registered(model):
            async with LLM(datasette_with()).group(model.model_id, concurrency=5) as group:
                outcomes = [response.error async for _, response in group.map(range(20))]
                assert (group.stats.input_tokens, group.stats.output_tokens) == (0, 0)
        assert outcomes == [None] * 20
        assert len(server.requests) == 20


async def test_a_model_that_cannot_stream_is_not_asked_to() -> None:
    with protocol_server("openai") as server:
        model = server.model(can_stream=False)
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            response = await wrapped.prompt("x")
            assert [chunk async for chunk in response] == ["hello from the model"]
            assert await (await wrapped.prompt("x", stream=True)).text() == "hello from the model"
            assert await wrapped.chain("x").text() == "hello from the model"
            assert await (await wrapped.conversation().prompt("x")).text() == "hello from the model"
        assert [bool(request.json.get("stream")) for request in server.requests] == [False] * 4


async def test_responses_come_as_events_or_as_json() -> None:
    with protocol_server("responses") as server:
        model = server.model()
        with registered(model):

            def whole(request: Any) -> Raw:
                request.json["stream"] = False
                answer = Answer("hello", finish="max_output_tokens")
                return server.protocol.render(answer, request)

            server.script = whole
            response = await asked(model, True)
            assert (await response.text(), response.finish_reason) == ("hello", "length")
            for body, words in (
                ({"error": {"message": "no"}}, "error: no"),
                ({"id": "1", "object": "response"}, "without output"),
                ([], "no object"),
            ):
                for stream in (True, False):
                    server.script = raw(body)
                    response = await asked(model, stream)
                    assert pytest.raises(llm.ModelError, match=words).matches(response.error), response.error
            server.script = Raw(
                [b'event: error\ndata: {"type":"error","code":"server_error","message":"it broke"}\n\n'],
                EVENTS,
            )
            response = await asked(model, True, {"retries": {"attempts": 1, "timeout": 5}})
            assert pytest.raises(llm.ModelError, match="stream: it broke").matches(response.error)


NONSENSE = ("banana", "-5", "", "nan", "inf", "-inf", "1e400", "9" * 30, "0", "1;2", "12 parsecs", "\xff")


async def test_nonsense_in_every_rate_limit_header_stops_nothing() -> None:
    names = [
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ]
    told = ("limit", "remaining", "reset")
    names += [f"anthropic-ratelimit-requests-{what}" for what in told]
    names += ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "x-ratelimit-reset", "retry-after"]
    names += ["retry-after-ms"]
    with protocol_server("openai") as server:
        model = server.model()
        with registered(model):
            for value in NONSENSE:
                server.script = Answer(headers=dict.fromkeys(names, value))
                async with LLM(datasette_with()).group(model.model_id, concurrency=4) as group:
                    with anyio.fail_after(20):
                        errors = [response.error async for _, response in group.map(range(8))]
                assert (value, errors) == (value, [None] * 8)


async def test_a_bug_in_somebodys_own_model_is_left_as_it_is() -> None:
    async def buggy(prompt: str) -> AsyncGenerator[Any, None]:
        if prompt == "json":
            json.loads("{")
        if prompt == "key":
            dict[str, str]()["missing"]
        yield None.strip()  # type: ignore[attr-defined]

    with registered(FakeModel(buggy)):
        async with LLM(datasette_with({"retries": {"attempts": 1, "timeout": 1}})).group("fake") as group:
            errors = {item: response.error async for item, response in group.map(["json", "key", "none"])}
    assert {item: type(error) for item, error in errors.items()} == {
        "json": json.JSONDecodeError,
        "key": KeyError,
        "none": AttributeError,
    }


async def test_what_a_plugin_stumbles_over_is_put_in_words() -> None:
    with protocol_server("gemini") as server:
        model = server.model()
        server.script = Raw(
            '[{"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": "STOP"}]}]'
        )
        with registered(model):
            response = await asked(model, False)
        assert isinstance(response.error, llm.ModelError)
        assert str(response.error).startswith(
            "llm_gemini can make nothing of the provider's answer, or of this prompt "
            "(KeyError: 'modelVersion')"
        )
        assert isinstance(response.error.__cause__, KeyError)


class Stream:
    """A stream as a plugin might have it: one of events, and of no HTTP response."""

    closed = False

    def __aiter__(self) -> AsyncIterator[int]:
        return self._numbers()

    async def _numbers(self) -> AsyncIterator[int]:
        for number in range(3):
            yield number

    async def close(self) -> None:
        self.closed = True


async def test_a_stream_can_be_used_in_every_way_that_the_sdks_streams_can() -> None:
    stream = Stream()
    async with HeardStream(stream, HeardStream.events, lambda body, stream: []) as heard:
        assert await anext(heard) == 0
        assert [event async for event in heard] == [1, 2]
        assert heard.closed is False
        assert not heard.said_done
    assert stream.closed


def test_what_came_is_quoted_and_coded_whatever_it_is() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert quoted(circle) == "[[...]]"
    assert quoted({"a": {1}}) == '{"a": "{1}"}'
    for body, code in (
        ({"code": "503", "message": "busy"}, 503),
        ({"code": 7, "type": "overloaded_error"}, "overloaded_error"),
        ({"code": True, "status": "", "type": None}, None),
    ):
        assert error_of(body).code == code

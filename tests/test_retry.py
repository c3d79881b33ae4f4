"""What is transient, how long it is retried, and what is raised in the end; on virtual time."""

from __future__ import annotations

import datetime
import json
import logging
import sys
from contextlib import nullcontext
from email.utils import format_datetime
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import httpx2
import llm
import openai
import pytest
from llm.default_plugins.openai_models import AsyncChat, AsyncResponses

from datasette_llm._compat import ExceptionGroup
from datasette_llm.calls.completeness import check_complete
from datasette_llm.calls.retry import (
    Failure,
    IncompleteAnswer,
    classify,
    retry_after_seconds,
    retrying,
)
from datasette_llm.pace.policy import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST = httpx2.Request("POST", "http://provider.invalid/")


def openai_error(status: int, headers: dict[str, str] | None = None, **body: Any) -> openai.APIStatusError:
    response = httpx2.Response(status, headers=headers, request=REQUEST)
    classes: dict[int, type[openai.APIStatusError]] = {
        401: openai.AuthenticationError,
        429: openai.RateLimitError,
        500: openai.InternalServerError,
    }
    return classes.get(status, openai.APIStatusError)("no", response=response, body=body)


class PluginError(Exception):
    """An SDK's own class, with what most of them carry."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__("no")
        vars(self).update(attributes)


def caused_by(cause: BaseException, outer: Exception | None = None) -> Exception:
    error = outer or llm.ModelError("it failed")
    error.__cause__ = cause
    return error


def in_context_of(context: BaseException) -> Exception:
    error = RuntimeError("while handling")
    error.__context__ = context
    return error


CLASSIFIED: list[tuple[BaseException, str]] = [
    (openai_error(429), "throttled"),
    (openai_error(503), "throttled"),
    (PluginError(status_code=529), "throttled"),
    (openai_error(500), "transient"),
    (openai_error(502), "transient"),
    (openai_error(408), "transient"),
    (openai_error(501), "permanent"),
    (openai_error(401), "hopeless"),
    (openai_error(402), "hopeless"),
    (openai_error(403), "permanent"),
    (openai_error(400), "permanent"),
    (openai_error(404), "permanent"),
    (openai_error(422), "permanent"),
    (openai_error(429, code="insufficient_quota"), "hopeless"),
    (openai.APIConnectionError(request=REQUEST), "transient"),
    (openai.APITimeoutError(request=REQUEST), "transient"),
    (openai.APIError("x", REQUEST, body={"code": "rate_limit_exceeded"}), "throttled"),
    (openai.APIError("x", REQUEST, body={"type": "server_error"}), "transient"),
    (openai.APIError("x", REQUEST, body={"code": "content_filter"}), "permanent"),
    (PluginError(status=503), "throttled"),
    (PluginError(code=500), "transient"),
    (PluginError(response=SimpleNamespace(status_code=429, headers={})), "throttled"),
    (PluginError(status_code=True), "permanent"),
    (PluginError(status_code=200), "permanent"),
    (httpx2.ReadTimeout("x"), "transient"),
    (httpx2.ConnectError("x"), "transient"),
    (httpx2.RemoteProtocolError("x"), "transient"),
    (httpx2.UnsupportedProtocol("x"), "permanent"),
    (httpx.ReadError("x"), "transient"),
    (httpx.LocalProtocolError("x"), "permanent"),
    (ConnectionResetError(), "transient"),
    (TimeoutError(), "transient"),
    (OSError(101, "Network is unreachable"), "transient"),
    (FileNotFoundError("x"), "permanent"),
    (anyio.BrokenResourceError(), "transient"),
    (IncompleteAnswer("x"), "transient"),
    (llm.ModelError("the model would rather not"), "permanent"),
    # llm-gemini's words for 429, 503, 500 and a wrong key.
    (llm.ModelError("Resource has been exhausted (e.g. check quota)."), "throttled"),
    (llm.ModelError("The model is overloaded. Please try again later."), "throttled"),
    (llm.ModelError("An internal error has occurred. Please retry."), "transient"),
    (llm.ModelError("API key not valid. Please pass a valid API key."), "hopeless"),
    (llm.NeedsKeyException("no key"), "hopeless"),
    (ValueError("x"), "permanent"),
    (KeyboardInterrupt(), "permanent"),
    (caused_by(openai_error(429)), "throttled"),
    (caused_by(httpx.ConnectTimeout("x")), "transient"),
    (caused_by(caused_by(openai_error(500))), "transient"),
    (in_context_of(ConnectionResetError()), "transient"),
    (ExceptionGroup("two", [ValueError(), openai_error(429)]), "throttled"),
    (json.JSONDecodeError("what a model wrote", "{", 0), "permanent"),
]


@pytest.mark.parametrize(
    ("error", "kind"),
    CLASSIFIED,
    ids=[f"{number}-{type(error).__name__}" for number, (error, _) in enumerate(CLASSIFIED)],
)
def test_classification(error: BaseException, kind: str) -> None:
    assert classify(error).kind == kind


def test_the_outermost_that_tells_something_decides() -> None:
    # A plugin that says 400 because of a connection's end knows better.
    assert classify(caused_by(ConnectionResetError(), PluginError(status_code=400))).kind == "permanent"


def test_a_suppressed_context_tells_nothing() -> None:
    error = in_context_of(ConnectionResetError())
    error.__suppress_context__ = True
    assert classify(error).kind == "permanent"


def test_a_chain_that_bites_its_own_tail() -> None:
    first, second = RuntimeError(), RuntimeError()
    first.__context__, second.__context__ = second, first
    assert classify(first).kind == "permanent"


def test_broken_json_from_the_wire_is_transient() -> None:
    def read_by(module: str) -> Callable[[], Any]:
        namespace: dict[str, Any] = {"__name__": module, "json": json}
        exec("def read(): return json.loads('{')", namespace)
        read: Callable[[], Any] = namespace["read"]
        return read

    for module, kind in (("openai._streaming", "transient"), ("llm.default_plugins", "permanent")):
        with pytest.raises(json.JSONDecodeError) as caught:
            read_by(module)()
        assert classify(caught.value).kind == kind


def test_words_of_a_plugin_may_say_how_long_to_wait() -> None:
    error = llm.ModelError("You exceeded your current quota, please check your plan. Please retry in 34.5s.")
    assert classify(error) == Failure("throttled", 34.5)


def test_what_a_plugins_words_were_made_from_counts_for_more() -> None:
    error = llm.ModelError("422: the server is overloaded with nonsense")
    error.__cause__ = openai_error(422)
    assert classify(error).kind == "permanent"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": "2"}, 2.0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00"}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(headers) == seconds


def test_retry_after_as_a_date() -> None:
    moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)
    seconds = retry_after_seconds({"retry-after": format_datetime(moment, usegmt=True)})
    assert seconds is not None
    # A date has whole seconds.
    assert 30 < seconds <= 60


def test_retry_after_of_an_error() -> None:
    assert classify(openai_error(429, {"retry-after-ms": "1500"})).retry_after == 1.5
    assert classify(openai_error(500, {"Retry-After": "3"})).retry_after == 3
    assert classify(PluginError(status_code=429, headers={"retry-after": "4"})).retry_after == 4
    assert classify(caused_by(openai_error(429, {"retry-after": "5"}))).status == 429


class Calls:
    """A model call that fails so many times, and the retry loop around it as prompts use it."""

    def __init__(self, *errors: Exception, seconds: float = 0.0) -> None:
        self.errors = list(errors)
        self.seconds = seconds
        self.at: list[float] = []
        self.retries = 0

    def count(self) -> None:
        self.retries += 1

    async def run(self, policy: RetryPolicy) -> str:
        began = anyio.current_time()
        async for attempt in retrying(policy, on_retry=self.count):
            with attempt:
                self.at.append(anyio.current_time() - began)
                await anyio.sleep(self.seconds)
                if self.errors:
                    raise self.errors.pop(0)
                return "answer"
        raise AssertionError("the loop ends with an answer or an error")


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


with_notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since 3.11")


async def test_a_transient_failure_is_retried_after_a_growing_jittered_wait() -> None:
    calls = Calls(*[ConnectionResetError() for _ in range(4)])
    assert await calls.run(RetryPolicy()) == "answer"
    waits = [later - sooner for sooner, later in zip(calls.at, calls.at[1:], strict=False)]
    assert calls.retries == 4
    assert 0.05 <= waits[0] <= 0.2
    assert all(0.25 * 2**number <= wait <= 0.25 * 2**number + 0.5 for number, wait in enumerate(waits[1:], 1))


async def test_retry_after_is_waited_for_exactly() -> None:
    calls = Calls(openai_error(429, {"retry-after": "7"}), openai_error(500, {"retry-after-ms": "1500"}))
    assert await calls.run(RetryPolicy()) == "answer"
    assert calls.at == pytest.approx([0, 7, 8.5])


async def test_a_refusal_without_retry_after_is_left_to_the_throttle() -> None:
    calls = Calls(openai_error(429))
    assert await calls.run(RetryPolicy()) == "answer"
    assert calls.at == pytest.approx([0, 0])


async def test_a_prompt_that_is_refused_again_and_again_waits_a_little_in_between() -> None:
    calls = Calls(*(openai_error(429) for _ in range(5)))
    assert await calls.run(RetryPolicy()) == "answer"
    waits = [later - sooner for sooner, later in zip(calls.at, calls.at[1:], strict=False)]
    assert waits[0] == 0
    assert all(0.1 <= wait <= 0.4 for wait in waits[1:])


@pytest.mark.parametrize("error", [openai_error(401), openai_error(400), ValueError(), llm.ModelError("no")])
async def test_a_permanent_failure_is_raised_at_once_as_it_is(error: Exception) -> None:
    calls = Calls(error)
    with pytest.raises(type(error)) as caught:
        await calls.run(RetryPolicy())
    assert caught.value is error
    assert (len(calls.at), calls.retries, notes(error)) == (1, 0, "")


async def test_the_last_failure_is_raised_when_the_attempts_are_used_up() -> None:
    errors = [openai_error(500) for _ in range(9)]
    calls = Calls(*errors)
    with pytest.raises(openai.InternalServerError) as caught:
        await calls.run(RetryPolicy(attempts=3))
    assert caught.value is errors[2]
    assert (len(calls.at), calls.retries) == (3, 2)


@with_notes
async def test_what_is_given_up_says_how_long_it_was_tried() -> None:
    calls = Calls(*[openai_error(429, {"retry-after": "2"}) for _ in range(9)])
    with pytest.raises(openai.RateLimitError) as caught:
        await calls.run(RetryPolicy(attempts=3))
    assert notes(caught.value) == "gave up after 3 attempts in 4.0 seconds"


async def test_the_time_of_all_attempts_and_waits_is_bounded() -> None:
    calls = Calls(*[openai_error(500) for _ in range(99)], seconds=20)
    began = anyio.current_time()
    with pytest.raises(openai.InternalServerError):
        await calls.run(RetryPolicy(attempts=99, timeout=50))
    assert 50 <= anyio.current_time() - began <= 75
    assert len(calls.at) == 3


async def test_retry_after_of_an_hour_fails_at_once() -> None:
    calls = Calls(openai_error(429, {"retry-after": "3600"}))
    began = anyio.current_time()
    with pytest.raises(openai.RateLimitError) as caught:
        await calls.run(RetryPolicy())
    assert anyio.current_time() == began
    if sys.version_info >= (3, 11):
        assert "asks to wait 3600 seconds" in notes(caught.value)
        assert "the 120 that a prompt may take" in notes(caught.value)


async def test_the_time_counts_from_when_the_first_attempt_began() -> None:
    started = anyio.current_time()
    await anyio.sleep(100)

    async def run() -> None:
        async for attempt in retrying(RetryPolicy(timeout=120), started=started):
            with attempt:
                raise openai_error(429, {"retry-after": "30"})

    with pytest.raises(openai.RateLimitError):
        await run()
    assert anyio.current_time() - started == 100


async def test_waiting_for_a_slot_is_bounded_too() -> None:
    error = openai_error(429)
    began = anyio.current_time()

    async def run() -> None:
        async for attempt in retrying(RetryPolicy(timeout=30)):
            with attempt:
                if attempt.number == 1:
                    raise error
                await attempt.wait(anyio.sleep_forever)

    with pytest.raises(openai.RateLimitError) as caught:
        await run()
    assert caught.value is error
    assert anyio.current_time() - began == pytest.approx(30)
    if sys.version_info >= (3, 11):
        assert notes(error) == "gave up after 1 attempt in 30.0 seconds"


async def test_cancellation_is_no_failure() -> None:
    reached = False
    with anyio.CancelScope() as scope:
        async for attempt in retrying(RetryPolicy()):
            with attempt:
                scope.cancel()
                await anyio.sleep(1)
            reached = True
    assert scope.cancelled_caught
    assert not reached


async def test_the_wait_between_attempts_can_be_cancelled() -> None:
    began = anyio.current_time()
    with anyio.move_on_after(5):
        async for attempt in retrying(RetryPolicy()):
            with attempt:
                raise openai_error(429, {"retry-after": "60"})
    assert anyio.current_time() - began == pytest.approx(5)


async def test_stamina_logs_nothing_about_single_prompts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await Calls(openai_error(500), openai_error(429)).run(RetryPolicy())
    assert [record for record in caplog.records if record.name == "stamina"] == []


def chat_response(json_: Any, *, stream: bool = True, model: Any = None) -> llm.AsyncResponse:
    model = model or AsyncChat("m")
    response = llm.AsyncResponse(llm.Prompt("hi", model), model, stream=stream)
    response.response_json = json_
    return response


COMPLETE = {"content": "x", "role": "assistant", "finish_reason": "stop", "usage": {}}
TORN = {"content": "x", "role": "assistant", "usage": {}}


@pytest.mark.parametrize("json_", [TORN, {}, None])
async def test_a_torn_stream_is_found_out(json_: Any) -> None:
    with pytest.raises(IncompleteAnswer):
        check_complete(chat_response(json_))


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
async def test_a_stream_with_a_finish_reason_is_complete(reason: str) -> None:
    check_complete(chat_response(COMPLETE | {"finish_reason": reason}))


async def test_an_unstreamed_answer_is_never_doubted() -> None:
    check_complete(chat_response({"choices": []}, stream=False))


async def test_other_models_are_never_doubted() -> None:
    class Other(llm.AsyncModel):
        model_id = "other"
        can_stream = True

        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Any:
            yield "x"

    class OwnStream(AsyncChat):
        async def execute(self, *args: Any, **kwargs: Any) -> Any:
            yield "x"

    own: Any = OwnStream
    for model in (Other(), own("m")):
        for json_ in (None, {}, TORN):
            check_complete(chat_response(json_, model=model))


@pytest.mark.parametrize(
    ("plugin", "installed", "is_doubted"),
    [("llm_mistral", "0.16", True), ("llm_mistral", "0.15", False), ("llm_ollama", "0.16.2", False)],
)
async def test_plugins_too_old_to_keep_anything_of_a_stream_are_not_doubted(
    plugin: str, installed: str, is_doubted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: installed)
    kind: Any = type("Model", (AsyncChat,), {"__module__": plugin})
    with pytest.raises(IncompleteAnswer) if is_doubted else nullcontext():
        check_complete(chat_response(None, model=kind("m")))


async def test_events_that_were_kept_one_by_one_say_the_end_too() -> None:
    kind: Any = type("Model", (AsyncChat,), {"__module__": "llm_gemini"})
    events: list[Any] = [
        {"candidates": [{"content": {}}]},
        {"candidates": [{"finishReason": "STOP"}]},
        {"usageMetadata": {}},
    ]
    check_complete(chat_response(events, model=kind("m")))
    with pytest.raises(IncompleteAnswer):
        check_complete(chat_response(events[:1], model=kind("m")))


async def test_the_responses_interface() -> None:
    model = AsyncResponses("m")
    check_complete(chat_response({"status": "completed"}, model=model))
    with pytest.raises(IncompleteAnswer):
        check_complete(chat_response(None, model=model))


def test_flex_processing_without_room_is_waited_for() -> None:
    body = {"message": "Resource unavailable", "type": "resource_unavailable", "code": "resource_unavailable"}
    request = httpx2.Request("POST", "http://localhost/v1/chat/completions")
    answer = httpx2.Response(429, request=request, json={"error": body})
    failure = classify(openai.RateLimitError("429 Resource unavailable", response=answer, body=body))
    assert (failure.kind, failure.reason) == ("throttled", None)


@with_notes
async def test_a_failure_after_the_time_is_over_is_not_told_as_a_wait_that_nobody_asked_for() -> None:
    calls = Calls(openai_error(500), seconds=20)
    with pytest.raises(openai.InternalServerError) as caught:
        await calls.run(RetryPolicy(timeout=10))
    assert notes(caught.value) == "gave up after 1 attempt in 20.0 seconds"


async def test_the_first_attempt_waits_for_its_slot_as_long_as_it_takes() -> None:
    began = anyio.current_time()
    async for attempt in retrying(RetryPolicy(timeout=30)):
        with attempt:
            await attempt.wait(partial(anyio.sleep, 1000))
    assert anyio.current_time() - began == pytest.approx(1000)

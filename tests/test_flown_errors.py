"""Errors that come from another process: they mean, and print, what was raised there."""

from __future__ import annotations

import json
import ssl
from typing import Any

import anyio
import httpx
import llm
import openai
import pytest

from datasette_llm._compat import ExceptionGroup
from datasette_llm.calls.failures import classify, words_of
from datasette_llm.calls.http_answers import HttpAnswers
from datasette_llm.calls.remote.flown_errors import arrived, flight_of
from datasette_llm.calls.trouble import trouble_of
from datasette_llm.calls.wording import UnusableAnswer

from .provider_errors import HOPELESS, OTHERS, AnthropicError, OllamaError, error, http_error, openai_error


def flown(original: BaseException) -> Exception:
    return arrived(json.loads(json.dumps(flight_of(original))))


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def broken_json() -> Exception:
    try:
        httpx.Response(200, content=b"{").json()
    except ValueError as error:
        return error
    raise AssertionError


def answered(error: Exception) -> Exception:
    answer = HttpAnswers()
    answer.tell(429, {"retry-after": "7"})
    answer.attach(error)
    return error


REQUEST = httpx.Request("POST", "http://provider.invalid:81/v1?key=secret")
ERRORS: list[Exception] = [
    openai_error(429, error("slow down", "rate_limit_exceeded"), {"retry-after": "12"}),
    openai_error(500, error("oops")),
    openai_error(401, error("Incorrect API key provided", "invalid_api_key")),
    openai_error(400, error("flagged", "content_filter")),
    openai.APIConnectionError(request=REQUEST),  # type: ignore[arg-type]
    caused(openai.APITimeoutError(request=REQUEST), httpx.ReadTimeout("slow", request=REQUEST)),  # type: ignore[arg-type]
    AnthropicError(529, "overloaded_error", "Overloaded"),
    OllamaError(404, "model 'x' not found, try pulling it first"),
    http_error(503, {"detail": "loading"}),
    http_error(429, {"detail": "later"}, read=False),
    httpx.ConnectError("All connection attempts failed", request=REQUEST),
    caused(httpx.ConnectError("failed"), ssl.SSLCertVerificationError(1, "certificate verify failed")),
    ConnectionRefusedError(111, "Connection refused"),
    FileNotFoundError(2, "No such file"),
    TimeoutError("the model did not answer"),
    anyio.BrokenResourceError(),
    llm.NeedsKeyException("No key found"),
    llm.ModelError("Resource has been exhausted (e.g. check quota)."),
    UnusableAnswer("the provider answered with an error: x", code=429, body={"message": "x"}),
    broken_json(),
    json.JSONDecodeError("Expecting value", "{", 1),
    answered(ValueError("hidden by its SDK")),
    ExceptionGroup("several", [ValueError("a"), openai_error(502, error("bad gateway"))]),
    KeyError("choices"),
]


@pytest.mark.parametrize(
    "original", [pytest.param(each, id=f"{n} {type(each).__name__}") for n, each in enumerate(ERRORS)]
)
def test_an_error_from_a_worker_is_read_and_printed_as_here(original: Exception) -> None:
    there = flown(original)
    failure = classify(original)
    assert classify(there) == failure
    assert trouble(there) == trouble(original)
    assert str(there) == str(original)
    assert type(there).__name__ == type(original).__name__
    assert words_of(there) == words_of(original)


def trouble(error: Exception) -> Any:
    found = trouble_of(error, classify(error))
    return found and (found.what, found.address, found.alone, found.silent, found.answered)


@pytest.mark.parametrize("name", [*HOPELESS, *OTHERS])
def test_what_no_other_prompt_escapes_is_still_known(name: str) -> None:
    original, _ = {**HOPELESS, **OTHERS}[name]
    here, there = classify(original), classify(flown(original))
    assert (there.kind, there.status, there.reason) == (here.kind, here.status, here.reason)
    assert there.retry_after == pytest.approx(here.retry_after)


def test_a_known_class_catches_it_and_an_unknown_one_is_there_in_name() -> None:
    with pytest.raises(openai.RateLimitError) as caught:
        raise flown(openai_error(429, error("slow down"), {"retry-after": "1"}))
    assert caught.value.response.headers.get("Retry-After") == "1"
    unknown = type("Strange", (ConnectionError,), {"__module__": "some.sdk"})("gone")
    there = flown(unknown)
    assert isinstance(there, ConnectionError)
    assert (type(there).__module__, type(there).__qualname__) == ("some.sdk", "Strange")


class Insists(Exception):
    """Cannot be made without its argument."""

    def __new__(cls, *arguments: object) -> Insists:
        if not arguments:
            raise TypeError("an argument is missing")
        return super().__new__(cls, *arguments)


class Broken(Exception):
    """Cannot even be printed."""

    @property
    def status(self) -> int:
        raise RuntimeError("never set")

    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Dumped:
    def model_dump(self) -> dict[str, int]:
        return {"k": 1}


def test_errors_that_resist_cross_all_the_same() -> None:
    there = flown(Insists("words"))
    assert (type(there).__name__, str(there), repr(there)) == ("Insists", "words", "Insists('words')")
    assert not isinstance(there, Insists)
    there = flown(Broken())
    assert isinstance(there, Broken)
    assert (str(there), repr(there)) == ("Broken", "Broken()")


def test_an_errors_body_notes_and_context_cross() -> None:
    error = ValueError("outer")
    error.body = {"a": [1, b"x", Dumped()], "b": object()}  # type: ignore[attr-defined]
    setattr(error, "__notes__", ["a note"])  # noqa: B010 - older Pythons do not know it
    error.__context__ = KeyError("inner")
    there: Any = flown(error)
    assert there.body == {"a": [1, "x", {"k": 1}], "b": None}
    assert isinstance(there.__context__, KeyError)
    if hasattr(there, "add_note"):
        assert there.__notes__ == ["a note"]

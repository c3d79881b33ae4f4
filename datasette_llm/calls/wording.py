"""Answers that are none, in words.

A provider that sends something else than its protocol says makes an SDK, or llm, stumble: a KeyError in a
person's table says nothing. ``in_words()`` says what came, with the original as the cause. A bug in a
model that somebody wrote is left as it is.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import llm

if TYPE_CHECKING:
    from types import FrameType

#: Characters of an answer that are quoted.
QUOTED = 200


class UnusableAnswer(llm.ModelError):
    """The provider answered, and what it answered is no answer.

    Attributes:
        code: the code or type that the provider gave, a string or an HTTP status.
        body: the error object that it sent.
    """

    def __init__(self, message: str, *, code: str | int | None = None, body: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = body


def quoted(value: Any) -> str:
    """Return the beginning of what came, on one line."""
    if isinstance(value, bytes):
        text = value.decode("utf-8", "replace")
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):
            text = repr(value)
    text = " ".join(text[: 4 * QUOTED].split())
    # What can be stored and shown anywhere.
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def error_of(body: Any, *, where: str = "") -> UnusableAnswer:
    """Return the error for an error object that arrived where an answer was expected."""
    code: str | int | None = None
    message: Any = None
    dump = getattr(body, "model_dump", None)
    if dump is not None:
        body = dump(exclude_none=True)
    if isinstance(body, dict):
        message = body.get("message") or body.get("detail")
        code = _code(body)
    words = message if isinstance(message, str) and message else quoted(body)
    return UnusableAnswer(f"the provider answered with an error{where}: {words}", code=code, body=body)


def _code(body: dict[str, Any]) -> str | int | None:
    """The first of code, type and status that says something to `classify()`."""
    found: str | int | None = None
    for name in ("code", "status", "type"):
        value = body.get(name)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if 400 <= value < 600:
                return value
        elif isinstance(value, str) and value:
            found = found or value
    return found


#: What code raises that expects something else; not what stems from these, which somebody named.
_STUMBLES = frozenset(
    {AttributeError, IndexError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError}
)

#: Top-level modules of SDKs; plugins of llm are called ``llm_...`` by convention.
_SDKS = frozenset({"llm", "openai", "anthropic", "groq", "mistralai", "ollama", "google", "cohere"})
#: What these use to read an answer: who called it is to be looked at.
_READERS = frozenset({"json", "pydantic", "pydantic_core", "ijson", "httpx", "httpx2", "codecs", "typing"})
_STANDARD = sys.stdlib_module_names


def in_words(error: BaseException, observed: llm.AsyncResponse) -> BaseException:
    """Return an error as a person can read it.

    Args:
        error: what a model call raised.
        observed: the response it was for.

    Returns:
        an ``UnusableAnswer`` whose cause is the error, if an SDK, llm or a plugin of llm's stumbled over
        something; any other error as it is.
    """
    if type(error) not in _STUMBLES and type(error).__name__ != "ValidationError":
        return error
    stumbled = _who_stumbled(error)
    if stumbled is None:
        return error
    what = " ".join(str(error).split())
    words = f"{stumbled} can make nothing of the provider's answer, or of this prompt"
    words += f" ({type(error).__name__}: {what[:QUOTED]})"
    kept = observed.response_json
    if kept:
        words += f": {quoted(kept)}"
    unusable = UnusableAnswer(words)
    unusable.__cause__ = error
    return unusable.with_traceback(error.__traceback__)


def _who_stumbled(error: BaseException) -> str | None:
    frames: list[FrameType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    for frame in reversed(frames):
        module = str(frame.f_globals.get("__name__", ""))
        top = module.partition(".")[0]
        if top in _SDKS or top.startswith("llm_"):
            return top
        if top not in _READERS and top not in _STANDARD:
            break
    return None

"""Exceptions as data: they arrive as something that is read, and prints, as what was raised.

Most SDKs' exceptions cannot be pickled, and their classes need not be known where they arrive. So an
exception crosses as the names of its classes, its words, and what `classify()` and `trouble_of()` read of
it. A class that the receiver has imported is the arrived one's base, so that ``except openai.RateLimitError``
catches it: whoever writes that has imported it. The others are made anew, in name.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..._compat import BaseExceptionGroup, ExceptionGroup
from .. import failures
from ..http_answers import HttpAnswers, answer_of

if TYPE_CHECKING:
    from collections.abc import Mapping

#: How deep causes are followed.
DEEPEST = 12
#: Characters of an error's words or of the answer it carries.
LONGEST = 20_000
#: Attributes in which SDKs and llm say what happened.
_ATTRIBUTES = (
    "status_code", "status", "http_status", "code", "type", "param", "body", "request_id", "errno",
    "retry_after",
)  # fmt: skip


class Arrived:
    """Mixed into what arrives: prints as what was raised."""

    _words: str
    _representation: str

    def __str__(self) -> str:
        return self._words

    def __repr__(self) -> str:
        return self._representation


class _Plain(Arrived, Exception):
    """Stands for a class whose exceptions cannot be made."""


def flight_of(error: BaseException, depth: int = 0) -> dict[str, Any]:
    """Return an exception, with its causes, as data that fits into JSON."""
    told: dict[str, Any] = {
        "classes": [[kind.__module__, kind.__qualname__] for kind in type(error).__mro__[:-1]],
        "words": _words(error)[:LONGEST],
        "repr": _repr(error)[:LONGEST],
    }
    attributes = {name: value for name in _ATTRIBUTES if (value := _attribute(error, name)) is not None}
    if attributes:
        told["attributes"] = attributes
    response = _response(error)
    if response:
        told["response"] = response
    address = _address(error)
    if address:
        told["address"] = address
    answer = answer_of(error)
    if answer is not None and answer.status is not None:
        told["answer"] = [answer.status, dict(answer.headers)]
    if failures.was_raised_in_sdk(error):
        told["in_sdk"] = True
    notes = getattr(error, "__notes__", None)
    if notes:
        told["notes"] = [str(note) for note in notes]
    if depth < DEEPEST:
        if isinstance(error, BaseExceptionGroup):
            told["members"] = [flight_of(each, depth + 1) for each in error.exceptions]
        if error.__cause__ is not None:
            told["cause"] = flight_of(error.__cause__, depth + 1)
        elif error.__context__ is not None and not error.__suppress_context__:
            told["context"] = flight_of(error.__context__, depth + 1)
    return told


def arrived(told: Mapping[str, Any]) -> Exception:
    """Return the exception that these data are."""
    members = told.get("members")
    if members:
        error: Any = ExceptionGroup(told["words"], [arrived(each) for each in members])
    else:
        kind = _class_of(told["classes"])
        try:
            error = kind.__new__(kind)
        except Exception:  # it insists on arguments
            error = _derived(_Plain, *told["classes"][0])()
        error.args = (told["words"],)
        error._words, error._representation = told["words"], told["repr"]
    for name, value in told.get("attributes", {}).items():
        _set(error, name, value)
    response = told.get("response")
    if response is not None:
        headers = _Headers(response["headers"])
        _set(error, "response", SimpleNamespace(**{**response, "headers": headers}))
    if "address" in told:
        host, port = told["address"]
        _set(error, "request", SimpleNamespace(url=SimpleNamespace(host=host, port=port)))
    if "answer" in told:
        answer = HttpAnswers()
        answer.tell(told["answer"][0], _Headers(told["answer"][1]))
        answer.attach(error)
    if told.get("in_sdk"):
        failures.note_raised_in_sdk(error)
    for note in told.get("notes", ()):
        add_note = getattr(error, "add_note", None)
        if add_note is not None:
            add_note(note)
    if "cause" in told:
        error.__cause__ = arrived(told["cause"])
    elif "context" in told:
        error.__context__ = arrived(told["context"])
    return error  # type: ignore[no-any-return]


class _Headers(dict[str, str]):
    """Headers found by a name in whatever case."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__({name.lower(): value for name, value in headers.items()})

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


def _class_of(names: list[list[str]]) -> Any:
    """Return a class with these names on the way up; the known ones are what they are."""
    made: list[list[str]] = []
    base: type[BaseException] = Exception
    for names_of_one in names:
        known = _known(*names_of_one)
        if known is not None:
            base = known
            break
        made.append(names_of_one)
    kind: Any = base
    for module, name in reversed(made):
        kind = _derived(kind, module, name)
    module, name = names[0]
    return type(name.rpartition(".")[2], (Arrived, kind), {"__module__": module, "__qualname__": name})


def _derived(base: type, module: str, name: str) -> Any:
    return type(name.rpartition(".")[2], (base,), {"__module__": module, "__qualname__": name})


def _known(module: str, name: str) -> type[Exception] | None:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    usable = isinstance(found, type) and issubclass(found, Exception)
    return found if usable and not issubclass(found, BaseExceptionGroup) else None


def _words(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return str(error.message)
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def _repr(error: BaseException) -> str:
    try:
        return repr(error)
    except Exception:
        return f"{type(error).__name__}()"


def _attribute(error: BaseException, name: str) -> Any:
    try:
        value = getattr(error, name, None)
    except Exception:
        return None
    return _data(value)


def _data(value: Any, depth: int = 0) -> Any:
    """Return what of a value is data, as far as it is some."""
    if isinstance(value, str):
        return value[:LONGEST]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, bytes):
        return value[:LONGEST].decode("utf-8", "replace")
    if depth < DEEPEST:
        if isinstance(value, dict):
            return {str(name): _data(part, depth + 1) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [_data(part, depth + 1) for part in value]
        dump = getattr(value, "model_dump", None)
        if dump is not None and not isinstance(value, type):
            return _data(dump(), depth + 1)
    return None


def _response(error: BaseException) -> dict[str, Any] | None:
    try:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None) or getattr(response, "status", None)
        if not isinstance(status, int):
            return None
        told: dict[str, Any] = {"status_code": status, "headers": dict(response.headers)}  # type: ignore[union-attr]
    except Exception:
        return None
    try:
        told["text"] = str(response.text)[:LONGEST]  # type: ignore[union-attr]
    except Exception:  # httpx: a streamed answer that nobody has read
        told["text"] = None
    return told


def _address(error: BaseException) -> list[Any] | None:
    """Host and port of the request that failed: nothing else of its URL, which may hold a key."""
    try:
        url = error.request.url  # type: ignore[attr-defined]
    except Exception:
        return None
    host, port = getattr(url, "host", None), getattr(url, "port", None)
    return [host, port if isinstance(port, int) else None] if isinstance(host, str) and host else None


def _set(error: Any, name: str, value: Any) -> None:
    try:
        setattr(error, name, value)
    except Exception:
        # A property without a setter: what it is made of has been set, or it says nothing.
        pass

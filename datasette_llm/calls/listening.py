"""A client of the OpenAI make that listens: what servers that only look like OpenAI send is set right.

llm's models, and plugins whose SDK is of the same make, read an answer as OpenAI's own servers send it. Some
servers leave out the usage, send no choices, an error with status 200, content in parts, or plain JSON where
a stream was asked for. A ``Listening`` client hands on what it is given, mended where the meaning is clear,
and says in words what came where it is not. What llm drops of an answer is noted on the response.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast, get_args

from ..responses.finish import note
from .heard_stream import HeardStream
from .plain_body import past_the_walk
from .wording import UnusableAnswer, error_of, quoted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable

    import llm

#: The response that the model call of this task is for.
_current: ContextVar[llm.AsyncResponse | None] = ContextVar("datasette_llm_listening", default=None)


def listen_for(response: llm.AsyncResponse | None) -> None:
    """Have what is heard in this task noted on a response; with ``None`` on no one."""
    _current.set(response)


def listening(client: Any) -> Any:
    """Return a client of the OpenAI make that listens. Holds the client as long as it lives itself."""
    return _Client(client, ())


#: The calls that a listening client listens to.
_CALLS: dict[tuple[str, ...], Callable[[Any, Any], Any]] = {}


class _Path:
    """A client, or a part of it on the way to a call that is listened to; the rest is the client's own."""

    __slots__ = ("_names", "_part")

    def __init__(self, part: Any, names: tuple[str, ...]) -> None:
        self._part = part
        self._names = names

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        names = (*self._names, name)
        if names in _ON_THE_WAY:
            return _Path(value, names)
        hear = _CALLS.get(names)
        if hear is None:
            return value
        # The client may be a lease, which lasts as long as somebody holds it.
        return _Call(value, hear, self)


class _Client(_Path):
    """The client itself, as whoever checks, enters or closes it sees it."""

    __slots__ = ()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._part.__class__

    async def __aenter__(self) -> _Client:
        await self._part.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._part.__aexit__(*exception)


class _Call:
    __slots__ = ("_create", "_hear", "_holder")

    def __init__(self, create: Any, hear: Callable[[Any, Any], Any], holder: _Path) -> None:
        self._create = create
        self._hear = hear
        self._holder = holder

    async def __call__(self, **kwargs: Any) -> Any:
        return self._hear(await self._create(**past_the_walk(kwargs)), kwargs)


# Chat completions


def _hear_chat(answer: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("stream"):
        return HeardStream(answer, _chat_chunks, _chat_chunk_of)
    return _completion(answer)


def _completion(answer: Any) -> Any:
    """Check an unstreamed completion, and set right what is clear."""
    _check_object(answer)
    choices = getattr(answer, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise _nothing("choices" if not choices else "a message", answer)
    message = choices[0].message
    if isinstance(message.content, list):
        message.content = _joined(message.content)
    response = _current.get()
    if response is not None:
        note(response, "chat", choices[0].finish_reason, getattr(message, "refusal", None))
    if getattr(answer, "usage", None) is None:
        answer.usage = _no_usage(cast("Hashable", type(answer)))
    return answer


@functools.cache
def _no_usage(kind: Any) -> Any:
    """What stands for a usage that was left out: whoever asks for its dump gets an empty one."""
    hint = kind.model_fields["usage"].annotation
    of = next((each for each in (hint, *get_args(hint)) if hasattr(each, "model_construct")), None)
    if of is None:
        return None
    usage = of.__new__(of)
    for name, value in (
        ("__dict__", {}),
        ("__pydantic_fields_set__", set()),
        ("__pydantic_extra__", {}),
        ("__pydantic_private__", None),
    ):
        object.__setattr__(usage, name, value)
    return usage


async def _chat_chunks(stream: HeardStream) -> AsyncIterator[Any]:
    refusal: list[str] = []
    reason = None
    async for chunk in stream.events():
        if getattr(chunk, "choices", None) is None:
            error = _extra(chunk, "error")
            if error:
                raise error_of(error, where=" in the middle of its stream")
            chunk.choices = []
        for choice in chunk.choices:
            reason = getattr(choice, "finish_reason", None) or reason
        # One without a delta says no more than that; llm asks each for its delta.
        chunk.choices = [choice for choice in chunk.choices if getattr(choice, "delta", None) is not None]
        for choice in chunk.choices:
            delta = choice.delta
            if isinstance(delta.content, list):
                delta.content = _joined(delta.content)
            if getattr(delta, "refusal", None):
                refusal.append(delta.refusal)
        yield chunk
    if reason is None and stream.said_done:
        # It never says why, but it does say that this was all.
        reason = "unknown"
    response = _current.get()
    if response is not None:
        note(response, "chat", reason, "".join(refusal) or None)


def _joined(parts: list[Any]) -> str:
    """The text of content in parts; thoughts and the like are no part of an answer."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        text = part.get("text") if isinstance(part, dict) else getattr(part, "text", None)
        if isinstance(text, str):
            texts.append(text)
    return "".join(texts)


def _chat_chunk_of(body: dict[str, Any], stream: Any) -> list[Any]:
    """The one chunk that an unstreamed completion is."""
    from openai.types.chat import ChatCompletionChunk

    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _nothing("choices", body)
    choice = choices[0]
    message = dict(choice.get("message") or {})
    for index, call in enumerate(message.get("tool_calls") or []):
        call.setdefault("index", index)
    chunk = {key: body.get(key) for key in ("id", "created", "model", "usage")}
    chunk["object"] = "chat.completion.chunk"
    chunk["choices"] = [{"index": 0, "delta": message, "finish_reason": choice.get("finish_reason")}]
    kind: Any = getattr(stream, "_cast_to", ChatCompletionChunk)
    return [kind.construct(**chunk)]


# Responses


def _hear_responses(answer: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("stream"):
        return HeardStream(answer, _response_events, _response_events_of)
    _check_object(answer)
    if not isinstance(getattr(answer, "output", None), list):
        raise _nothing("output", answer)
    _check_status(answer)
    return answer


async def _response_events(stream: HeardStream) -> AsyncIterator[Any]:
    async for event in stream.events():
        kind = getattr(event, "type", None)
        if kind == "response.incomplete":
            # llm keeps what there is at the end of an answer that is complete, and only then.
            yield SimpleNamespace(type="response.completed", response=event.response)
            continue
        if kind == "response.failed":
            _check_status(event.response)
        if kind == "error":
            body = {name: getattr(event, name, None) for name in ("code", "message", "type")}
            raise error_of(body, where=" in the middle of its stream")
        yield event


def _check_status(response: Any) -> None:
    if getattr(response, "status", None) in ("failed", "cancelled"):
        error = getattr(response, "error", None)
        raise error_of(error or {"message": f"the response has {response.status}"})


def _response_events_of(body: dict[str, Any], stream: Any) -> list[Any]:
    """The events that an unstreamed response is."""
    from openai.types.responses import Response

    response = Response.construct(**body)
    if not isinstance(response.output, list):
        raise _nothing("output", body)
    events: list[Any] = []
    for item in response.output:
        events.append(SimpleNamespace(type="response.output_item.added", item=item))
        events += [
            SimpleNamespace(type="response.output_text.delta", delta=part.text)
            for part in getattr(item, "content", None) or []
            if getattr(part, "type", None) == "output_text"
        ]
        events.append(SimpleNamespace(type="response.output_item.done", item=item))
    status = "failed" if response.status == "failed" else "completed"
    return [*events, SimpleNamespace(type=f"response.{status}", response=response)]


_CALLS |= {("chat", "completions", "create"): _hear_chat, ("responses", "create"): _hear_responses}
_ON_THE_WAY = frozenset(names[:length] for names in _CALLS for length in range(1, len(names)))


# Both


def _check_object(answer: Any) -> None:
    """Make sure that what an SDK returned is the object that was asked for."""
    if isinstance(answer, (str, bytes)):
        # What SDKs of this make return for a body that does not call itself JSON.
        raise UnusableAnswer(f"the provider answered with no JSON: {quoted(answer)}")
    if answer is None or not hasattr(answer, "model_dump"):
        raise UnusableAnswer(f"the provider answered with no object: {quoted(answer)}")
    error = _extra(answer, "error")
    if error and not getattr(answer, "status", None):
        raise error_of(error)


def _extra(answer: Any, name: str) -> Any:
    """A key that the protocol does not have there."""
    return getattr(answer, name, None) or (getattr(answer, "model_extra", None) or {}).get(name)


def _nothing(what: str, answer: Any) -> UnusableAnswer:
    if hasattr(answer, "model_dump"):
        answer = answer.model_dump(exclude_unset=True, warnings=False)
    return UnusableAnswer(f"the provider answered without {what}: {quoted(answer)}")

"""What a test has a provider answer, and what goes over the wire for it."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .server import Request


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model calls."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the model says, in no provider's words but for ``finish``.

    Args:
        text: what it wrote; ``None`` is no content at all.
        finish: why it stopped, as that provider says it; ``None`` is a null or an absent field, ``"usual"``
            the family's word for an answer that is whole.
        usage: tokens of the prompt and of the answer; ``None`` sends no usage.
        refusal: what a model that refuses says for it, where the protocol has a place for that.
        reasoning: what it thought.
        tool_calls: what it calls.
        blocked: Gemini's ``promptFeedback.blockReason``: no candidate at all.
        status: an HTTP status of 400 or more sends the error instead.
        message: the error's text.
        code: the error's code or type, where the protocol has one.
        headers: additional ones, rate limits for instance.
        delay: seconds before it begins.
        pieces: how many pieces of a streamed text there are.
        gap: seconds between two of them.
    """

    text: str | None = "hello from the model"
    finish: str | None = "usual"
    usage: tuple[int, int] | None = (3, 5)
    refusal: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    blocked: str | None = None
    status: int = 200
    message: str = "the provider is unwell"
    code: str = "server_error"
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    pieces: int = 3
    gap: float = 0.0

    def cut(self) -> list[str]:
        """The text, in pieces."""
        text = self.text or ""
        count = max(1, min(self.pieces, len(text)))
        return [
            text[number * len(text) // count : (number + 1) * len(text) // count] for number in range(count)
        ]


@dataclass(frozen=True)
class Raw:
    """What goes over the wire: for a server that speaks its protocol in a way of its own.

    Args:
        body: all of it, or the pieces of a chunked one.
        then: whether the connection is kept, closed, or left hanging afterwards.
    """

    body: bytes | str | list[bytes]
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    gap: float = 0.0
    then: Literal["keep", "close", "hang"] = "keep"


class Protocol:
    """How one provider family speaks, and which model of which plugin speaks it.

    Attributes:
        usual: the family's word for an answer that is whole.
    """

    usual = "stop"

    def finish(self, answer: Answer) -> str | None:
        """The reason to send, in the family's word."""
        return self.usual if answer.finish == "usual" else answer.finish

    def prompt(self, request: Request) -> str:
        """The last thing that the user said."""
        content = request.json["messages"][-1]["content"]
        if isinstance(content, str):
            return content
        return "".join(part.get("text", "") for part in content)

    def render(self, answer: Answer, request: Request) -> Raw:
        """Say it on the wire."""
        raise NotImplementedError

    def error(self, answer: Answer) -> Any:
        """The body of an answer with an error's status."""
        return {"error": {"message": answer.message, "type": answer.code, "code": answer.code}}

    def model(self, url: str, **options: Any) -> Any:
        """Make the plugin's own async model; the test is skipped if it is not installed."""
        raise NotImplementedError

    def pointed_at(self, url: str) -> AbstractContextManager[None]:
        """Have whatever the plugin's constructor does not take point to this server."""
        return nullcontext()


def whole(value: Any, answer: Answer, content_type: str = "application/json") -> Raw:
    """An unstreamed answer of JSON."""
    return Raw(json.dumps(value), content_type, answer.status, answer.headers, answer.delay)


def events(values: Iterable[Any], answer: Answer, *, named: bool = False, done: bool = True) -> Raw:
    """A stream of server-sent events.

    Args:
        named: put each value's ``type`` in an ``event:`` line, too.
        done: end with ``[DONE]``.
    """
    parts = []
    for value in values:
        name = f"event: {value['type']}\n" if named else ""
        parts.append(f"{name}data: {json.dumps(value)}\n\n".encode())
    if done:
        parts.append(b"data: [DONE]\n\n")
    return Raw(parts, "text/event-stream", 200, answer.headers, answer.delay, answer.gap)

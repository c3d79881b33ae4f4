"""An answer as data: what llm's response holds when a model's `execute()` has ended."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

from llm.models import ToolCall

from ...responses import finish

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import llm

#: What plugins set on a response, and llm keeps or shows.
_KEPT = ("response_json", "resolved_model", "input_tokens", "output_tokens", "token_details", "_prompt_json")


def answer_of(response: llm.AsyncResponse, sent: int = 0) -> dict[str, Any]:
    """Return a complete response as data that fits into JSON.

    Args:
        sent: so many of its events have been sent already.
    """
    told: dict[str, Any] = {"events": events_of(response._stream_events[sent:], first=sent == 0)}
    for name in _KEPT:
        value = getattr(response, name, None)
        if value is not None:
            told[name] = value
    if response._tool_calls:
        told["tool_calls"] = [[call.name, call.arguments, call.tool_call_id] for call in response._tool_calls]
    noted = finish.noted(response)
    if noted is not None:
        told["said"] = list(noted)
    return told


def events_of(events: Iterable[Any], *, first: bool) -> list[Any]:
    """Return events as data: the text itself where that is all there is to them.

    Args:
        first: whether they are the first ones of their answer.
    """
    told: list[Any] = []
    for event in events:
        if first and _is_plain(event):
            told.append(event.chunk)
        else:
            first = False
            told.append(
                {
                    name: value
                    for name, default in _defaults()
                    if (value := getattr(event, name)) != default or name in ("type", "chunk")
                }
            )
    return told


def _is_plain(event: Any) -> bool:
    return (
        event.type == "text"
        and event.part_index in (None, 0)
        and event.provider_metadata is None
        and not event.message_index
        and not event.server_executed
    )


@cache
def _defaults() -> tuple[tuple[str, Any], ...]:
    from llm.parts import StreamEvent

    return tuple((each.name, each.default) for each in fields(StreamEvent))


def chunks_from(told: Iterable[Any]) -> Iterator[Any]:
    """Yield what a model's ``execute()`` would yield: text, or llm's events."""
    from llm.parts import StreamEvent

    for event in told:
        yield event if isinstance(event, str) else StreamEvent(**event)


def keep(response: llm.AsyncResponse, told: Mapping[str, Any]) -> None:
    """Put into a response what its model would have put there."""
    for name in _KEPT:
        if name in told:
            setattr(response, name, told[name])
    for name, arguments, call_id in told.get("tool_calls", ()):
        response.add_tool_call(ToolCall(name=name, arguments=arguments, tool_call_id=call_id))
    if "said" in told:
        finish.note(response, *told["said"][:3])


def fill(response: llm.AsyncResponse, told: Mapping[str, Any]) -> None:
    """Make of a response one that has been answered."""
    for chunk in chunks_from(told["events"]):
        response._process_chunk(chunk)
    keep(response, told)

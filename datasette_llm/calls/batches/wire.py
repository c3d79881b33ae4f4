"""What providers' batches are made of: lines of JSON, answers as they come over HTTP, numbers as text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .offline import Reply
from .protocol import OddLine

if TYPE_CHECKING:
    from pathlib import Path

    from .protocol import Value


def json_reply(value: Value) -> Reply:
    """Return an unstreamed answer."""
    return Reply(value.status, json.dumps(value.body).encode())


def json_line(value: dict[str, Any]) -> bytes:
    """Return a value as one line of a file."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # Half of a character, which only an escape can say.
        return json.dumps(value).encode()


def sse_reply(events: list[dict[str, Any]], *, named: bool = False, done: bool = False) -> Reply:
    """Return an answer in server-sent events.

    Args:
        named: name each event by its ``type``.
        done: end as OpenAI's streams do.
    """
    parts = []
    for event in events:
        name = f"event: {event['type']}\n" if named else ""
        parts.append(f"{name}data: {json.dumps(event)}\n\n")
    if done:
        parts.append("data: [DONE]\n\n")
    return Reply(200, "".join(parts).encode(), "text/event-stream")


def read_json(line: bytes) -> dict[str, Any]:
    """Return the object that a line is.

    Raises:
        ValueError: it is none.
    """
    value = json.loads(line)
    if not isinstance(value, dict):
        raise OddLine
    return value


def size_of(path: Path) -> int:
    """Return the size of a file."""
    return path.stat().st_size


def as_dict(value: Any) -> dict[str, Any]:
    """Return a part of an answer, empty if it is missing or something else."""
    return value if isinstance(value, dict) else {}


def as_count(value: Any) -> int:
    """Return a number of requests; some providers write it as text."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError):
        return 0

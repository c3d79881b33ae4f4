"""Anthropic's message batches: all requests in one body, no name of ours in a batch, results as lines."""

from __future__ import annotations

import calendar
import json
import time
from typing import TYPE_CHECKING, Any

from .protocol import Batch, BatchError, Limits, Line, OddLine, Value
from .wire import as_count, as_dict, json_line, json_reply, read_json, size_of, sse_reply

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from .http import Endpoint
    from .offline import Reply, Request

ENDING = "/v1/messages"

_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}
_PAGE = 100
#: By how much the provider's clock and ours may differ.
_CLOCKS_SECONDS = 300
_CHUNK = 1 << 16
_HEAD, _TAIL = b'{"requests":[', b"]}"


class AnthropicBatches:
    """``/v1/messages/batches``."""

    name = "anthropic"
    limits = Limits(requests=100_000, size=256_000_000)
    has_references = False

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._url = f"{endpoint.base}{ENDING}/batches"

    def line(self, custom_id: str, request: Request) -> bytes:
        params = json.loads(request.body)
        params.pop("stream", None)
        return json_line({"custom_id": custom_id, "params": params})

    async def upload(self, path: Path, reference: str) -> str:
        return ""  # The requests go with the creation.

    async def create(self, path: Path, uploaded: str, reference: str) -> Batch:
        # Lines are joined by commas, as many bytes as their ends.
        size = size_of(path) - 1
        headers = {
            "content-type": "application/json",
            "content-length": str(len(_HEAD) + size + len(_TAIL)),
        }
        found = await self._endpoint.do(
            "POST", self._url + self._endpoint.query, content=_body(path, size), headers=headers
        )
        return _batch(found)

    async def find(self, reference: str, since: float, total: int) -> list[Batch]:
        """Return the batches of this size that were begun since; whose they are their results tell."""
        after = None
        found: list[Batch] = []
        while True:
            params = {"limit": str(_PAGE)} | ({"after_id": after} if after else {})
            page = await self._endpoint.ask("GET", self._url, params=params)
            batches = [as_dict(each) for each in page.get("data") or []]
            for each in batches:
                if _moment(each.get("created_at"), 0.0) < since - _CLOCKS_SECONDS:
                    return found
                batch = _batch(each)
                if batch.total == total:
                    found.append(batch)
            if not batches or not page.get("has_more"):
                return found
            after = str(batches[-1].get("id"))

    async def look(self, batch_id: str) -> Batch:
        return _batch(await self._endpoint.ask("GET", f"{self._url}/{batch_id}{self._endpoint.query}"))

    async def cancel(self, batch_id: str) -> None:
        await self._endpoint.ask("POST", f"{self._url}/{batch_id}/cancel{self._endpoint.query}")

    async def results(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        async for line in self._endpoint.lines(f"{self._url}/{batch.id}/results{self._endpoint.query}"):
            yield line

    def read(self, line: bytes) -> Line:
        value = read_json(line)
        custom_id = value.get("custom_id")
        result = as_dict(value.get("result"))
        kind = result.get("type")
        if not isinstance(custom_id, str):
            raise OddLine
        if kind == "succeeded":
            return Line(custom_id, Value(200, as_dict(result.get("message"))))
        if kind in ("canceled", "expired"):
            return Line(custom_id, None)
        if kind == "errored":
            error = as_dict(result.get("error"))
            inner = as_dict(error.get("error")) or error
            status = _STATUSES.get(str(inner.get("type")), 500)
            return Line(custom_id, Value(status, {"type": "error", "error": inner}))
        raise OddLine

    def reply(self, value: Value, request: Request) -> Reply:
        if value.status >= 400 or not json.loads(request.body).get("stream"):
            return json_reply(value)
        return sse_reply(_events(value.body), named=True)


async def _body(path: Path, size: int) -> AsyncIterator[bytes]:
    yield _HEAD
    with path.open("rb") as file:
        while size > 0:
            chunk = file.read(min(_CHUNK, size))
            size -= len(chunk)
            # JSON has no line ends of its own: each one is the end of a request.
            yield chunk.replace(b"\n", b",")
    yield _TAIL


def _events(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the events in which a message would have come."""
    usage = as_dict(message.get("usage"))
    begun = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
    begun["usage"] = {**usage, "output_tokens": 0}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    for index, block in enumerate(message.get("content") or []):
        empty, deltas = _in_pieces(block)
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events += ({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas)
        events.append({"type": "content_block_stop", "index": index})
    delta = {
        name: message.get(name) for name in ("stop_reason", "stop_sequence", "stop_details", "container")
    }
    events.append(
        {"type": "message_delta", "delta": {k: v for k, v in delta.items() if v is not None}, "usage": usage}
    )
    events.append({"type": "message_stop"})
    return events


def _in_pieces(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block of content as it begins, and what is added to it; most kinds begin whole."""
    kind = block.get("type")
    if kind == "text":
        deltas = [{"type": "text_delta", "text": block.get("text", "")}]
        deltas += [{"type": "citations_delta", "citation": each} for each in block.get("citations") or []]
        return {**block, "text": "", "citations": None}, deltas
    if kind == "thinking":
        deltas = [{"type": "thinking_delta", "thinking": block.get("thinking", "")}]
        deltas += [{"type": "signature_delta", "signature": block.get("signature", "")}]
        return {**block, "thinking": "", "signature": ""}, deltas
    if kind in ("tool_use", "server_tool_use"):
        written = json.dumps(block.get("input") or {})
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": written}]
    return block, []


def _moment(value: Any, otherwise: float | None) -> Any:
    """Return a time as seconds since the epoch."""
    try:
        return float(calendar.timegm(time.strptime(str(value)[:19], "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return otherwise


def _batch(value: dict[str, Any]) -> Batch:
    found, says = value.get("id"), str(value.get("processing_status") or "")
    if not isinstance(found, str):
        raise BatchError("the provider's answer about a batch has no id")
    counts = {name: as_count(count) for name, count in as_dict(value.get("request_counts")).items()}
    total = sum(counts.values())
    return Batch(
        id=found,
        state="ended" if says == "ended" else "running",
        says=says,
        total=total or None,
        answered=total - counts.get("processing", 0),
        expires=_moment(value.get("expires_at"), None),
    )

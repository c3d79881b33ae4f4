"""OpenAI's batches, and those of the servers that have the same: a file of requests, a file of results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from .protocol import REFERENCE, Batch, BatchError, Limits, Line, NoBatchesError, OddLine, Value
from .wire import as_count, as_dict, json_reply, read_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from .http import Endpoint
    from .offline import Reply, Request

#: What may be sent in a batch: the ends of the paths.
ENDINGS = ("/chat/completions", "/responses")

_STATES: dict[str, Literal["ended", "failed"]] = {
    "completed": "ended",
    "expired": "ended",
    "cancelled": "ended",
    "failed": "failed",
}
#: Batches that were begun longer ago than this before the one that is looked for are not looked at.
_EARLIER_SECONDS = 3_600
_PAGE = 100


class OpenAIBatches:
    """``/files`` and ``/batches``."""

    name = "openai"
    limits = Limits(requests=50_000, size=200_000_000)
    has_references = True

    def __init__(self, endpoint: Endpoint, ending: str) -> None:
        self._endpoint = endpoint
        self._ending = ending
        self._base = endpoint.base

    def line(self, custom_id: str, request: Request) -> bytes:
        if request.body.find(b'"stream":') >= 0 and json.loads(request.body).get("stream"):
            raise NoBatchesError("an answer that comes in pieces cannot be asked for in a batch")
        # The body is JSON already.
        head = f'{{"custom_id":"{custom_id}","method":"POST","url":"/v1{self._ending}","body":'
        return head.encode() + request.body.replace(b"\n", b" ") + b"}"

    async def upload(self, path: Path, reference: str) -> str:
        # A file's name tells whose it is. The file is read as it is sent.
        with path.open("rb") as file:
            found = await self._endpoint.do(
                "POST",
                f"{self._base}/files{self._endpoint.query}",
                data={"purpose": "batch"},
                files={"file": (f"{reference}.jsonl", file, "application/jsonl")},
            )
        return _text(found, "id")

    async def create(self, path: Path, uploaded: str, reference: str) -> Batch:
        asked = {
            "input_file_id": uploaded,
            "endpoint": f"/v1{self._ending}",
            "completion_window": "24h",
            "metadata": {REFERENCE: reference},
        }
        return _batch(
            await self._endpoint.do("POST", f"{self._base}/batches{self._endpoint.query}", json=asked)
        )

    async def find(self, reference: str, since: float, total: int) -> list[Batch]:
        after = None
        while True:
            params = {"limit": str(_PAGE)} | ({"after": after} if after else {})
            page = await self._endpoint.ask("GET", f"{self._base}/batches", params=params)
            batches = [as_dict(each) for each in page.get("data") or []]
            for each in batches:
                if as_dict(each.get("metadata")).get(REFERENCE) == reference:
                    return [_batch(each)]
            # The latest come first.
            if not batches or not page.get("has_more"):
                return []
            if as_count(batches[-1].get("created_at")) < since - _EARLIER_SECONDS:
                return []
            after = _text(batches[-1], "id")

    async def look(self, batch_id: str) -> Batch:
        return _batch(
            await self._endpoint.ask("GET", f"{self._base}/batches/{batch_id}{self._endpoint.query}")
        )

    async def cancel(self, batch_id: str) -> None:
        await self._endpoint.ask("POST", f"{self._base}/batches/{batch_id}/cancel{self._endpoint.query}")

    async def results(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        for file_id in batch.results:
            async for line in self._endpoint.lines(
                f"{self._base}/files/{file_id}/content{self._endpoint.query}"
            ):
                yield line

    def read(self, line: bytes) -> Line:
        value = read_json(line)
        custom_id = _text(value, "custom_id")
        response, error = as_dict(value.get("response")), as_dict(value.get("error"))
        if "body" in response:
            return Line(custom_id, Value(as_count(response.get("status_code")) or 200, response["body"]))
        if error.get("code") in ("batch_expired", "batch_cancelled"):
            return Line(custom_id, None)
        if error:
            return Line(custom_id, Value(_status_of(error), {"error": error}))
        raise OddLine

    def reply(self, value: Value, request: Request) -> Reply:
        return json_reply(value)


def _status_of(error: dict[str, Any]) -> int:
    code = error.get("code")
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _text(value: dict[str, Any], name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise BatchError(f"the provider's answer about a batch has no {name}")
    return found


def _batch(value: dict[str, Any]) -> Batch:
    says = str(value.get("status") or "")
    counts = as_dict(value.get("request_counts"))
    errors = as_dict(value.get("errors")).get("data") or [{}]
    first = as_dict(errors[0])
    files = [value.get("output_file_id"), value.get("error_file_id")]
    return Batch(
        id=_text(value, "id"),
        state=_STATES.get(says, "running"),
        says=says,
        total=as_count(counts.get("total")) or None,
        answered=as_count(counts.get("completed")) + as_count(counts.get("failed")),
        expires=as_count(value.get("expires_at")) or None,
        results=tuple(file for file in files if isinstance(file, str) and file),
        code=first.get("code"),
        message=first.get("message"),
    )

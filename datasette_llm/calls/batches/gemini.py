"""Gemini's batches: a file of requests, an operation that carries them out, a file of results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from .openapi import plain_schema
from .protocol import Batch, BatchError, Limits, Line, OddLine, Value
from .wire import as_count, as_dict, json_line, json_reply, read_json, size_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from .http import Endpoint
    from .offline import Reply, Request

_STATES: dict[str, Literal["ended", "failed"]] = {
    "SUCCEEDED": "ended",
    "CANCELLED": "ended",
    "EXPIRED": "ended",
    "FAILED": "failed",
}
_PAGE = 100
_CHUNK = 1 << 18
#: Google's codes of errors, by number, as HTTP says them.
_STATUSES = {1: 499, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 13: 500, 14: 503, 16: 401}


class GeminiBatches:
    """``models/NAME:batchGenerateContent``.

    Args:
        model: as the path names it: ``models/gemini-...``.
    """

    name = "gemini"
    limits = Limits(requests=100_000, size=2_000_000_000)
    has_references = True

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self._endpoint = endpoint
        self._base = endpoint.base
        self._model = model

    def line(self, custom_id: str, request: Request) -> bytes:
        body = json.loads(request.body)
        for name in ("generationConfig", "generation_config"):
            if isinstance(body.get(name), dict):
                body[name] = _for_batches(body[name])
        return json_line({"key": custom_id, "request": body})

    async def upload(self, path: Path, reference: str) -> str:
        version = self._base[len(self._endpoint.root) :]
        size = size_of(path)
        _, headers = await self._endpoint.send(
            "POST",
            f"{self._endpoint.root}/upload{version}/files",
            json={"file": {"display_name": reference}},
            headers={
                "x-goog-upload-protocol": "resumable",
                "x-goog-upload-command": "start",
                "x-goog-upload-header-content-length": str(size),
                "x-goog-upload-header-content-type": "application/jsonl",
            },
        )
        address = headers.get("x-goog-upload-url")
        if not address:
            raise BatchError("the provider does not say where the file of a batch goes")
        found = await self._endpoint.do(
            "POST",
            address,
            content=_read(path),
            headers={
                "content-length": str(size),
                "x-goog-upload-offset": "0",
                "x-goog-upload-command": "upload, finalize",
            },
        )
        return str(as_dict(found.get("file")).get("name"))

    async def create(self, path: Path, uploaded: str, reference: str) -> Batch:
        asked = {"batch": {"display_name": reference, "input_config": {"file_name": uploaded}}}
        return _batch(
            await self._endpoint.do("POST", f"{self._base}/{self._model}:batchGenerateContent", json=asked)
        )

    async def find(self, reference: str, since: float, total: int) -> list[Batch]:
        token = None
        while True:
            params = {"pageSize": str(_PAGE)} | ({"pageToken": token} if token else {})
            page = await self._endpoint.ask("GET", f"{self._base}/batches", params=params)
            for each in page.get("operations") or []:
                metadata = as_dict(each.get("metadata"))
                if reference in (metadata.get("displayName"), metadata.get("display_name")):
                    return [_batch(each)]
            token = page.get("nextPageToken")
            if not token:
                return []

    async def look(self, batch_id: str) -> Batch:
        return _batch(await self._endpoint.ask("GET", f"{self._base}/{batch_id}"))

    async def cancel(self, batch_id: str) -> None:
        await self._endpoint.ask("POST", f"{self._base}/{batch_id}:cancel")

    async def results(self, batch: Batch) -> AsyncGenerator[bytes, None]:
        version = self._base[len(self._endpoint.root) :]
        for name in batch.results:
            url = f"{self._endpoint.root}/download{version}/{name}:download?alt=media"
            async for line in self._endpoint.lines(url):
                yield line

    def read(self, line: bytes) -> Line:
        value = read_json(line)
        custom_id = value.get("key") or as_dict(value.get("metadata")).get("key")
        if not isinstance(custom_id, str):
            raise OddLine
        if isinstance(value.get("response"), dict):
            return Line(custom_id, Value(200, value["response"]))
        error = as_dict(value.get("error"))
        if not error:
            raise OddLine
        code = as_count(error.get("code"))
        status = code if code >= 400 else _STATUSES.get(code, 500)
        if status == _STATUSES[1]:
            return Line(custom_id, None)
        return Line(custom_id, Value(status, {"error": {**error, "code": status}}))

    def reply(self, value: Value, request: Request) -> Reply:
        if ":streamGenerateContent" in request.url:
            return json_reply(Value(value.status, [value.body]))
        return json_reply(value)


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _for_batches(config: dict[str, Any]) -> dict[str, Any]:
    """Return a request's configuration as batches honour it.

    ``responseJsonSchema`` is taken there without an error, and not followed.
    """
    config = dict(config)
    for name, wanted in (
        ("responseJsonSchema", "responseSchema"),
        ("response_json_schema", "response_schema"),
    ):
        schema = config.pop(name, None)
        if schema is not None:
            config[wanted] = plain_schema(schema)
    return config


def _batch(value: dict[str, Any]) -> Batch:
    metadata, response = as_dict(value.get("metadata")), as_dict(value.get("response"))
    name = value.get("name") or metadata.get("name")
    if not isinstance(name, str):
        raise BatchError("the provider's answer about a batch has no name")
    says = str(metadata.get("state") or value.get("state") or "")
    counts = as_dict(metadata.get("batchStats"))
    error = as_dict(value.get("error"))
    output = as_dict(metadata.get("output"))
    files = [response.get("responsesFile") or output.get("responsesFile")]
    return Batch(
        id=name,
        state=_STATES.get(says.rpartition("_")[2], "running"),
        says=says,
        total=as_count(counts.get("requestCount")) or None,
        answered=as_count(counts.get("successfulRequestCount")) + as_count(counts.get("failedRequestCount")),
        results=tuple(file for file in files if isinstance(file, str) and file),
        code=str(error["status"]) if "status" in error else None,
        message=error.get("message"),
    )

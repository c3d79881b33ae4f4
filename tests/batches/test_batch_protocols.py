"""What is said to a provider about batches, and how its answers are read: files, operations, results."""

from __future__ import annotations

import json
import threading
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from datasette_llm.calls.batches import http
from datasette_llm.calls.batches.known import batches_of
from datasette_llm.calls.batches.offline import Request
from datasette_llm.calls.batches.protocol import Batch, BatchError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from datasette_llm.calls.batches.protocol import BatchProtocol

pytestmark = pytest.mark.real_clock

#: What a provider answers: a status, and JSON or the bytes of a file.
Answered = tuple[int, Any]


class Provider(ThreadingHTTPServer):
    """Answers by a table of ``METHOD path``, and keeps what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answered | Callable[[dict[str, list[str]]], Answered]] = {}
        self.asked: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self, what: str) -> list[bytes]:
        return [body for asked, body in self.asked if asked == what]


class Handler(BaseHTTPRequestHandler):
    server: Provider

    def do_GET(self) -> None:
        self._answer("GET", b"")

    def do_POST(self) -> None:
        self._answer("POST", self.rfile.read(int(self.headers.get("content-length") or 0)))

    def _answer(self, method: str, body: bytes) -> None:
        parts = urlsplit(self.path)
        what = f"{method} {parts.path}"
        self.server.asked.append((what, body))
        answer = self.server.answers.get(what, (404, {"error": {"message": "there is no such thing"}}))
        status, value = answer(parse_qs(parts.query)) if callable(answer) else answer
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.send_header("x-goog-upload-url", f"{self.server.url}/upload/here")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@asynccontextmanager
async def provider_of(path: str) -> AsyncIterator[tuple[Provider, BatchProtocol]]:
    """A provider, and the protocol for a model whose requests go to this path."""
    server = Provider()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    batches, endpoint = batches_of(Request(server.url + path, {"authorization": "key"}, b"{}"))
    try:
        yield server, batches
    finally:
        await endpoint.aclose()
        server.shutdown()
        server.server_close()
        thread.join()


async def lines_of(batches: BatchProtocol, batch: Batch) -> list[bytes]:
    return [line async for line in batches.results(batch)]


GEMINI = "/v1beta/models/m:generateContent"


async def test_a_batch_of_gemini(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"key": "a"}\n{"key": "b"}\n')
    done = {
        "name": "batches/1",
        "metadata": {
            "state": "BATCH_STATE_SUCCEEDED",
            "displayName": "ours",
            "batchStats": {"requestCount": "2", "successfulRequestCount": "1", "failedRequestCount": "1"},
        },
        "response": {"responsesFile": "files/answers"},
    }

    def page(query: dict[str, list[str]]) -> Answered:
        if "pageToken" in query:
            return 200, {"operations": [done]}
        other = {"name": "batches/0", "metadata": {"displayName": "of somebody else"}}
        return 200, {"operations": [other], "nextPageToken": "more"}

    async with provider_of(GEMINI) as (server, batches):
        server.answers = {
            "POST /upload/v1beta/files": (200, {}),
            "POST /upload/here": (200, {"file": {"name": "files/requests"}}),
            "POST /v1beta/models/m:batchGenerateContent": (
                200,
                {"name": "batches/1", "metadata": {"state": "BATCH_STATE_PENDING"}},
            ),
            "GET /v1beta/batches": page,
            "GET /v1beta/batches/1": (200, done),
            "POST /v1beta/batches/1:cancel": (200, b""),
            "GET /download/v1beta/files/answers:download": (200, b'{"key": "a"}\n\n{"key": "b"}'),
        }
        uploaded = await batches.upload(path, "ours")
        assert uploaded == "files/requests"
        assert server.bodies("POST /upload/here") == [path.read_bytes()]
        begun = await batches.create(path, uploaded, "ours")
        assert (begun.id, begun.state) == ("batches/1", "running")
        (asked,) = server.bodies("POST /v1beta/models/m:batchGenerateContent")
        assert json.loads(asked)["batch"]["input_config"] == {"file_name": "files/requests"}
        ended = await batches.look("batches/1")
        assert (ended.state, ended.total, ended.answered) == ("ended", 2, 2)
        assert await batches.find("ours", 0.0, 2) == [ended]
        server.answers["GET /v1beta/batches"] = (200, {})
        assert await batches.find("ours", 0.0, 2) == []
        assert await lines_of(batches, ended) == [b'{"key": "a"}', b'{"key": "b"}']
        await batches.cancel("batches/1")
        assert len(server.bodies("POST /v1beta/batches/1:cancel")) == 1


async def test_lines_of_gemini() -> None:
    async with provider_of(GEMINI) as (_, batches):
        said = batches.read(b'{"metadata": {"key": "a"}, "response": {"candidates": []}}')
        assert (said.custom_id, said.reply and said.reply.status) == ("a", 200)
        for code, status in ((3, 400), (8, 429), (13, 500), (77, 500), (404, 404)):
            line = batches.read(json.dumps({"key": "a", "error": {"code": code}}).encode())
            assert line.reply is not None
            assert line.reply.status == status
        assert batches.read(b'{"key": "a", "error": {"code": 1}}').reply is None
        for odd in (b'{"key": 1}', b'{"key": "a"}', b"[]", b"{"):
            with pytest.raises(ValueError):  # noqa: PT011 - all kinds of it are an odd line
                batches.read(odd)


ANTHROPIC = "/v1/messages"


async def test_a_batch_of_anthropic(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"custom_id": "a"}\n{"custom_id": "b"}\n')

    def batch(number: int, moment: str) -> dict[str, Any]:
        return {
            "id": f"batch{number}",
            "processing_status": "in_progress",
            "created_at": moment,
            "request_counts": {"processing": 2},
        }

    latest, earlier = batch(2, "2026-01-02T00:00:00Z"), batch(1, "2026-01-01T00:00:00Z")

    def page(query: dict[str, list[str]]) -> Answered:
        return 200, {
            "data": [earlier] if "after_id" in query else [latest],
            "has_more": "after_id" not in query,
        }

    async with provider_of(ANTHROPIC) as (server, batches):
        server.answers = {
            "POST /v1/messages/batches": (200, latest),
            "GET /v1/messages/batches": page,
            "GET /v1/messages/batches/batch2": (200, latest | {"processing_status": "ended"}),
            "POST /v1/messages/batches/batch2/cancel": (200, latest),
            "GET /v1/messages/batches/batch2/results": (200, b'{"custom_id": "a"}\n'),
        }
        begun = await batches.create(path, await batches.upload(path, "ours"), "ours")
        assert (begun.id, begun.state, begun.total) == ("batch2", "running", 2)
        (asked,) = server.bodies("POST /v1/messages/batches")
        assert json.loads(asked) == {"requests": [{"custom_id": "a"}, {"custom_id": "b"}]}
        # It has no name of ours: it is one of this size that was begun since.
        found = await batches.find("ours", 0.0, 2)
        assert [each.id for each in found] == ["batch2", "batch1"]
        assert found[0] == begun
        assert await batches.find("ours", 0.0, 3) == []
        assert await batches.find("ours", 4e9, 2) == []
        ended = await batches.look("batch2")
        assert ended.state == "ended"
        assert await lines_of(batches, ended) == [b'{"custom_id": "a"}']
        await batches.cancel("batch2")


async def test_lines_of_anthropic() -> None:
    def line(**result: Any) -> bytes:
        return json.dumps({"custom_id": "a", "result": result}).encode()

    async with provider_of(ANTHROPIC) as (_, batches):
        said = batches.read(line(type="succeeded", message={"id": "m"})).reply
        assert (said and said.status, said and said.body) == (200, {"id": "m"})
        refused = batches.read(line(type="errored", error={"error": {"type": "invalid_request_error"}})).reply
        assert refused is not None
        assert refused.status == 400
        assert batches.read(line(type="expired")).reply is None
        for odd in (line(type="else"), b'{"custom_id": 1, "result": {}}'):
            with pytest.raises(ValueError):  # noqa: PT011 - all kinds of it are an odd line
                batches.read(odd)


async def test_what_is_asked_again_is_not_logged_each_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "ATTEMPTS", 2)
    batch = {"id": "b1", "status": "in_progress"}
    async with provider_of("/v1/chat/completions") as (server, batches):
        answers = iter([(503, {"error": {"message": "busy"}}), (200, batch)])
        server.answers["GET /v1/batches/b1"] = lambda query: next(answers)
        assert (await batches.look("b1")).says == "in_progress"
    assert caplog.text == ""


async def test_what_a_provider_says_about_batches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    async with provider_of("/v1/chat/completions") as (server, batches):
        with pytest.raises(BatchError, match="there is no such thing"):
            await batches.look("b1")
        server.answers["GET /v1/batches/b1"] = (200, b"<html>")
        with pytest.raises(BatchError, match="no JSON"):
            await batches.look("b1")
        server.answers["GET /v1/batches/b1"] = (200, [])
        with pytest.raises(BatchError, match="has no id"):
            await batches.look("b1")
    async with provider_of(GEMINI) as (server, batches):
        server.answers["GET /v1beta/batches/1"] = (200, {})
        with pytest.raises(BatchError, match="has no name"):
            await batches.look("batches/1")

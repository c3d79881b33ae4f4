"""A pretended provider of batches, over real HTTP: files and batches as OpenAI has them, and Anthropic's.

It has a clock of its own: a batch takes ``Settings.seconds`` of it, and ``advance()`` puts it forward. It
answers single requests too, with the same answers, and writes down what it was asked, so that it is known
what was sent twice. Its faults come by the number of a row in its batch, the same in every run.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from .provider import answer_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BOUNDARY = re.compile(rb"boundary=([^;\s]+)")
_KIND = re.compile(r'"result": {"type": "(\w+)"')
_TOKEN_CHARACTERS = 4
_CHUNK = 1 << 16


@dataclass
class Settings:
    """How it behaves.

    Attributes:
        seconds: how long a batch takes.
        token_limit: how many tokens may be enqueued; a batch beyond that fails. 0 is no limit.
        refuse: every so-manieth row is refused with status 400; 0 is none, as for the next four.
        expire: so many of the last rows of each batch are not answered before it expires.
        missing: every so-manieth row has no line in the results.
        torn: every so-manieth row's line is cut in the middle.
        twice: every so-manieth row has two lines.
        shuffle: the results come in another order.
        cut_downloads: so many times a download ends in the middle, with a closed connection.
        lost_answers: so many times a batch is begun and the connection is closed without an answer.
    """

    seconds: float = 0.0
    token_limit: int = 0
    refuse: int = 0
    expire: int = 0
    missing: int = 0
    torn: int = 0
    twice: int = 0
    shuffle: bool = False
    cut_downloads: int = 0
    lost_answers: int = 0


@dataclass
class Held:
    """A batch.

    Attributes:
        lines: custom id and body of each request.
        state: in OpenAI's word.
    """

    id: str
    endpoint: str
    lines: list[tuple[str, dict[str, Any]]]
    metadata: dict[str, str]
    begun: float
    tokens: int
    state: str = "in_progress"
    code: str | None = None
    output: bytes = field(default=b"", repr=False)
    errors: bytes = field(default=b"", repr=False)


class BatchProvider:
    """What it holds and answers; `running` serves it.

    Attributes:
        url: where it is.
        files: what was uploaded and not used yet, by id.
        batches: all of them, by id, in order.
        asked: how often each prompt was sent, in batches and singly.
        live: how many single requests there were.
        answer: what a prompt is answered with.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Held] = {}
        self.asked: Counter[str] = Counter()
        self.live = 0
        self.answer: Callable[[str], str] = answer_text
        self.requests: list[str] = []
        self._ahead = 0.0
        self._numbers = Counter[str]()

    def now(self) -> float:
        """Its clock, in seconds since the epoch."""
        return time.time() + self._ahead

    def advance(self, seconds: float) -> None:
        """Put its clock forward."""
        self._ahead += seconds

    def _number(self, kind: str) -> str:
        self._numbers[kind] += 1
        return f"{kind}-{self._numbers[kind]}"

    # What is asked of it

    def handle(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Answer a request."""
        self.requests.append(f"{method} {target}")
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        path = parts.path
        self._go_on()
        if method == "POST" and path in _SPEAK:
            self.live += 1
            asked = json.loads(body)
            status, answer = self._answered(path, asked, refuse=False)
            return Answer.of(answer, status)
        if path == "/v1/files" and method == "POST":
            file_id = self._number("file")
            self.files[file_id] = _uploaded(headers, body)
            return Answer.of({"id": file_id, "object": "file", "bytes": len(self.files[file_id])})
        if path.startswith("/v1/files/") and path.endswith("/content"):
            return self._download(path.split("/")[3])
        for base, api in (("/v1/batches", _OpenAI), ("/v1/messages/batches", _Anthropic)):
            if path == base or path.startswith(base + "/"):
                return self._batches(api(self), method, path[len(base) + 1 :], query, body)
        return Answer.of({"error": {"message": f"there is no {path}"}}, 404)

    def _batches(self, api: _Api, method: str, rest: str, query: dict[str, str], body: bytes) -> Answer:
        if method == "POST" and not rest:
            held = api.begin(json.loads(body))
            if isinstance(held, Answer):
                return held
            if self.settings.lost_answers > 0:
                self.settings.lost_answers -= 1
                return Answer(b"", status=0)
            return Answer.of(api.shown(held))
        if not rest:
            return self._listed(api, query)
        name, _, what = rest.partition("/")
        known = self.batches.get(name)
        if known is None:
            return Answer.of({"error": {"message": f"No batch found with id {name!r}"}}, 404)
        if what == "cancel":
            self._cancel(known)
        if what == "results":
            return self._sent(known.output)
        return Answer.of(api.shown(known))

    def _listed(self, api: _Api, query: dict[str, str]) -> Answer:
        latest = [held for held in reversed(self.batches.values()) if api.has(held)]
        after = query.get("after") or query.get("after_id")
        if after is not None:
            place = [held.id for held in latest].index(after) + 1
            latest = latest[place:]
        limit = int(query.get("limit", "20"))
        page = [api.shown(held) for held in latest[:limit]]
        return Answer.of({"data": page, "has_more": len(latest) > limit})

    def _download(self, file_id: str) -> Answer:
        held = self.batches.get(file_id.partition("_")[2])
        if held is None:
            return Answer.of({"error": {"message": "No such File object"}}, 404)
        return self._sent(held.errors if file_id.startswith("errors_") else held.output)

    def _sent(self, content: bytes) -> Answer:
        if self.settings.cut_downloads > 0 and content:
            self.settings.cut_downloads -= 1
            return Answer(content, cut=True)
        return Answer(content, content_type="application/jsonl")

    # Batches as time goes by

    def begin(self, endpoint: str, lines: list[tuple[str, dict[str, Any]]], metadata: dict[str, str]) -> Held:
        """Begin a batch; one beyond the tokens that may be enqueued fails."""
        tokens = sum(len(json.dumps(body)) for _, body in lines) // _TOKEN_CHARACTERS
        held = Held(self._number("batch"), endpoint, lines, metadata, self.now(), tokens)
        enqueued = sum(each.tokens for each in self.batches.values() if each.state == "in_progress")
        if self.settings.token_limit and enqueued + tokens > self.settings.token_limit:
            held.state, held.code = "failed", "token_limit_exceeded"
        else:
            self.asked.update(_SPEAK[endpoint].prompt(body) for _, body in lines)
        self.batches[held.id] = held
        return held

    def _go_on(self) -> None:
        for held in self.batches.values():
            if held.state == "in_progress" and self.now() >= held.begun + self.settings.seconds:
                self._end(held, len(held.lines) - self.settings.expire)

    def _cancel(self, held: Held) -> None:
        if held.state == "in_progress":
            self._end(held, len(held.lines) // 2)
            held.state = "cancelled"

    def _end(self, held: Held, answered: int) -> None:
        """Write the results: of so many requests, the others are not answered any more."""
        settings = self.settings
        held.state = "completed" if answered >= len(held.lines) else "expired"
        api = _Anthropic(self) if held.endpoint == "/v1/messages" else _OpenAI(self)
        good: list[bytes] = []
        bad: list[bytes] = []
        for number, (custom_id, body) in enumerate(held.lines, 1):
            if number > answered:
                bad.append(api.unanswered(custom_id))
                continue
            if settings.missing and not number % settings.missing:
                continue
            refuse = bool(settings.refuse) and not number % settings.refuse
            status, answer = self._answered(held.endpoint, body, refuse=refuse)
            line = api.line(custom_id, status, answer)
            if settings.torn and not number % settings.torn:
                line = line[: len(line) // 2]
            to = good if status == 200 or isinstance(api, _Anthropic) else bad
            to += [line] * (2 if settings.twice and not number % settings.twice else 1)
        if isinstance(api, _Anthropic):
            good, bad = good + bad, []
        if settings.shuffle:
            Random(1).shuffle(good)
        held.output = b"".join(line + b"\n" for line in good)
        held.errors = b"".join(line + b"\n" for line in bad)

    def _answered(self, path: str, body: dict[str, Any], *, refuse: bool) -> tuple[int, dict[str, Any]]:
        speech = _SPEAK[path]
        if refuse:
            return 400, speech.error("this request is refused")
        prompt = speech.prompt(body)
        return 200, speech.say(self.answer(prompt), len(prompt) // _TOKEN_CHARACTERS + 1, body)

    # Serving it

    @contextmanager
    def running(self) -> Iterator[BatchProvider]:
        """Serve it from a thread until the block is left."""
        loop = asyncio.SelectorEventLoop()
        ready, end = threading.Event(), asyncio.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            ready.set()
            await end.wait()
            server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
        thread.start()
        try:
            ready.wait()
            yield self
        finally:
            loop.call_soon_threadsafe(end.set)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "transfer-encoding" in headers:
            body = b""
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        else:
            body = await reader.readexactly(int(headers.get("content-length", "0")))
        try:
            answer = self.handle(method, target, headers, body)
        except Exception as error:
            answer = Answer.of({"error": {"message": f"{type(error).__name__}: {error}"}}, 418)
        if answer.status == 0:
            return False
        writer.write(
            f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
            f"content-type: {answer.content_type}\r\ncontent-length: {len(answer.body)}\r\n\r\n".encode()
        )
        sent = answer.body[: len(answer.body) // 2] if answer.cut else answer.body
        for begin in range(0, len(sent), _CHUNK):
            writer.write(sent[begin : begin + _CHUNK])
            await writer.drain()
        await writer.drain()
        return not answer.cut


@dataclass
class Answer:
    """What goes over the wire; status 0 is a closed connection."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    cut: bool = False

    @classmethod
    def of(cls, value: Any, status: int = 200) -> Answer:
        return cls(json.dumps(value).encode(), status)


def _uploaded(headers: dict[str, str], body: bytes) -> bytes:
    """The file in a form that was sent."""
    found = _BOUNDARY.search(headers["content-type"].encode())
    assert found is not None
    for part in body.split(b"--" + found[1]):
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content[:-2]
    raise ValueError("there is no file in the form")


class _Speech:
    """How a kind of request and its answer look."""

    def prompt(self, body: dict[str, Any]) -> str:
        content = body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    def error(self, message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "invalid_request_error", "code": None}}

    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class _Chat(_Speech):
    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        received = len(text) // _TOKEN_CHARACTERS + 1
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model"),
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {
                "prompt_tokens": sent,
                "completion_tokens": received,
                "total_tokens": sent + received,
            },
        }


class _Messages(_Speech):
    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body.get("model"),
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": sent, "output_tokens": len(text) // _TOKEN_CHARACTERS + 1},
        }

    def error(self, message: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}


_SPEAK: dict[str, _Speech] = {"/v1/chat/completions": _Chat(), "/v1/messages": _Messages()}


class _Api:
    """How one provider shows its batches."""

    endpoint = ""

    def __init__(self, provider: BatchProvider) -> None:
        self.provider = provider

    def has(self, held: Held) -> bool:
        return (held.endpoint == "/v1/messages") == (self.endpoint == "/v1/messages")

    def begin(self, asked: dict[str, Any]) -> Held | Answer:
        raise NotImplementedError

    def shown(self, held: Held) -> dict[str, Any]:
        raise NotImplementedError

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        raise NotImplementedError

    def unanswered(self, custom_id: str) -> bytes:
        raise NotImplementedError


class _OpenAI(_Api):
    def begin(self, asked: dict[str, Any]) -> Held | Answer:
        content = self.provider.files.pop(asked["input_file_id"], None)
        if content is None:
            return Answer.of({"error": {"message": "No such File object"}}, 404)
        lines = [json.loads(line) for line in content.splitlines()]
        if len({line["custom_id"] for line in lines}) < len(lines):
            return Answer.of({"error": {"message": "custom ids are not unique"}}, 400)
        return self.provider.begin(
            asked["endpoint"],
            [(line["custom_id"], line["body"]) for line in lines],
            asked.get("metadata") or {},
        )

    def shown(self, held: Held) -> dict[str, Any]:
        done = held.state != "in_progress"
        failed = held.errors.count(b"\n")
        errors = None
        if held.code is not None:
            limit = self.provider.settings.token_limit
            message = (
                f"Enqueued token limit reached for m in organization o. Limit: {limit:,} enqueued tokens."
            )
            errors = {"object": "list", "data": [{"code": held.code, "message": message}]}
        return {
            "id": held.id,
            "object": "batch",
            "endpoint": held.endpoint,
            "status": held.state,
            "metadata": held.metadata,
            "errors": errors,
            "created_at": int(held.begun),
            "expires_at": int(held.begun) + 86_400,
            "output_file_id": f"output_{held.id}" if done and held.output else None,
            "error_file_id": f"errors_{held.id}" if done and held.errors else None,
            "request_counts": {
                "total": len(held.lines),
                "completed": held.output.count(b"\n"),
                "failed": failed,
            },
        }

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        response = {"status_code": status, "request_id": "r1", "body": answer}
        return json.dumps({"id": "l1", "custom_id": custom_id, "response": response, "error": None}).encode()

    def unanswered(self, custom_id: str) -> bytes:
        error = {"code": "batch_expired", "message": "This request could not be executed before it expired."}
        return json.dumps({"id": "l1", "custom_id": custom_id, "response": None, "error": error}).encode()


class _Anthropic(_Api):
    endpoint = "/v1/messages"

    def begin(self, asked: dict[str, Any]) -> Held | Answer:
        lines = [(each["custom_id"], each["params"]) for each in asked["requests"]]
        if any(params.get("stream") for _, params in lines):
            return Answer.of(_SPEAK[self.endpoint].error("stream is not supported in batches"), 400)
        return self.provider.begin(self.endpoint, lines, {})

    def shown(self, held: Held) -> dict[str, Any]:
        done = held.state != "in_progress"
        counts = Counter(_KIND.findall(held.output.decode())) if done else Counter[str]()
        counts["succeeded"] = len(held.lines) * done - counts["errored"] - counts["expired"]
        return {
            "id": held.id,
            "type": "message_batch",
            "processing_status": "ended" if done else "in_progress",
            "request_counts": {
                "processing": 0 if done else len(held.lines),
                **{name: counts[name] for name in ("succeeded", "errored", "canceled", "expired")},
            },
            "created_at": _rfc(held.begun),
            "expires_at": _rfc(held.begun + 86_400),
            "results_url": f"{self.provider.url}/v1/messages/batches/{held.id}/results" if done else None,
        }

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        result = (
            {"type": "succeeded", "message": answer}
            if status == 200
            else {"type": "errored", "error": answer}
        )
        return json.dumps({"custom_id": custom_id, "result": result}).encode()

    def unanswered(self, custom_id: str) -> bytes:
        return json.dumps({"custom_id": custom_id, "result": {"type": "expired"}}).encode()


def _rfc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

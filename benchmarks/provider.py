"""What the pretended provider answers: latency, limits, faults, and what it counted.

No input or output happens here. ``Provider.answer()`` takes a request and returns a ``Reply``, a
little program for ``wire`` to carry out. Whether a request meets a fault, and its latency, come
from a hash of the seed, the prompt and how often that prompt was sent before: the same prompts meet
the same faults in every run, in whatever order they arrive.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate
from http import HTTPStatus
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal

FAULTS = ("error_500", "error_503", "error_429", "disconnect", "torn", "never", "close", "broken_sse")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the provider behaves; every field is a command line option and a key of ``POST /settings``.

    Attributes:
        seed: what the random decisions depend on, besides the prompts.
        latency: seconds until an answer begins (a streamed one) or is sent (any other).
        latency_sigma: spread of a log-normal latency whose median is ``latency``; 0 keeps it fixed.
        chunks: into how many pieces a streamed answer is cut.
        chunk_seconds: seconds between two of them.
        rate: requests a second that the token bucket refills; 0 is no limit.
        burst: how many requests the bucket holds.
        in_flight: most requests being answered at one time, the others get 429; 0 is no limit.
        ratelimit_headers: announce the bucket in ``x-ratelimit-*-requests`` headers.
        retry_after: how a 429 or 503 says when to come back.
        retry_after_seconds: what it says, instead of when the bucket will have refilled.
        api_key: the only key that is accepted; empty accepts any.
        error_500: share of the requests that get this status, as for the next two.
        error_503: see above.
        error_429: see above; it comes on top of the bucket's refusals.
        disconnect: share of the answers cut half-way by a closed connection.
        torn: share of the streams that end cleanly half-way, without a finish marker.
        never: share of the requests that are never answered.
        close: share of the requests whose connection is closed at once.
        broken_sse: share of the answers that are not JSON.
    """

    seed: int = 0
    latency: float = 0.0
    latency_sigma: float = 0.0
    chunks: int = 8
    chunk_seconds: float = 0.0
    rate: float = 0.0
    burst: float = 1.0
    in_flight: int = 0
    ratelimit_headers: bool = False
    retry_after: Literal["seconds", "ms", "date", "none"] = "seconds"
    retry_after_seconds: float | None = None
    api_key: str = ""
    error_500: float = 0.0
    error_503: float = 0.0
    error_429: float = 0.0
    disconnect: float = 0.0
    torn: float = 0.0
    never: float = 0.0
    close: float = 0.0
    broken_sse: float = 0.0

    def changed(self, changes: dict[str, Any]) -> Settings:
        """Return these settings with some changed.

        Raises:
            ValueError: if one of the names is not a setting.
        """
        known = {setting.name for setting in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ValueError(f"not a setting: {', '.join(unknown)} (there are: {', '.join(sorted(known))})")
        return replace(self, **changes)


@dataclass(slots=True)
class Reply:
    """What to send: after ``delay`` the first part, each next one ``gap`` seconds later.

    Attributes:
        status: the HTTP status, 0 when none is sent.
        parts: bytes to write, head included.
        then: whether the connection is kept, closed, or left hanging afterwards.
        prompt: whose answer it is, once sent in full; ``None`` for everything but a good answer.
        counted: whether it counts as in flight until it is sent.
    """

    status: int
    parts: list[bytes]
    delay: float = 0.0
    gap: float = 0.0
    then: Literal["keep", "close", "hang"] = "keep"
    prompt: str | None = None
    counted: bool = False


@dataclass(slots=True)
class Counts:
    """What the provider saw since it started or was last reset."""

    requests: int = 0
    answered: int = 0
    connections: int = 0
    open_connections: int = 0
    running: int = 0
    peak: int = 0
    client_disconnects: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    complete: Counter[str] = field(default_factory=Counter)

    def as_dict(self, *, prompts: bool) -> dict[str, Any]:
        """Return the counts for JSON, with each prompt's own if asked for."""
        counts = {each.name: getattr(self, each.name) for each in fields(self) if each.type == "int"}
        counts["statuses"] = {str(status): count for status, count in sorted(self.statuses.items())}
        counts["faults"] = dict(self.faults)
        counts["prompts"] = len(self.seen)
        counts["unanswered"] = sum(1 for prompt in self.seen if prompt not in self.complete)
        counts["answered_twice"] = sum(1 for count in self.complete.values() if count > 1)
        counts["cpu_seconds"] = time.process_time()
        if prompts:
            counts["seen"], counts["complete"] = dict(self.seen), dict(self.complete)
        return counts


def answer_text(prompt: str) -> str:
    """Return the whole text of the answer to a prompt: what a client must have received."""
    return f"answer to: {prompt}"


class Provider:
    """The provider's state: its settings, its token bucket, its counts."""

    def __init__(self, settings: Settings) -> None:
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take on these settings, with a full bucket and counts at zero."""
        self.settings = settings
        self._tokens = settings.burst
        self._refilled = time.monotonic()
        shares = [(name, float(getattr(settings, name))) for name in FAULTS]
        self._faults = [(name, share) for name, share in shares if share]
        self.reset()

    def reset(self) -> None:
        """Set the counts to zero; connections and requests that are open stay counted as such."""
        old = getattr(self, "counts", None) or Counts()
        self.counts = Counts(open_connections=old.open_connections, running=old.running, peak=old.running)

    def models(self) -> Reply:
        """Answer ``GET /v1/models``."""
        model = {"id": "bench", "object": "model", "created": 0, "owned_by": "benchmarks"}
        return Reply(200, [_whole(200, json.dumps({"object": "list", "data": [model]}).encode())])

    def answer(self, body: bytes, authorization: str) -> Reply:
        """Answer ``POST /v1/chat/completions``."""
        settings, counts = self.settings, self.counts
        counts.requests += 1
        if settings.api_key and authorization != f"Bearer {settings.api_key}":
            return _error(401, "Incorrect API key provided", "invalid_api_key")
        try:
            request = json.loads(body)
            prompt = _last_text(request["messages"])
        except (ValueError, KeyError, IndexError, TypeError):
            return _error(400, "This is not a chat completion request", "invalid_request_error")
        counts.seen[prompt] += 1
        uniform, latency_uniform = _draws(f"{settings.seed}:{counts.seen[prompt]}:{prompt}")

        # 1. limits refuse at once, and a refused request costs no token
        wait = self._take_token()
        limits = self._announced() if settings.ratelimit_headers and settings.rate else b""
        if wait is not None:
            return self._refuse(429, wait, limits)
        if settings.in_flight and counts.running >= settings.in_flight:
            return self._refuse(429, max(settings.latency, 0.001), limits)

        # 2. then it may meet one of the faults
        stream = bool(request.get("stream"))
        fault = self._fault(uniform)
        if fault == "error_429":
            return self._refuse(429, 1.0, limits)
        delay = settings.latency
        if settings.latency_sigma:
            delay *= math.exp(settings.latency_sigma * _NORMAL.inv_cdf(latency_uniform))
        if fault == "close":
            return Reply(0, [], then="close")
        if fault == "never":
            return Reply(0, [], then="hang", counted=True)
        if fault in ("error_500", "error_503"):
            reply = (
                self._refuse(503, 1.0, limits)
                if fault == "error_503"
                else _error(500, "The server had an error while processing your request", "server_error")
            )
            reply.delay, reply.counted = delay, True
            return reply

        # 3. then it gets its answer, or part of it
        text = _answer(request, prompt)
        usage = {"prompt_tokens": len(prompt) // 4 + 1, "completion_tokens": text.count(" ") + 1}
        usage["total_tokens"] = sum(usage.values())
        build = self._streamed if stream else self._unstreamed
        return build(request, text, usage, limits, delay, fault, prompt)

    def sent(self, prompt: str) -> None:
        """Count the answer to a prompt, which has been sent in full."""
        self.counts.answered += 1
        self.counts.complete[prompt] += 1

    def _unstreamed(
        self,
        request: dict[str, Any],
        text: str,
        usage: dict[str, int],
        limits: bytes,
        delay: float,
        fault: str | None,
        prompt: str,
    ) -> Reply:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        calls = _tool_calls(request, prompt)
        if calls:
            message |= {"content": None, "tool_calls": calls}
        finish = "tool_calls" if calls else "stop"
        content = json.dumps(
            {
                "id": f"chatcmpl-{self.counts.requests}",
                "object": "chat.completion",
                "created": 1,
                "model": request.get("model", "bench"),
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": usage,
            }
        ).encode()
        if fault == "broken_sse":
            return Reply(200, [_whole(200, content[: len(content) // 2], limits)], delay, counted=True)
        whole = _whole(200, content, limits)
        if fault == "disconnect":
            return Reply(200, [whole[: -len(content) // 2]], delay, then="close", counted=True)
        return Reply(200, [whole], delay, prompt=prompt, counted=True)

    def _streamed(
        self,
        request: dict[str, Any],
        text: str,
        usage: dict[str, int],
        limits: bytes,
        delay: float,
        fault: str | None,
        prompt: str,
    ) -> Reply:
        before = (
            f'{{"id":"chatcmpl-{self.counts.requests}","object":"chat.completion.chunk","created":1,'
            f'"model":{json.dumps(request.get("model", "bench"))},"choices":'
        )
        calls = _tool_calls(request, prompt)
        if calls:
            deltas = [
                json.dumps({"role": "assistant", "tool_calls": [{"index": index, **call}]})
                for index, call in enumerate(calls)
            ]
        else:
            count = max(1, min(self.settings.chunks, len(text)))
            cuts = [number * len(text) // count for number in range(count + 1)]
            pieces = [text[start:stop] for start, stop in pairwise(cuts)]
            deltas = [f'{{"role":"assistant","content":{json.dumps(piece)}}}' for piece in pieces]
        events = [f'{before}[{{"index":0,"delta":{delta},"finish_reason":null}}]}}' for delta in deltas]
        parts = [_chunk(f"data: {event}\n\n".encode()) for event in events]
        reply = Reply(200, parts, delay, self.settings.chunk_seconds, counted=True)
        half = max(1, len(parts) // 2)
        if fault == "disconnect":
            reply.parts, reply.then = parts[:half], "close"
        elif fault == "torn":
            reply.parts = [*parts[:half], b"0\r\n\r\n"]
        elif fault == "broken_sse":
            reply.parts = [*parts[:half], _chunk(b'data: {"id":"chatcmpl-\n\n'), b"0\r\n\r\n"]
        else:
            reason = "tool_calls" if calls else "stop"
            finish = f'data: {before}[{{"index":0,"delta":{{}},"finish_reason":"{reason}"}}]}}\n\n'
            if (request.get("stream_options") or {}).get("include_usage"):
                finish += f'data: {before}[],"usage":{json.dumps(usage)}}}\n\n'
            parts.append(_chunk(f"{finish}data: [DONE]\n\n".encode()) + b"0\r\n\r\n")
            reply.prompt = prompt
        reply.parts[0] = _STREAM_HEAD + limits + b"\r\n" + reply.parts[0]
        return reply

    def _fault(self, uniform: float) -> str | None:
        for name, share in self._faults:
            if uniform < share:
                self.counts.faults[name] += 1
                return name
            uniform -= share
        return None

    def _take_token(self) -> float | None:
        """Take a token; if there is none, return the seconds until there will be one."""
        settings = self.settings
        if not settings.rate:
            return None
        now = time.monotonic()
        self._tokens = min(settings.burst, self._tokens + (now - self._refilled) * settings.rate)
        self._refilled = now
        if self._tokens < 1:
            return (1 - self._tokens) / settings.rate
        self._tokens -= 1
        return None

    def _announced(self) -> bytes:
        """The bucket as OpenAI announces it: limit per minute, what remains, until it is full again."""
        settings = self.settings
        reset = (settings.burst - self._tokens) / settings.rate
        return (
            f"x-ratelimit-limit-requests: {settings.rate * 60:.0f}\r\n"
            f"x-ratelimit-remaining-requests: {int(self._tokens)}\r\n"
            f"x-ratelimit-reset-requests: {reset * 1000:.0f}ms\r\n"
        ).encode()

    def _refuse(self, status: int, wait: float, limits: bytes) -> Reply:
        settings = self.settings
        if settings.retry_after_seconds is not None:
            wait = settings.retry_after_seconds
        header = b""
        if settings.retry_after == "seconds":
            header = f"retry-after: {math.ceil(wait)}\r\n".encode()
        elif settings.retry_after == "ms":
            header = f"retry-after-ms: {math.ceil(wait * 1000)}\r\n".encode()
        elif settings.retry_after == "date":
            header = f"retry-after: {formatdate(math.ceil(time.time() + wait), usegmt=True)}\r\n".encode()
        if status == 503:
            return _error(503, "The engine is currently overloaded", "server_error", limits + header)
        return _error(429, "Rate limit reached for requests", "rate_limit_exceeded", limits + header)


_NORMAL = NormalDist()
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n"
)


def _whole(status: int, body: bytes, headers: bytes = b"") -> bytes:
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    )
    return head.encode() + headers + b"\r\n" + body


def _error(status: int, message: str, code: str, headers: bytes = b"") -> Reply:
    body = json.dumps({"error": {"message": message, "type": code, "code": code}}).encode()
    return Reply(status, [_whole(status, body, headers)])


def json_reply(status: int, value: Any) -> Reply:
    """Return a reply of plain JSON, for the pages that steer the server."""
    return Reply(status, [_whole(status, json.dumps(value).encode())])


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _draws(text: str) -> tuple[float, float]:
    """Return two numbers between 0 and 1, both exclusive, that depend on the text alone."""
    first, second = struct.unpack("<QQ", hashlib.blake2b(text.encode(), digest_size=16).digest())
    return (first + 0.5) / 2**64, (second + 0.5) / 2**64 or 1e-12


def _last_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def _tool_calls(request: dict[str, Any], prompt: str) -> list[dict[str, Any]]:
    """A call of each tool that the request offers, once: not any more when it carries their results."""
    if request["messages"][-1].get("role") == "tool":
        return []
    functions = [tool["function"] for tool in request.get("tools") or []]
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": function["name"],
                "arguments": json.dumps(dict.fromkeys(function["parameters"].get("properties", {}), prompt)),
            },
        }
        for number, function in enumerate(functions)
    ]


def _answer(request: dict[str, Any], prompt: str) -> str:
    """The answer's text: JSON with every property of the schema, if the request carries one."""
    text = answer_text(prompt)
    response_format = request.get("response_format") or {}
    if response_format.get("type") != "json_schema":
        return text
    values = {"string": text, "integer": len(prompt), "number": len(prompt) / 2, "boolean": True, "array": []}
    properties = response_format["json_schema"]["schema"].get("properties", {})
    return json.dumps({name: values.get(of.get("type")) for name, of in properties.items()})

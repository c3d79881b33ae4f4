"""A pretended provider of batches, over real HTTP: as OpenAI, Anthropic and Gemini have them.

It has a clock of its own: a batch takes ``Settings.seconds`` of it, and ``advance()`` puts it forward. It
answers single requests too, with the same answers, and writes down what it was asked, so that it is known
what was sent twice. Its faults come by the number of a row in its batch, the same in every run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from .batch_anthropic import Anthropic
from .batch_api import TOKEN_CHARACTERS, Asked, Held, missing
from .batch_gemini import Gemini
from .batch_openai import OpenAI
from .http_server import serving
from .provider import Provider, Reply, answer_text
from .provider import Settings as CountingSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .batch_api import Api, Line
    from .http_server import HTTPRequest


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


class BatchProvider:
    """What it holds and answers; `running` serves it.

    Attributes:
        url: where it is.
        files: what was uploaded and not used yet, by id.
        batches: all of them, by id, in order.
        asked: how often each prompt was sent, in batches and singly.
        live: how many single requests there were.
        answer: what a prompt is answered with.
        instead: answers a request in its place, unless it returns ``None``.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Held] = {}
        self.asked: Counter[str] = Counter()
        self.live = 0
        self.answer: Callable[[str], str] = answer_text
        self.instead: Callable[[Asked], Reply | None] = lambda asked: None
        self.requests: list[str] = []
        self._apis: tuple[Api, ...] = (OpenAI(self), Anthropic(self), Gemini(self))
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

    @contextmanager
    def running(self) -> Iterator[BatchProvider]:
        """Serve it from a thread until the block is left."""
        with serving(self._handle, Provider(CountingSettings())) as self.url:
            yield self

    def _handle(self, request: HTTPRequest) -> Reply:
        self.requests.append(f"{request.method} {request.target}")
        self._go_on()
        asked = Asked(request)
        reply = self.instead(asked)
        for api in self._apis:
            reply = reply or api.handle(asked)
        return reply or missing(asked.path)

    def keep(self, content: bytes) -> str:
        """Keep a file that was uploaded; return its name."""
        name = self._number("file")
        self.files[name] = content
        return name

    def answer_live(self, api: Api, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Answer a single request, with its status."""
        self.live += 1
        return self._answered(api, body, refuse=False)

    # Batches as time goes by

    def begin(
        self, api: Api, lines: list[Line], *, endpoint: str = "", name: dict[str, str] | None = None
    ) -> Held:
        """Begin a batch; one beyond the tokens that may be enqueued fails."""
        tokens = sum(len(json.dumps(body)) for _, body in lines) // TOKEN_CHARACTERS
        held = Held(self._number("batch"), api, lines, self.now(), tokens, endpoint, name or {})
        enqueued = sum(each.tokens for each in self.batches.values() if not each.is_done)
        if self.settings.token_limit and enqueued + tokens > self.settings.token_limit:
            held.state, held.code = "failed", "token_limit_exceeded"
        else:
            self.asked.update(api.prompt(body) for _, body in lines)
        self.batches[held.id] = held
        return held

    def cancel(self, held: Held) -> None:
        """End a batch when half of it is answered."""
        if not held.is_done:
            self._end(held, len(held.lines) // 2)
            held.state = "cancelled"

    def _go_on(self) -> None:
        for held in self.batches.values():
            if not held.is_done and self.now() >= held.begun + self.settings.seconds:
                self._end(held, len(held.lines) - self.settings.expire)

    def _end(self, held: Held, answered: int) -> None:
        """Write the results: of so many requests, the others are not answered any more."""
        settings, api = self.settings, held.api
        held.state = "completed" if answered >= len(held.lines) else "expired"
        good: list[bytes] = []
        bad: list[bytes] = []
        for number, (custom_id, body) in enumerate(held.lines, 1):
            if number > answered:
                bad.append(api.unanswered(custom_id))
                continue
            if settings.missing and not number % settings.missing:
                continue
            refuse = bool(settings.refuse) and not number % settings.refuse
            status, answer = self._answered(api, body, refuse=refuse)
            line = api.line(custom_id, status, answer)
            if settings.torn and not number % settings.torn:
                line = line[: len(line) // 2]
            to = good if status == 200 or not api.keeps_errors_apart else bad
            to += [line] * (2 if settings.twice and not number % settings.twice else 1)
        if not api.keeps_errors_apart:
            good, bad = good + bad, []
        if settings.shuffle:
            Random(1).shuffle(good)
        held.output = b"".join(line + b"\n" for line in good)
        held.errors = b"".join(line + b"\n" for line in bad)

    def _answered(self, api: Api, body: dict[str, Any], *, refuse: bool) -> tuple[int, dict[str, Any]]:
        if refuse:
            return 400, api.error("this request is refused")
        prompt = api.prompt(body)
        return 200, api.say(self.answer(prompt), len(prompt) // TOKEN_CHARACTERS + 1, body)

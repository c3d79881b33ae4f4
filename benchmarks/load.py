"""A mixed load that never repeats: every way to prompt, ended in every way, against a faulty provider.

An ``Episode`` is one use of the package, as a plugin would have it: a group with ``map`` or ``prompt()``,
standalone streams with several readers, chains with tools, a conversation with several askers. Which, and
when and how it is stopped, is drawn from a seed. ``Load`` runs some of them side by side, again and again,
and keeps count; an answer that is not the one to its prompt, or an error that nobody caused, is kept too.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import openai
from anyio import get_cancelled_exc_class

from datasette_llm import GroupClosed, PromptCancelled
from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.backends.datasette_side import backend

from .gauges import REFUSE, Refused
from .provider import answer_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from random import Random

    from datasette_llm import LLM, PromptResponse

    from .gauges import Books

KINDS = ("map", "prompts", "alone", "chain", "conversation")
#: How an episode is stopped; most often not at all.
WAYS = ("", "", "", "", "body", "scope", "deadline", "response", "model", "task", "leave")
#: What the provider does, a prompt takes some 50 ms.
SERVER: dict[str, Any] = {
    "latency": 0.03,
    "latency_sigma": 0.8,
    "chunk_seconds": 0.004,
    "error_500": 0.02,
    "error_503": 0.003,
    "error_429": 0.003,
    "disconnect": 0.02,
    "close": 0.01,
    "never": 0.005,
    "broken_sse": 0.005,
    "retry_after": "ms",
    "retry_after_seconds": 0.05,
}
#: This package's configuration, besides the model.
CONFIG: dict[str, Any] = {"timeout": 2, "retries": {"attempts": 3, "timeout": 5}}


class BodyError(Exception):
    """What the body of a block raises to be stopped."""


class ToolError(Exception):
    """What a tool raises."""


EXPECTED = (
    BodyError,
    GroupClosed,
    PromptCancelled,
    Refused,
    TimeoutError,
    openai.APIError,
)


class Load:
    """Runs episodes, and keeps count of them.

    Attributes:
        kinds: episodes that ended, by kind, and by the way in which they were stopped.
        outcomes: right answers, and prompts that ended otherwise, by the name of the error.
        problems: what must not be: wrong answers and unexpected errors.
    """

    def __init__(self, llm: LLM, books: Books) -> None:
        self.llm = llm
        self.books = books
        self.kinds: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    async def warm_up(self, random: Random) -> None:
        """Have done everything once, with what libraries import and keep when it is first done."""
        for kind in KINDS:
            await Episode(self, random, kind=kind, way="").run()

    async def run(self, workers: list[Random], seconds: float) -> None:
        """Keep as many episodes going as there are sources of randomness, for so long."""
        until = anyio.current_time() + seconds
        async with anyio.create_task_group() as tasks:
            for random in workers:
                tasks.start_soon(self._work, random, until)

    async def _work(self, random: Random, until: float) -> None:
        while anyio.current_time() < until:
            await Episode(self, random).run()
            await anyio.sleep(random.uniform(0, 0.1))

    def check(self, text: str, expected: str) -> None:
        """Count an answer that has been read to its end."""
        if text == expected:
            self.outcomes["right"] += 1
        else:
            self.problems.append(f"wrong answer: {text!r} instead of {expected!r}")

    def fail(self, error: BaseException) -> None:
        """Count an error."""
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                self.fail(each)
        elif isinstance(error, EXPECTED) or _is_connection_lost(error):
            self.outcomes[type(error).__name__] += 1
        else:
            self.problems.append(f"unexpected error: {error!r}")


class Episode:
    """One use of the package, and what stops it."""

    def __init__(
        self, load: Load, random: Random, *, kind: str | None = None, way: str | None = None
    ) -> None:
        self.load = load
        self.random = random
        self.kind = getattr(self, random.choice(KINDS) if kind is None else kind)
        self.way = random.choice(WAYS) if way is None else way
        if self.way == "task" and backend() == "trio":
            self.way = "scope"  # Only asyncio has a cancellation of single tasks.
        self.scope = anyio.CancelScope()
        self.model: Any = None
        self.running: list[Any] = []
        self._task: asyncio.Task[Any] | None = None

    async def run(self) -> None:
        """Run it to its end, however it ends."""
        async with anyio.create_task_group() as tasks:
            if self.way in ("scope", "deadline", "response", "model", "task"):
                tasks.start_soon(self._stop)
            await self._block()
            tasks.cancel_scope.cancel()
        self.load.kinds[self.kind.__name__] += 1
        self.load.kinds[f"stopped by {self.way or 'nothing'}"] += 1

    async def _block(self) -> None:
        self._task = asyncio.current_task() if backend() == "asyncio" else None
        try:
            with self.scope:
                await self.kind()
                if self.way == "body":
                    raise BodyError
        except get_cancelled_exc_class():
            if self.way != "task" or self._task is None:
                raise
            if sys.version_info >= (3, 11):
                self._task.uncancel()
        except (Exception, BaseExceptionGroup) as error:
            self.load.fail(error)
        self._task = None

    async def _stop(self) -> None:
        await anyio.sleep(self.random.uniform(0, 0.5))
        if self.way == "scope":
            self.scope.cancel()
        elif self.way == "deadline":
            self.scope.deadline = anyio.current_time() + 0.05
        elif self.way == "task" and self._task is not None:
            self._task.cancel()
        elif self.way == "model" and hasattr(self.model, "cancel"):
            self.model.cancel()
        else:
            for response in self.running:
                response.cancel()

    # What an episode does

    async def map(self) -> None:
        """A group that goes through many items."""
        async with self._group() as model:
            async for prompt, response in model.map(self._source()):
                await self._read(response, prompt)
                if self._leaves():
                    break
            if self.way == "body":
                raise BodyError

    async def prompts(self) -> None:
        """A group of single prompts, streamed, each read by several tasks."""
        async with self._group() as model:
            await self._ask(model, self.random.randint(1, 15))
            if self.way == "body":
                raise BodyError

    async def alone(self) -> None:
        """Standalone prompts."""
        await self._ask(await self.load.llm.model(), self.random.randint(1, 4))

    async def chain(self) -> None:
        """A chain with tools, in a group or not, read in one of the four ways."""
        if self.random.random() < 0.5:
            async with self._group() as model:
                await self._chain(model)
        else:
            await self._chain(await self.load.llm.model())

    async def conversation(self) -> None:
        """Several askers in one conversation, in a group or not."""
        if self.random.random() < 0.5:
            async with self._group() as model:
                await self._ask(model.conversation(), 4)
        else:
            await self._ask((await self.load.llm.model()).conversation(), 4)

    # How it does so

    @asynccontextmanager
    async def _group(self) -> AsyncIterator[Any]:
        on_error: Any = self.random.choice(("collect", "collect", "collect", "cancel"))
        concurrency = self.random.choice((None, 2, 5, 10))
        async with self.load.llm.group(concurrency=concurrency, on_error=on_error) as self.model:
            self.load.books.groups += 1
            yield self.model

    def _prompt(self) -> str:
        refused = f" {REFUSE}" if self.random.random() < 0.02 else ""
        return f"{self.kind.__name__} {self.random.getrandbits(64):x}{refused}"

    def _leaves(self) -> bool:
        return self.way == "leave" and self.random.random() < 0.3

    async def _source(self) -> AsyncIterator[str]:
        for _ in range(self.random.randint(1, 40)):
            if self.random.random() < 0.1:
                await anyio.sleep(0.01)
            yield self._prompt()

    async def _ask(self, model: Any, count: int) -> None:
        async with anyio.create_task_group() as askers:
            for _ in range(count):
                askers.start_soon(self._ask_one, model)
                await anyio.sleep(0.002)

    async def _ask_one(self, model: Any) -> None:
        prompt = self._prompt()
        try:
            response = await model.prompt(prompt, stream=self.random.random() < 0.8)
        except EXPECTED as error:
            self.load.fail(error)
            return
        self.running.append(response)
        async with anyio.create_task_group() as readers:
            for _ in range(self.random.randint(0, 3)):
                readers.start_soon(self._read, response, prompt)

    async def _read(self, response: PromptResponse, prompt: str) -> None:
        try:
            if self.random.random() < 0.3:
                text = await response.text()
            else:
                text = ""
                async for piece in response:
                    text += piece
                    if self._leaves():
                        return
        except Exception as error:
            self.load.fail(error)
        else:
            self.load.check(text, answer_text(prompt))

    async def _chain(self, model: Any) -> None:
        prompt = self._prompt()

        async def look_up(text: str) -> str:
            """Ask the model itself."""
            answer: str = await (await model.prompt(f"tool {text}")).text()
            return answer

        def fail(text: str) -> str:
            """Never work."""
            raise ToolError(text)

        def measure(text: str) -> str:
            """Count characters."""
            return f"{text}: {len(text)}"

        chain = model.chain(prompt, tools=[look_up, fail, measure])
        self.running.append(chain)
        async with anyio.create_task_group() as readers:
            for _ in range(self.random.randint(1, 2)):
                readers.start_soon(self._read_chain, chain, answer_text(measure(prompt)))

    async def _read_chain(self, chain: Any, expected: str) -> None:
        way = self.random.randrange(4)
        try:
            if way == 0:
                text = await chain.text()
            else:
                text = await self._pieces(chain, way)
        except Exception as error:
            self.load.fail(error)
        else:
            if text is not None:
                self.load.check(text, expected)

    async def _pieces(self, chain: Any, way: int) -> str | None:
        source = (chain.responses(), aiter(chain), chain.astream_events())[way - 1]
        text = ""
        async for piece in source:
            if self._leaves():
                if self.random.random() < 0.5:
                    # Else it is only dropped, as a loop that is left with break does.
                    await source.aclose()
                return None
            if way == 1:
                text += await piece.text()
            elif way == 2:
                text += piece
            elif piece.type == "text":
                text += piece.chunk
        return text


def _is_connection_lost(error: BaseException) -> bool:
    # A stream that breaks off half-way raises what the HTTP library has for it (httpx or httpx2), or ends
    # in the middle of an event, which the SDK stumbles over.
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2") or isinstance(
        error.__cause__, json.JSONDecodeError
    )

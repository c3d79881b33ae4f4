"""A line that is too long is no failed attempt: the limit falls, and the row waits again; on virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import LLM
from tests.fakes import FakeModel, registered
from tests.hooks import datasette_with

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Busy(Exception):
    """What Ollama says when ``OLLAMA_MAX_QUEUE`` requests wait."""

    status_code = 503

    def __init__(self) -> None:
        super().__init__("server busy, please try again.  maximum pending requests exceeded")


class Server:
    """Works on few prompts at a time, and has the others wait in a line.

    Args:
        slots: how many it works on.
        seconds: what an answer takes.
        line: how many may wait; the next one is told that it is busy.
    """

    def __init__(self, slots: int, seconds: float, line: float = float("inf")) -> None:
        self.desk = anyio.Semaphore(slots)
        self.seconds = seconds
        self.most = slots + line
        self.here = 0
        self.asked: list[int] = []
        self.busy = 0

    async def answer(self, prompt: str) -> AsyncGenerator[Any, None]:
        if self.here >= self.most:
            self.busy += 1
            raise Busy
        self.here += 1
        self.asked.append(self.here)
        try:
            async with self.desk:
                await anyio.sleep(self.seconds)
        finally:
            self.here -= 1
        yield prompt


async def run_job(server: Server, prompts: int, config: dict[str, Any]) -> tuple[list[Any], Any]:
    with registered(FakeModel(server.answer)):
        async with LLM(datasette_with(config)).group("fake", outage_timeout=1800) as model:
            errors = [response.error async for _, response in model.map(range(prompts), str)]
        return errors, model.stats


async def test_a_prompt_that_times_out_in_a_line_waits_again() -> None:
    # Of the first 20 the last ones would wait for four minutes.
    server = Server(slots=1, seconds=12)
    errors, stats = await run_job(server, 60, {"timeout": 60, "retries": {"attempts": 1}})
    assert errors == [None] * 60
    assert stats.failed == 0
    assert len(server.asked) > 60
    # It does not happen again.
    assert len(server.asked) <= 60 + 40
    assert max(server.asked[-30:]) <= 5


@pytest.mark.parametrize("line", [6, 30])
async def test_a_line_that_is_full_is_waited_for(line: int) -> None:
    server = Server(slots=2, seconds=6, line=line)
    errors, stats = await run_job(server, 60, {"retries": {"attempts": 1}})
    assert errors == [None] * 60
    assert stats.away is None
    assert 0 < server.busy <= 60
    assert len(server.asked) == 60


async def test_whoever_waits_for_the_answer_is_told_that_the_line_is_full() -> None:
    server = Server(slots=0, seconds=1, line=0)
    with registered(FakeModel(server.answer)):
        model = await LLM(datasette_with({"retries": {"attempts": 2}})).model("fake")
        response = await model.prompt("hi")
        with pytest.raises(Busy):
            await response.text()
    assert server.busy == 2

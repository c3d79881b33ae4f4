"""Real HTTP: whatever ends a prompt, the provider sees its connection close."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from datasette_llm import PromptCancelled

from .provider import openai_model, provider_server
from .spies import Spy, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.launch import Server

pytestmark = [
    pytest.mark.real_clock,
    pytest.mark.system,
    # openai's client leaves the generators of a stream it has read to its end to the garbage collector.
    pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning"),
]

PROMPTS = 5


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with provider_server() as running:
        yield running


async def until(server: Server, **wanted: int) -> dict[str, Any]:
    """Poll the server until its counts are these; the test's own timeout ends the wait."""
    while True:
        counts = await anyio.to_thread.run_sync(lambda: server.counts)
        if all(counts[name] == value for name, value in wanted.items()):
            return counts
        await anyio.sleep(0.01)


class BodyError(Exception):
    pass


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("way", ["body", "scope", "response", "model"])
async def test_cancelling_closes_the_connections(server: Server, way: str, stream: bool) -> None:
    server.configure(latency=0.0 if stream else 60.0, chunks=1000, chunk_seconds=0.1)
    before = server.counts["open_connections"]
    spy = Spy()
    with watched(openai_model(server), spy) as llm:
        try:
            with anyio.CancelScope() as scope:
                async with llm.group() as group:
                    responses = [await group.prompt(f"{way} {n}", stream=stream) for n in range(PROMPTS)]
                    await until(server, requests=PROMPTS)
                    if stream:
                        for response in responses:
                            await anext(response)
                    if way == "body":
                        raise BodyError
                    if way == "scope":
                        scope.cancel()
                    elif way == "model":
                        group.cancel()
                    for response in responses if way == "response" else []:
                        response.cancel()
        except BodyError:
            assert way == "body"
        counts = await until(server, open_connections=before, client_disconnects=PROMPTS)
        assert counts["answered"] == 0
    spy.check()
    assert all(isinstance(visit.saw, PromptCancelled) for visit in spy.visits)
    assert len(spy.exits) == 1


async def test_a_standalone_prompt_that_is_cancelled_closes_its_connection(server: Server) -> None:
    server.configure(chunks=1000, chunk_seconds=0.1)
    with watched(openai_model(server), Spy()) as llm:
        response = await (await llm.model()).prompt("standalone")
        await anext(response)
        response.cancel()
        with pytest.raises(PromptCancelled):
            await response.text()
        await until(server, client_disconnects=1)


async def test_a_reader_that_leaves_closes_nothing(server: Server) -> None:
    server.configure(chunks=10, chunk_seconds=0.01)
    with watched(openai_model(server)) as llm:
        async with llm.group() as group:
            response = await group.prompt("read on")
            async for _ in response:
                break
        counts = await until(server, answered=1)
        assert counts["client_disconnects"] == 0
        assert await response.text()

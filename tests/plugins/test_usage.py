"""datasette-llm-usage: a row per response, whoever asked and however."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from datasette.plugins import pm

from datasette_llm import LLM
from datasette_llm.backends.datasette_side import call

from ..fakes import FakeModel, registered
from .servers import ToolModel, look_up, query, started

pytest.importorskip("datasette_llm_usage", reason="datasette-llm-usage is not installed")

import datasette_llm_usage  # not installed everywhere

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

pytestmark = pytest.mark.real_clock

USAGE = "select model, purpose, actor_id, input_tokens, output_tokens from llm_usage order by id"
LOG = "select prompt, response, tool_calls, tool_results from llm_usage_prompt_log order by id"


@pytest.fixture(autouse=True)
def _plugin() -> None:
    pm.register(datasette_llm_usage)


class TestRows:
    async def test_standalone(self) -> None:
        with registered(FakeModel()):
            datasette = await started()
            model = await LLM(datasette).model("fake", purpose="chat", actor={"id": "ana"})
            assert await (await model.prompt("two words")).text() == "two words"
            assert await query(datasette, USAGE) == [("fake", "chat", "ana", 2, 1)]

    async def test_standalone_that_nobody_reads(self) -> None:
        with registered(FakeModel()):
            datasette = await started()
            response = await (await LLM(datasette).model()).prompt("two words")
            await response.usage()  # Waits for the end, and reads no chunk.
            assert await query(datasette, USAGE) == [("fake", None, None, 2, 1)]

    async def test_group_and_map(self) -> None:
        with registered(FakeModel()):
            datasette = await started()
            async with LLM(datasette).group(purpose="bulk", actor={"id": "ana"}, concurrency=5) as model:
                await model.prompt("three words here")
                async for _, response in model.map(f"item {number}" for number in range(30)):
                    # The row is there before the reader has the answer.
                    assert response.error is None
                    assert len(await query(datasette, USAGE)) >= 1
            rows = sorted(await query(datasette, USAGE))
            assert rows == [("fake", "bulk", "ana", 2, 1)] * 30 + [("fake", "bulk", "ana", 3, 1)]

    @pytest.mark.parametrize("reading", ["text", "responses", "iteration", "events"])
    async def test_chain_has_a_row_per_response_however_it_is_read(self, reading: str) -> None:
        with registered(ToolModel()):
            datasette = await started(datasette_llm_usage={"log_prompts": True})
            model = await LLM(datasette).model("fake", purpose="chat")
            chain = model.chain("who?", tools=[look_up])
            if reading == "text":
                assert await chain.text() == "ana found"
            elif reading == "responses":
                texts = [await response.text() async for response in chain.responses()]
                assert texts == ["", "ana found"]
            elif reading == "iteration":
                assert "".join([chunk async for chunk in chain]) == "ana found"
            else:
                assert [event async for event in chain.astream_events()]
            assert await query(datasette, USAGE) == [("fake", "chat", None, 1, 1)] * 2
            (asked, called), (_, answered) = [
                ((prompt, response), (calls, results))
                for prompt, response, calls, results in await query(datasette, LOG)
            ]
            assert asked == ("who?", "")
            assert [call["name"] for call in json.loads(called[0])] == ["look_up"]
            assert [result["output"] for result in json.loads(answered[1])] == ["ana found"]

    async def test_chain_in_a_group(self) -> None:
        with registered(ToolModel()):
            datasette = await started()
            async with LLM(datasette).group() as model:
                assert await model.chain("who?", tools=[look_up]).text() == "ana found"
            assert await query(datasette, USAGE) == [("fake", None, None, 1, 1)] * 2

    async def test_conversation(self) -> None:
        with registered(FakeModel()):
            datasette = await started()
            conversation = (await LLM(datasette).model()).conversation()
            for prompt in ("one", "and two"):
                await (await conversation.prompt(prompt)).text()
            assert [row[3] for row in await query(datasette, USAGE)] == [1, 2]

    async def test_failed_prompts_have_none(self) -> None:
        async def script(prompt: str) -> AsyncGenerator[str, None]:
            if prompt == "fail":
                raise ValueError("no answer")
            yield prompt

        with registered(FakeModel(script)):
            datasette = await started()
            async with LLM(datasette).group() as model:
                async for item, response in model.map(["fine", "fail", "fine"]):
                    assert (response.error is None) == (item == "fine")
            assert len(await query(datasette, USAGE)) == 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_its_own_page(anyio_backend: str) -> None:
    with registered(FakeModel()):
        datasette = await started()
        datasette.root_enabled = True
        page = await call(
            datasette.client.get,
            "/-/llm-usage-simple-prompt?prompt=hello+there&model=fake",
            actor={"id": "root"},
        )
        assert page.status_code == 200
        assert "hello there" in page.text
        assert await query(datasette, USAGE) == [("fake", "simple_prompt", "root", 2, 1)]

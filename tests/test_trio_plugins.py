"""Other people's plugins under trio, with a real Datasette: usage rows, budgets reserved and settled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import llm
import pytest
import trio
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_llm import LLM, PromptCancelled
from datasette_llm.backends.datasette_side import call

from .fakes import FakeModel, registered
from .hooks import hooked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

pytest.importorskip("datasette_llm_accountant")
pytest.importorskip("datasette_llm_usage")

import datasette_llm_accountant  # not installed everywhere
import datasette_llm_usage
from datasette_llm_accountant import Accountant, InsufficientBalanceError, Nanocents, PricingProvider, Tx

pytestmark = pytest.mark.real_clock


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


@pytest.fixture(autouse=True)
def _plugins() -> None:
    for plugin in (datasette_llm_accountant, datasette_llm_usage):
        pm.register(plugin)


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    with registered(fake):
        yield fake


async def started() -> Datasette:
    datasette = Datasette(config={"plugins": {"datasette-llm": {"default_model": "fake"}}})
    await call(datasette.invoke_startup)
    return datasette


async def usage_rows(datasette: Datasette) -> list[tuple[Any, ...]]:
    rows = await call(
        datasette.get_internal_database().execute,
        "select model, purpose, actor_id, input_tokens, output_tokens from llm_usage order by id",
    )
    return [tuple(row) for row in rows.rows]


class Ledger(Accountant):  # type: ignore[misc]  # it ships no types
    """An accountant that keeps its books in Datasette's internal database, as a real one would."""

    def __init__(self, datasette: Datasette, balance: int = 10**15) -> None:
        self.db = datasette.get_internal_database()
        self.balance = balance

    async def prepare(self) -> None:
        await self.db.execute_write(
            "create table if not exists ledger (id integer primary key, reserved integer, settled integer)"
        )

    async def reserve(self, nanocents: int, **about: Any) -> Tx:
        await asyncio.sleep(0)
        if nanocents > self.balance:
            raise InsufficientBalanceError("nothing left")
        written = await self.db.execute_write("insert into ledger (reserved) values (?)", [nanocents])
        return Tx(written.lastrowid)

    async def settle(self, tx: Tx, nanocents: int, **about: Any) -> None:
        await self.db.execute_write("update ledger set settled = ? where id = ?", [nanocents, int(tx)])

    async def rows(self) -> list[tuple[int, int | None]]:
        rows = await call(self.db.execute, "select reserved, settled from ledger order by id")
        return [tuple(row) for row in rows.rows]


class TokenPrice(PricingProvider):  # type: ignore[misc]  # it ships no types
    """One nanocent per token."""

    async def calculate_cost_from_response(self, model_id: str, usage: Any, response: Any) -> Any:
        return Nanocents(usage.input + usage.output)


@pytest.fixture
def ledger_hooks() -> Callable[[Ledger], Any]:
    def hooks(ledger: Ledger) -> Any:
        return hooked(
            register_llm_accountants=lambda datasette: [ledger],
            register_llm_accountant_pricing=lambda datasette: TokenPrice(),
        )

    return hooks


class TestUsage:
    async def test_a_standalone_prompt_is_a_row(self, model: FakeModel) -> None:
        datasette = await started()
        prompting = await LLM(datasette).model("fake", purpose="chat", actor={"id": "ana"})
        response = await prompting.prompt("two words")
        assert await response.text() == "two words"
        assert await usage_rows(datasette) == [("fake", "chat", "ana", 2, 1)]

    async def test_a_group_is_a_row_per_prompt(self, model: FakeModel) -> None:
        datasette = await started()
        async with LLM(datasette).group("fake", purpose="bulk", concurrency=5) as group:
            await group.prompt("three words here")
            async for _, response in group.map(f"item {number}" for number in range(20)):
                assert response.error is None
        rows = await usage_rows(datasette)
        assert sorted(rows) == [("fake", "bulk", None, 2, 1)] * 20 + [("fake", "bulk", None, 3, 1)]

    async def test_a_chain_with_a_tool_is_a_row_per_turn(self) -> None:
        events: list[str] = []

        async def look_up(name: str) -> str:
            """Look a name up."""
            await anyio.lowlevel.checkpoint()
            events.append(name)
            return f"{name} found"

        turns = iter([True, False])

        class ToolModel(FakeModel):
            async def execute(
                self, prompt: Any, stream: bool, response: Any, conversation: Any = None
            ) -> AsyncGenerator[Any, None]:
                if next(turns):
                    response.add_tool_call(
                        llm.ToolCall(name="look_up", arguments={"name": "ana"}, tool_call_id="1")
                    )
                    yield ""
                else:
                    yield prompt.tool_results[0].output
                response.set_usage(input=1, output=1)

        with registered(ToolModel()):
            datasette = await started()
            prompting = await LLM(datasette).model("fake", purpose="chat")
            assert await prompting.chain("who?", tools=[look_up]).text() == "ana found"
            assert events == ["ana"]
            assert await usage_rows(datasette) == [("fake", "chat", None, 1, 1)] * 2


class TestAccountant:
    async def test_a_standalone_prompt_reserves_and_settles(
        self, model: FakeModel, ledger_hooks: Callable[[Ledger], Any]
    ) -> None:
        datasette = await started()
        ledger = Ledger(datasette)
        await call(ledger.prepare)
        with ledger_hooks(ledger):
            response = await (await LLM(datasette).model()).prompt("two words")
            await response.text()
            assert [settled for _, settled in await ledger.rows()] == [3]

    async def test_a_group_reserves_once_and_settles_once(
        self, model: FakeModel, ledger_hooks: Callable[[Ledger], Any]
    ) -> None:
        datasette = await started()
        ledger = Ledger(datasette)
        await call(ledger.prepare)
        with ledger_hooks(ledger):
            async with LLM(datasette).group(concurrency=8) as group:
                async with anyio.create_task_group() as tasks:
                    for number in range(8):
                        tasks.start_soon(group.prompt, f"prompt {number}")
                async for _, response in group.map(["a b", "c d"]):
                    assert response.error is None
            assert [settled for _, settled in await ledger.rows()] == [30]

    async def test_a_refusal_is_raised_bare_by_prompt(
        self, model: FakeModel, ledger_hooks: Callable[[Ledger], Any]
    ) -> None:
        datasette = await started()
        ledger = Ledger(datasette, balance=0)
        await call(ledger.prepare)
        with ledger_hooks(ledger):
            prompting = await LLM(datasette).model()
            with pytest.raises(InsufficientBalanceError, match="nothing left"):
                await prompting.prompt("refused")
        assert model.prompts == []

    async def test_failed_and_cancelled_prompts_leave_no_reservation_open(
        self, ledger_hooks: Callable[[Ledger], Any]
    ) -> None:
        running = trio.Event()

        async def script(prompt: str) -> AsyncGenerator[str, None]:
            if prompt == "fail":
                raise ValueError("from the model")
            running.set()
            await anyio.sleep_forever()
            yield "never"

        fake = FakeModel(script)
        with registered(fake):
            datasette = await started()
            ledger = Ledger(datasette)
            await call(ledger.prepare)
            with ledger_hooks(ledger):
                prompting = await LLM(datasette).model()
                failing = await prompting.prompt("fail")
                with pytest.raises(ValueError, match="from the model"):
                    await failing.text()
                cancelled = await prompting.prompt("wait")
                await running.wait()
                cancelled.cancel()
                with pytest.raises(PromptCancelled):
                    await cancelled.text()
                running = trio.Event()
                with trio.move_on_after(60) as scope:
                    async with LLM(datasette).group() as group:
                        await group.prompt("wait")
                        await running.wait()
                        scope.cancel()
                        await trio.sleep_forever()
                assert scope.cancelled_caught
            assert [settled for _, settled in await ledger.rows()] == [0, 0, 0]
            assert fake.counts["opened"] == fake.counts["closed"] == 3


def test_prompts_nobody_waits_for_settle_before_the_run_ends(ledger_hooks: Callable[[Ledger], Any]) -> None:
    """The root supervisor's grace period still has the database, although the main task is done."""
    ledgers: list[Ledger] = []

    async def main() -> None:
        datasette = await started()
        ledgers.append(Ledger(datasette))
        await call(ledgers[0].prepare)
        with ledger_hooks(ledgers[0]):
            await (await LLM(datasette).model()).prompt("left running")
        # The hooks are unregistered: what was entered is left all the same.

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        await anyio.sleep_forever()
        yield "never"

    async def read() -> list[tuple[int, int | None]]:
        return await ledgers[0].rows()

    with registered(FakeModel(script)):
        trio.run(main)
        assert [settled for _, settled in anyio.run(read)] == [0]

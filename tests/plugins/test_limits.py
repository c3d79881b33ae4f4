"""datasette-llm-limits: spending caps that refuse a prompt, and stop a group in the middle."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from datasette.plugins import pm

from datasette_llm import LLM

from ..fakes import FakeModel, registered
from ..hooks import hooked
from .bookkeeping import TokenPrice
from .servers import ToolModel, look_up, query, started

pytest.importorskip("datasette_llm_limits", reason="datasette-llm-limits is not installed")

import datasette_llm_accountant  # not installed everywhere
import datasette_llm_limits
from datasette_llm_accountant import InsufficientBalanceError, Nanocents, ReservationExceededError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from datasette.app import Datasette

pytestmark = pytest.mark.real_clock

CENT = int(Nanocents.from_cents(1))
TRANSACTIONS = """
    select purpose, actor_id, reserved_nanocents, settled_nanocents from llm_limits_tx order by rowid
"""
OPEN = "select count(*) from llm_limits_tx where settled_at is null"


@pytest.fixture(autouse=True)
def _plugins() -> Iterator[None]:
    pm.register(datasette_llm_accountant)
    pm.register(datasette_llm_limits)
    with a_cent_per_token():
        yield


@contextmanager
def a_cent_per_token() -> Iterator[None]:
    with hooked(register_llm_accountant_pricing=lambda datasette: TokenPrice(CENT)):
        yield


async def limited(
    usd: float, *, scope: str = "instance", reserve_usd: float = 0.5, **limit: Any
) -> Datasette:
    return await started(
        datasette_llm_limits={
            "limits": {
                "daily": {"scope": scope, "window": "rolling-24h", "amount_usd": usd, **limit},
            }
        },
        datasette_llm_accountant={
            "default_reservation_usd": reserve_usd,
            "auto_reservation_usd": 0.1,
        },
    )


async def test_prompts_until_the_limit() -> None:
    with registered(fake := FakeModel()):
        datasette = await limited(0.16)
        model = await LLM(datasette).model(purpose="chat", actor={"id": "ana"})
        for _ in range(3):
            assert await (await model.prompt("one")).text() == "one"
        # Six of sixteen cents are used: exactly what a prompt reserves is left.
        assert await (await model.prompt("this is six tokens in all")).text()
        with pytest.raises(InsufficientBalanceError, match=r'^Limit "daily" exceeded: \$0.13 used of \$0.16'):
            await model.prompt("one")
        assert len(fake.prompts) == 4
        rows = await query(datasette, TRANSACTIONS)
        assert rows == [("chat", "ana", 10 * CENT, used * CENT) for used in (2, 2, 2, 7)]


async def test_failed_prompts_give_everything_back() -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        raise ValueError("no answer")
        yield ""

    with registered(FakeModel(script)):
        datasette = await limited(0.1)
        model = await LLM(datasette).model()
        for _ in range(5):
            with pytest.raises(ValueError, match="no answer"):
                await (await model.prompt("one")).text()
        assert await query(datasette, TRANSACTIONS) == [(None, None, 10 * CENT, 0)] * 5


async def test_a_group_is_stopped_in_the_middle() -> None:
    """The error of the callback that noticed reaches the reader; what was used is in the books."""
    with registered(fake := FakeModel()):
        datasette = await limited(1, reserve_usd=0.2)
        answered = 0

        async def run() -> None:
            nonlocal answered
            async with LLM(datasette).group(purpose="bulk", actor={"id": "ana"}, concurrency=2) as model:
                async for _, response in model.map(f"item {number}" for number in range(1_000)):
                    await response.text()
                    answered += 1

        with pytest.raises(ReservationExceededError):
            await run()
        # Three tokens each and twenty cents reserved: six fit, and the other slot may have been a
        # prompt ahead.
        assert answered == 6
        assert 7 <= len(fake.prompts) <= 10
        ((purpose, actor_id, reserved, settled),) = await query(datasette, TRANSACTIONS)
        assert (purpose, actor_id, reserved) == ("bulk", "ana", 20 * CENT)
        assert 7 * 3 * CENT <= settled <= len(fake.prompts) * 3 * CENT


async def test_the_next_group_is_refused_and_the_error_is_bare() -> None:
    with registered(FakeModel()):
        datasette = await limited(0.55)
        llms = LLM(datasette)
        async with llms.group() as model:
            async for _, response in model.map(["two words"] * 2):
                assert response.error is None

        async def one_more() -> None:
            async with llms.group() as model:
                await model.prompt("one more")

        async def two_more() -> None:
            async with llms.group() as model:
                async for _, response in model.map(["one", "more"]):
                    await response.text()

        for run in (one_more, two_more):
            with pytest.raises(InsufficientBalanceError, match="daily"):
                await run()
        assert await query(datasette, TRANSACTIONS) == [(None, None, 50 * CENT, 6 * CENT)]


async def test_a_reservation_counts_while_the_group_runs() -> None:
    running = anyio.Event()
    go_on = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        running.set()
        await go_on.wait()
        yield prompt

    with registered(FakeModel(script)):
        datasette = await limited(0.55)
        llms = LLM(datasette)
        async with llms.group() as model:
            response = await model.prompt("first")
            await running.wait()
            with pytest.raises(InsufficientBalanceError):
                await (await llms.model()).prompt("meanwhile")
            go_on.set()
            assert await response.text() == "first"
        assert await (await (await llms.model()).prompt("afterwards")).text() == "afterwards"
        assert await query(datasette, OPEN) == [(0,)]


async def test_two_groups_start_at_once_and_one_fits() -> None:
    with registered(FakeModel()):
        datasette = await limited(0.9)
        outcomes: list[str] = []
        inside = anyio.Event()

        async def run() -> None:
            try:
                async with LLM(datasette).group() as model:
                    await (await model.prompt("two words")).text()
                    outcomes.append("in")
                    await inside.wait()
            except InsufficientBalanceError:
                outcomes.append("refused")
                inside.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            tasks.start_soon(run)
        assert sorted(outcomes) == ["in", "refused"]
        assert await query(datasette, TRANSACTIONS) == [(None, None, 50 * CENT, 3 * CENT)]


async def test_limits_of_one_actor_and_purpose() -> None:
    with registered(FakeModel()):
        datasette = await limited(0.11, scope="actor", purpose="chat")
        llms = LLM(datasette)

        async def ask(actor_id: str, purpose: str) -> str:
            model = await llms.model(purpose=purpose, actor={"id": actor_id})
            return await (await model.prompt("one")).text()

        assert await ask("ana", "chat") == "one"
        with pytest.raises(InsufficientBalanceError):
            await ask("ana", "chat")
        assert await ask("bob", "chat") == "one"
        assert await ask("ana", "extract") == "one"


async def test_a_chain_is_one_transaction() -> None:
    with registered(ToolModel()):
        datasette = await limited(1)
        model = await LLM(datasette).model()
        assert await model.chain("who?", tools=[look_up]).text() == "ana found"
        assert await query(datasette, TRANSACTIONS) == [(None, None, 10 * CENT, 4 * CENT)]


async def test_cancelled_groups_are_settled() -> None:
    running = anyio.Event()

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "wait":
            running.set()
            await anyio.sleep_forever()
        yield prompt

    with registered(FakeModel(script)):
        datasette = await limited(1)
        with anyio.CancelScope() as scope:
            async with LLM(datasette).group() as model:
                await (await model.prompt("two words")).text()
                await model.prompt("wait")
                await running.wait()
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught
        assert await query(datasette, TRANSACTIONS) == [(None, None, 50 * CENT, 3 * CENT)]

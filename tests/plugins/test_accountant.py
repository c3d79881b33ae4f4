"""datasette-llm-accountant: one reservation per group, one per prompt or chain outside; none left open."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import llm
import pytest
from datasette.plugins import pm

from datasette_llm import LLM, ModelNotFoundError, PromptCancelled
from datasette_llm.tasks.group import Group

from ..fakes import FakeModel, registered
from ..hooks import datasette_with, hooked
from .bookkeeping import Books, TokenPrice
from .servers import ToolModel, look_up

pytest.importorskip("datasette_llm_accountant", reason="datasette-llm-accountant is not installed")

import datasette_llm_accountant  # not installed everywhere
from datasette_llm_accountant import InsufficientBalanceError, ReservationExceededError
from datasette_llm_accountant.hooks import _active_reservations

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator


@pytest.fixture(autouse=True)
def _plugin() -> Iterator[None]:
    pm.register(datasette_llm_accountant)
    yield
    assert not _active_reservations, "a group's reservation was never given to llm_group_exit"


@contextmanager
def accounting(*books: Books, price: TokenPrice | None = None) -> Iterator[None]:
    with hooked(
        register_llm_accountants=lambda datasette: list(books),
        register_llm_accountant_pricing=lambda datasette: price or TokenPrice(),
    ):
        yield


def facade(**accountant: Any) -> LLM:
    datasette = datasette_with({"default_model": "fake"})
    datasette.config["plugins"]["datasette-llm-accountant"] = accountant
    return LLM(datasette)


class Waiting:
    """A script for a model: ``wait`` waits for ever, ``fail`` fails, anything else is echoed."""

    def __init__(self) -> None:
        self.began = anyio.Event()

    async def __call__(self, prompt: str) -> AsyncGenerator[str, None]:
        if prompt == "fail":
            raise ValueError("from the model")
        if prompt == "wait":
            self.began.set()
            await anyio.sleep_forever()
        yield prompt


class TestOutsideGroups:
    async def test_settled_for_what_it_cost_before_the_reader_has_the_answer(self) -> None:
        books = Books()
        with registered(FakeModel()), accounting(books):
            model = await facade().model(purpose="chat", actor={"id": "ana"})
            response = await model.prompt("two words")
            await response.text()
            assert books.settled == [3]
            assert books.about == [("fake", "chat", "ana")]
        assert books.balanced

    async def test_refused(self) -> None:
        books = Books(refusals=1)
        fake = FakeModel()
        with registered(fake), accounting(books):
            model = await facade().model()
            with pytest.raises(InsufficientBalanceError, match="nothing left"):
                await model.prompt("refused")
            assert fake.prompts == []
            assert await (await model.prompt("granted")).text() == "granted"
        assert books.settled == [2]
        assert books.balanced

    async def test_of_two_accountants_the_second_refuses(self) -> None:
        first, second = Books(), Books(refusals=1)
        with registered(FakeModel()), accounting(first, second):
            model = await facade().model()
            with pytest.raises(InsufficientBalanceError):
                await model.prompt("refused")
        assert first.rolled_back == 1
        assert first.balanced
        assert second.balanced

    async def test_failed_is_rolled_back(self) -> None:
        books = Books()
        with registered(FakeModel(Waiting())), accounting(books):
            response = await (await facade().model()).prompt("fail")
            with pytest.raises(ValueError, match="from the model"):
                await response.text()
        assert books.rolled_back == 1
        assert books.balanced

    @pytest.mark.parametrize("how", ["response.cancel()", "the caller is cancelled", "a deadline"])
    async def test_cancelled_is_rolled_back(self, how: str) -> None:
        books, waiting = Books(), Waiting()
        fake = FakeModel(waiting)
        with registered(fake), accounting(books):
            model = await facade().model()
            if how == "response.cancel()":
                response = await model.prompt("wait")
                await waiting.began.wait()
                response.cancel()
                with pytest.raises(PromptCancelled):
                    await response.text()
            elif how == "the caller is cancelled":
                with anyio.CancelScope() as scope:
                    response = await model.prompt("wait")
                    await waiting.began.wait()
                    scope.cancel()
                    await response.text()
                # A reader that goes away takes nothing with it: others may be reading.
                assert not response.done
                response.cancel()
                with pytest.raises(PromptCancelled):
                    await response.text()
            else:
                with anyio.move_on_after(5):
                    response = await model.prompt("wait")
                    await response.text()
                response.cancel()
                with pytest.raises(PromptCancelled):
                    await response.text()
        assert books.rolled_back == 1
        assert books.balanced
        assert fake.counts["opened"] == fake.counts["closed"] == 1

    @pytest.mark.parametrize("reading", ["text", "responses", "iteration", "events"])
    async def test_chain_is_one_transaction(self, reading: str) -> None:
        books = Books()
        with registered(ToolModel()), accounting(books):
            chain = (await facade().model()).chain("who?", tools=[look_up])
            if reading == "text":
                assert await chain.text() == "ana found"
            elif reading == "responses":
                assert [await response.text() async for response in chain.responses()] == ["", "ana found"]
            elif reading == "iteration":
                assert "".join([chunk async for chunk in chain]) == "ana found"
            else:
                assert [event async for event in chain.astream_events()]
        assert books.settled == [4]
        assert books.balanced

    async def test_paused_chain_is_settled_for_what_it_used(self) -> None:
        def before_call(tool: Any, tool_call: Any) -> None:
            raise llm.PauseChain("ask a person first")

        books = Books()
        with registered(ToolModel()), accounting(books):
            chain = (await facade().model()).chain("who?", tools=[look_up], before_call=before_call)
            with pytest.raises(llm.PauseChain):
                await chain.text()
        assert books.settled == [2]
        assert books.balanced

    async def test_chain_whose_model_fails_is_rolled_back(self) -> None:
        books = Books()
        with registered(FakeModel(Waiting())), accounting(books):
            chain = (await facade().model()).chain("fail")
            with pytest.raises(ValueError, match="from the model"):
                await chain.text()
        assert books.rolled_back == 1
        assert books.balanced

    async def test_chain_whose_reader_is_cancelled_is_closed(self) -> None:
        books, waiting = Books(), Waiting()
        with registered(FakeModel(waiting)), accounting(books):
            chain = (await facade().model()).chain("wait")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(chain.text)
                await waiting.began.wait()
                tasks.cancel_scope.cancel()
            del chain
            gc.collect()
            await anyio.sleep(60)
        assert books.balanced
        assert books.reservations == 1


class TestGroups:
    async def test_one_reservation(self) -> None:
        books = Books()
        with registered(FakeModel()), accounting(books):
            async with facade().group(purpose="bulk", actor={"id": "ana"}) as model:
                await (await model.prompt("two words")).text()
                async for _, response in model.map(["a b", "c d"]):
                    assert response.error is None
                assert books.settled == []
            assert books.settled == [9]
            assert books.about == [("fake", "bulk", "ana")]
        assert books.balanced

    async def test_eight_prompts_at_once_before_the_first_is_in(self) -> None:
        books = Books()
        with registered(FakeModel(seconds=1)), accounting(books):
            async with facade().group() as model, anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(model.prompt, f"prompt {number}")
        assert books.reservations == 1
        assert books.settled == [24]
        assert books.balanced

    async def test_the_first_two_are_refused(self) -> None:
        books = Books(refusals=2)
        errors: list[Exception] = []
        with registered(FakeModel(seconds=1)), accounting(books):
            async with facade().group() as model:

                async def ask(number: int) -> None:
                    try:
                        await model.prompt(f"prompt {number}")
                    except InsufficientBalanceError as error:
                        errors.append(error)

                async with anyio.create_task_group() as tasks:
                    for number in range(8):
                        tasks.start_soon(ask, number)
        assert len(errors) == 2
        assert books.reservations == 1
        assert books.settled == [18]
        assert books.balanced

    async def test_every_one_is_refused_in_a_map(self) -> None:
        books = Books(refusals=100)
        with registered(fake := FakeModel()), accounting(books):
            async with facade().group() as model:
                async for _, response in model.map(["a", "b", "c"]):
                    assert isinstance(response.error, InsufficientBalanceError)
        assert fake.prompts == []
        assert books.reservations == 0

    async def test_refused_leaves_the_block_bare(self) -> None:
        async def run() -> None:
            async with facade().group() as model:
                await model.prompt("refused")

        with (
            registered(FakeModel()),
            accounting(Books(refusals=1)),
            pytest.raises(InsufficientBalanceError, match="nothing left"),
        ):
            await run()

    async def test_exceeded_reaches_the_reader_and_all_is_settled(self) -> None:
        books = Books()
        with registered(FakeModel()), accounting(books):
            async with facade(default_reservation_nanocents=5).group() as model:
                first = await model.prompt("two words")
                assert await first.text() == "two words"
                second = await model.prompt("two more")
                with pytest.raises(ReservationExceededError):
                    await second.text()
                with pytest.raises(ReservationExceededError):
                    await second.text()
        assert books.settled == [6]
        assert books.balanced

    async def test_failed_prompts_cost_nothing(self) -> None:
        books = Books()
        with registered(FakeModel(Waiting())), accounting(books):
            async with facade().group() as model:
                errors = [response.error async for _, response in model.map(["fail", "fine", "fail"])]
        assert sum(error is None for error in errors) == 1
        assert books.settled == [2]
        assert books.balanced

    async def test_body_raises(self) -> None:
        books, waiting = Books(), Waiting()

        async def run() -> None:
            async with facade().group() as model:
                await (await model.prompt("fine")).text()
                await model.prompt("wait")
                await waiting.began.wait()
                raise LookupError("from the body")

        with (
            registered(fake := FakeModel(waiting)),
            accounting(books),
            pytest.raises(LookupError, match="from the body"),
        ):
            await run()
        assert books.settled == [2]
        assert books.balanced
        assert fake.counts["opened"] == fake.counts["closed"] == 2

    @pytest.mark.parametrize("how", ["scope", "deadline", "model.cancel()", "response.cancel()"])
    async def test_cancelled(self, how: str) -> None:
        books, waiting = Books(), Waiting()
        with registered(fake := FakeModel(waiting)), accounting(books):
            with anyio.CancelScope() as scope:
                async with facade().group() as model:
                    await (await model.prompt("fine")).text()
                    response = await model.prompt("wait")
                    await waiting.began.wait()
                    if how == "scope":
                        scope.cancel()
                    elif how == "deadline":
                        scope.deadline = anyio.current_time() + 5
                    elif how == "model.cancel()":
                        model.cancel()
                    else:
                        response.cancel()
                    with pytest.raises(PromptCancelled):
                        await response.text()
            assert scope.cancelled_caught == (how in ("scope", "deadline"))
        assert books.settled == [2]
        assert books.balanced
        assert fake.counts["opened"] == fake.counts["closed"] == 2

    @pytest.mark.parametrize("checkpoints", range(12))
    async def test_cancelled_at_any_moment_while_it_reserves(self, checkpoints: int) -> None:
        """The accountant's own bookkeeping is never cut in half."""
        books = Books()
        with registered(FakeModel(seconds=1)), accounting(books):
            async with anyio.create_task_group() as tasks:

                async def run() -> None:
                    async with facade().group() as model:
                        async for _ in model.map(["a", "b", "c"], lambda item: item):
                            pass

                tasks.start_soon(run)
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        assert books.balanced

    async def test_map_left_early(self) -> None:
        books = Books()
        with registered(FakeModel(seconds=1)), accounting(books):
            async with facade().group(concurrency=3) as model:
                async for _ in model.map(f"item {number}" for number in range(100)):
                    break
        assert books.balanced
        assert len(books.settled) == 1

    async def test_chain_in_a_group_counts_every_response(self) -> None:
        books = Books()
        with registered(ToolModel()), accounting(books):
            async with facade().group() as model:
                assert await model.chain("who?", tools=[look_up]).text() == "ana found"
        assert books.settled == [4]
        assert books.balanced

    async def test_groups_one_after_the_other_do_not_share(self) -> None:
        """The plugin knows a group by its ``id()``, which Python reuses."""
        books = Books()
        with registered(FakeModel()), accounting(books):
            llms = facade()
            for _ in range(20):
                async with llms.group() as model:
                    assert isinstance(model.group, Group)
                    await (await model.prompt("two words")).text()
        assert books.settled == [3] * 20
        assert books.balanced

    async def test_a_group_without_prompts_reserves_nothing(self) -> None:
        books = Books()
        with registered(FakeModel()), accounting(books):
            async with facade().group():
                pass
        assert books.reservations == 0


async def test_models_without_a_price_cannot_be_used() -> None:
    models = registered(FakeModel(), FakeModel(model_id="unpriced"))
    with models, accounting(Books(), price=TokenPrice(known={"fake"})):
        llms = facade()
        assert [model.model_id for model in await llms.models()] == ["fake"]
        with pytest.raises(ModelNotFoundError, match="unpriced"):
            await llms.model("unpriced")

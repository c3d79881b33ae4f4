"""map(): pulling, order, backpressure, leaving early, and what an error ends."""
# ruff: noqa: PT012 - what raises is the loop over the map

from __future__ import annotations

import gc
import math
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest
from datasette.app import Datasette

from datasette_llm import LLM, GroupClosed, PromptCancelled
from datasette_llm.calls.choice import Choice
from datasette_llm.pace.policy import ConcurrencyBounds, PromptSettings

from .fakes import FakeModel, registered
from .hooks import hooked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    from datasette_llm import GroupModel, PromptResponse


@asynccontextmanager
async def group_of(model: FakeModel, **kwargs: Any) -> AsyncIterator[GroupModel]:
    with registered(model):
        async with LLM(Datasette()).group("fake", **kwargs) as grouped:
            yield grouped


class Source:
    """Counts what is pulled from it, and notices being closed."""

    def __init__(self, n: float = math.inf, *, fails_at: int | None = None, seconds: float = 0) -> None:
        self.n = n
        self.fails_at = fails_at
        self.seconds = seconds
        self.pulled = 0
        self.closed = False

    def _next(self) -> int:
        if self.pulled == self.fails_at:
            raise LookupError(f"no item {self.pulled}")
        self.pulled += 1
        return self.pulled - 1

    def sync(self) -> Iterator[int]:
        while self.pulled < self.n:
            yield self._next()

    async def asynchronous(self) -> AsyncIterator[int]:
        try:
            while self.pulled < self.n:
                await anyio.sleep(self.seconds)
                yield self._next()
        finally:
            self.closed = True

    async def scoped(self) -> AsyncIterator[int]:
        """Like an HTTP library's stream: a cancel scope is open while the generator waits."""
        try:
            with anyio.fail_after(1_000):
                while self.pulled < self.n:
                    await anyio.sleep(self.seconds)
                    yield self._next()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            self.closed = True


KINDS = ["sync", "asynchronous", "scoped"]


@pytest.mark.parametrize("kind", KINDS)
async def test_gives_every_item_with_its_answer(kind: str) -> None:
    source = Source(57)
    async with group_of(FakeModel(), concurrency=5) as model:
        pairs = [(item, await r.text()) async for item, r in model.map(getattr(source, kind)())]
        assert model.stats.succeeded == 57
        assert len(model.group._responses) == 57
    assert sorted(pairs) == [(n, str(n)) for n in range(57)]
    assert source.closed == (kind != "sync")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_empty_source_gives_nothing(kind: str) -> None:
    async with group_of(FakeModel()) as model:
        assert [pair async for pair in model.map(getattr(Source(0), kind)())] == []


@pytest.mark.parametrize("kind", KINDS)
async def test_pulls_lazily_and_keeps_to_the_concurrency(kind: str) -> None:
    source, fake = Source(40), FakeModel(seconds=1)
    yielded, ahead = 0, []
    async with group_of(fake, concurrency=4) as model:
        async for _ in model.map(getattr(source, kind)()):
            yielded += 1
            ahead.append(source.pulled - yielded)
            await anyio.sleep(0.1)
            ahead.append(source.pulled - yielded)
    assert max(ahead) == 4
    assert fake.counts["peak"] == 4


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_loop_holds_the_prompts_back(kind: str) -> None:
    source = Source()
    async with group_of(FakeModel(), concurrency=3) as model:
        yielded = 0
        async for _ in model.map(getattr(source, kind)()):
            yielded += 1
            await anyio.sleep(10)
            assert source.pulled == yielded + 3
            assert model.stats.succeeded == yielded + 3
            if yielded == 5:
                break


async def test_gives_each_pair_as_soon_as_it_is_finished() -> None:
    async def script(prompt: str) -> Any:
        await anyio.sleep(float(prompt))
        yield prompt

    async with group_of(FakeModel(script), concurrency=3) as model:
        order = [item async for item, _ in model.map([3, 1, 2])]
    assert order == [1, 2, 3]


async def test_finishes_in_the_ideal_time() -> None:
    async with group_of(FakeModel(seconds=1), concurrency=10) as model:
        began = anyio.current_time()
        assert len([pair async for pair in model.map(range(100))]) == 100
        assert anyio.current_time() - began == pytest.approx(10)


async def test_an_adaptive_limit_grows() -> None:
    fake = FakeModel(seconds=2)
    async with group_of(fake) as model:
        assert model.stats.concurrency == 20
        began = anyio.current_time()
        async for _ in model.map(range(1_000)):
            pass
        # With twenty at a time it would take a hundred seconds.
        assert anyio.current_time() - began < 30
        assert model.stats.concurrency > 60
        assert fake.counts["peak"] <= model.stats.concurrency


async def test_a_full_adaptive_limit_is_not_overdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = PromptSettings(concurrency=ConcurrencyBounds(start=2, min=1, max=2))
    choose = LLM._choose

    async def bounded(self: LLM, *args: Any) -> Choice:
        choice = await choose(self, *args)
        return Choice(choice.model, choice.model_id, settings=bounds)

    monkeypatch.setattr(LLM, "_choose", bounded)
    source, yielded = Source(20), 0
    async with group_of(FakeModel(seconds=1)) as model:
        async for _ in model.map(source.sync()):
            yielded += 1
            assert source.pulled - yielded <= 2


# What to_prompt may return


async def test_to_prompt_may_return_prompt_keywords() -> None:
    seen = []

    class Spy(FakeModel):
        async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any = None) -> Any:
            seen.append((prompt.prompt, prompt.system, stream, prompt.options.temperature))
            yield "fine"

    async with group_of(Spy(), concurrency=1) as model:
        async for _ in model.map(
            ["a", "b"],
            lambda item: {"prompt": item, "system": item.upper()} if item == "a" else item,
            temperature=0.5,
        ):
            pass
        async for _ in model.map(["c"], stream=True):
            pass
        async for _ in model.map(["d"], lambda item: {"prompt": item, "stream": True}):
            pass
    assert seen == [
        ("a", "A", False, 0.5),
        ("b", "", False, 0.5),
        ("c", "", True, None),
        ("d", "", True, None),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [None, 7, b"bytes", ["a"]])
async def test_to_prompt_must_return_a_prompt(kind: str, wrong: Any) -> None:
    async with group_of(FakeModel()) as model:
        with pytest.raises(TypeError, match=f"to_prompt must return .* not {type(wrong).__name__}"):
            async for _ in model.map(getattr(Source(3), kind)(), lambda _: wrong):
                pass


async def test_to_prompt_must_not_be_async() -> None:
    async def to_prompt(item: int) -> str:
        return str(item)

    async with group_of(FakeModel()) as model:
        with pytest.raises(TypeError, match="not coroutine"):
            async for _ in model.map([1], to_prompt):  # type: ignore[arg-type]
                pass


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_of_to_prompt_is_raised_after_the_prompts_that_were_sent(kind: str) -> None:
    def to_prompt(item: int) -> str:
        if item == 5:
            raise ZeroDivisionError("item five")
        return str(item)

    given, source = [], Source(20)
    async with group_of(FakeModel(seconds=1), concurrency=2) as model:
        with pytest.raises(ZeroDivisionError, match="item five"):
            async for item, _ in model.map(getattr(source, kind)(), to_prompt):
                given.append(item)
        assert model.stats.succeeded == len(given)
    assert sorted(given) == [0, 1, 2, 3, 4]
    assert source.pulled <= 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 5])
async def test_an_error_of_the_source_is_raised_after_the_prompts_that_were_sent(kind: str, k: int) -> None:
    source = Source(20, fails_at=k)
    given = []
    async with group_of(FakeModel(seconds=1), concurrency=2) as model:
        mapped = model.map(getattr(source, kind)())
        with pytest.raises(LookupError, match=f"no item {k}"):
            async for item, _ in mapped:
                given.append(item)
        # Like any iterator that has raised, it is over.
        assert [pair async for pair in mapped] == []
    assert sorted(given) == list(range(k))


async def test_an_option_that_llm_refuses_is_that_items_error() -> None:
    async with group_of(FakeModel(), concurrency=2) as model:
        errors = {
            item: response.error
            async for item, response in model.map(
                [0, 1, 2], lambda n: {"prompt": "x", "temperature": "hot" if n == 1 else n}
            )
        }
        assert model.stats.failed == 1
        assert len(model.group._responses) == 3
    assert errors[0] is errors[2] is None
    assert "temperature" in str(errors[1])


async def test_an_argument_that_prompt_does_not_have_ends_the_map() -> None:
    async with group_of(FakeModel()) as model:
        with pytest.raises(TypeError, match="options="):
            async for _ in model.map([1], temperature=1, options={"temperature": 2}):
                pass


async def test_refuses_what_cannot_be_iterated() -> None:
    async with group_of(FakeModel()) as model:
        with pytest.raises(TypeError, match="iterable"):
            model.map(5)  # type: ignore[arg-type]


async def test_a_failed_prompt_is_given_with_its_error() -> None:
    async def script(prompt: str) -> Any:
        if prompt == "3":
            raise ZeroDivisionError("three")
        yield prompt

    async with group_of(FakeModel(script)) as model:
        outcomes = {item: response async for item, response in model.map(range(6))}
        with pytest.raises(ZeroDivisionError, match="three"):
            await outcomes.pop(3).text()
        assert all(response.error is None for response in outcomes.values())


async def test_a_wrapper_that_refuses_one_item_is_that_items_error() -> None:
    def llm_prompt_context(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            if prompt == "2":
                raise PermissionError("not two")
            yield

        return wrapper

    with hooked(llm_prompt_context=llm_prompt_context):
        async with group_of(FakeModel()) as model:
            errors = {item: response.error async for item, response in model.map(range(4))}
    assert isinstance(errors.pop(2), PermissionError)
    assert set(errors.values()) == {None}


async def test_wrappers_have_a_context_of_their_own_for_each_item() -> None:
    from contextvars import ContextVar

    current: ContextVar[str] = ContextVar("current", default="nobody")
    seen = []

    def llm_prompt_context(prompt: str) -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            seen.append(current.get())
            current.set(prompt)
            yield

        return wrapper

    with hooked(llm_prompt_context=llm_prompt_context):
        async with group_of(FakeModel(), concurrency=2) as model:
            async for _ in model.map(range(6)):
                pass
    assert seen == ["nobody"] * 6


# Leaving early


async def use_break(mapped: Any) -> None:
    async for _ in mapped:
        break


async def use_aclose(mapped: Any) -> None:
    async with aclosing(mapped):
        await anext(mapped)


async def use_exception(mapped: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in mapped:
            raise ZeroDivisionError


async def use_cancellation(mapped: Any) -> None:
    with anyio.move_on_after(1.5):
        async for _ in mapped:
            await anyio.sleep_forever()


LEAVES = [use_break, use_aclose, use_exception, use_cancellation]


@pytest.mark.parametrize("hook", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leave", LEAVES)
async def test_leaving_the_loop_stops_pulling_and_cancels(
    leave: Callable[[Any], Any], kind: str, hook: bool
) -> None:
    async def script(prompt: str) -> Any:
        await anyio.sleep(1 if prompt == "0" else 1_000)
        yield prompt

    def llm_prompt_context() -> Any:
        @asynccontextmanager
        async def wrapper(result: Any) -> AsyncIterator[None]:
            yield

        return wrapper if hook else None

    source, fake = Source(), FakeModel(script)
    with hooked(**({"llm_prompt_context": llm_prompt_context} if hook else {})):
        async with group_of(fake, concurrency=3) as model:
            began = anyio.current_time()
            await leave(model.map(getattr(source, kind)()))
            gc.collect()
            await anyio.sleep(2)
            # Long before the block ends.
            assert fake.counts["running"] == 0
            pulled = source.pulled
            assert pulled <= 4
            assert model.stats.cancelled == pulled - 1
            await anyio.sleep(5)
            assert source.pulled == pulled
            assert not model._supervisor._maps
        assert anyio.current_time() - began < 20
    assert fake.counts["opened"] == fake.counts["closed"]
    assert source.closed == (kind != "sync")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_map_that_is_held_does_not_keep_the_block_open(kind: str) -> None:
    source, fake = Source(), FakeModel(seconds=1)
    async with group_of(fake, concurrency=3) as model:
        mapped = model.map(getattr(source, kind)())
        await anext(mapped)
    assert fake.counts["running"] == 0
    assert source.closed == (kind != "sync")
    with pytest.raises(PromptCancelled, match="block was left"):
        while True:
            await anext(mapped)


async def test_a_source_that_waits_is_cancelled_when_the_loop_is_left() -> None:
    source = Source(seconds=1_000)
    async with group_of(FakeModel()) as model:
        began = anyio.current_time()
        with anyio.move_on_after(1):
            async for _ in model.map(source.scoped()):
                pass
    assert source.closed
    assert anyio.current_time() - began < 10


async def test_a_source_that_will_not_close_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    async def stubborn() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            await anyio.sleep_forever()

    began = anyio.current_time()
    async with group_of(FakeModel()) as model:
        await use_break(model.map(stubborn()))
    assert anyio.current_time() - began == pytest.approx(5, abs=1)


async def test_an_error_while_closing_the_source_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def clumsy() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
        finally:
            raise LookupError("could not close")

    async with group_of(FakeModel()) as model:
        await use_break(model.map(clumsy()))
    assert "could not close" in caplog.text


async def test_an_exception_of_the_body_is_not_kept_waiting() -> None:
    fake, source = FakeModel(seconds=1_000), Source()
    began = anyio.current_time()

    async def consume(mapped: Any) -> None:
        with pytest.raises(PromptCancelled, match="has been cancelled"):
            await anext(mapped)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(ZeroDivisionError):
            async with group_of(fake, concurrency=3) as model:
                tasks.start_soon(consume, model.map(source.scoped()))
                await anyio.sleep(1)
                raise ZeroDivisionError
    assert anyio.current_time() - began < 10
    assert fake.counts["opened"] == fake.counts["closed"] == 3
    assert source.closed


# Others' business


async def test_cancelling_the_group_gives_what_is_finished_and_then_says_so() -> None:
    async def script(prompt: str) -> Any:
        await anyio.sleep(1 if prompt in "0 1" else 1_000)
        yield prompt

    given = []
    async with group_of(FakeModel(script), concurrency=4) as model:
        with pytest.raises(PromptCancelled, match="has been cancelled"):
            async for item, response in model.map(range(10)):
                given.append(item)
                assert response.error is None
                await anyio.sleep(1)
                model.cancel()
        with pytest.raises(PromptCancelled):
            await anext(model.map([1]))
    assert sorted(given) == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_cancelled_while_it_waits_loses_nothing(kind: str) -> None:
    given = []
    async with group_of(FakeModel(seconds=1), concurrency=2) as model:
        mapped = model.map(getattr(Source(9), kind)())
        while True:
            try:
                # Expires in the very moment in which some pairs are finished.
                with anyio.move_on_after(0.5):
                    given.append((await anext(mapped))[0])
            except StopAsyncIteration:
                break
    assert sorted(given) == list(range(9))


async def test_the_reader_may_be_another_task() -> None:
    given: list[int] = []
    async with group_of(FakeModel(seconds=1), concurrency=3) as model:
        mapped = model.map(range(20))

        async def consume() -> None:
            async for item, _ in mapped:
                given.append(item)
                await anyio.sleep(0.1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            tasks.start_soon(consume)
    assert sorted(given) == list(range(20))


async def test_two_maps_and_a_prompt_share_the_concurrency() -> None:
    fake = FakeModel(seconds=1)
    async with group_of(fake, concurrency=4) as model:

        async def consume(n: int, into: list[int]) -> None:
            async for item, _ in model.map(range(n)):
                into.append(item)

        left: list[int] = []
        right: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume, 12, left)
            tasks.start_soon(consume, 7, right)
            await anyio.sleep(0.5)
            response = await model.prompt("between")
            assert await response.text() == "between"
    assert sorted(left) == list(range(12))
    assert sorted(right) == list(range(7))
    assert fake.counts["peak"] == 4


async def test_the_loop_may_prompt_the_same_group_with_one_slot() -> None:
    async with group_of(FakeModel(seconds=1), concurrency=1) as model:
        texts = []
        async for item, response in model.map(range(4)):
            again = await model.prompt(f"again {item}")
            texts += [await response.text(), await again.text()]
    assert texts == ["0", "again 0", "1", "again 1", "2", "again 2", "3", "again 3"]


async def test_the_source_may_prompt_the_same_group_with_one_slot() -> None:
    async with group_of(FakeModel(seconds=1), concurrency=1) as model:

        async def questions() -> AsyncIterator[str]:
            for n in range(3):
                yield await (await model.prompt(f"question {n}")).text()

        given = [await response.text() async for _, response in model.map(questions())]
    assert given == ["question 0", "question 1", "question 2"]


async def test_after_the_block_it_says_that_the_group_is_closed() -> None:
    async with group_of(FakeModel()) as model:
        unread = model.map([1])
    with pytest.raises(GroupClosed):
        await anext(unread)


async def test_on_error_cancel_leaves_the_block_with_the_items_error() -> None:
    async def script(prompt: str) -> Any:
        await anyio.sleep(int(prompt))
        if prompt == "2":
            raise ZeroDivisionError("two")
        yield prompt

    given = []
    with pytest.raises(ZeroDivisionError, match="two"):
        async with group_of(FakeModel(script), on_error="cancel") as model:
            async for item, _ in model.map([9, 1, 2, 8]):
                given.append(item)
    assert given[0] == 1
    assert not {8, 9} & set(given)


async def test_memory_does_not_grow_with_the_number_of_items() -> None:
    def live() -> int:
        gc.collect()
        return sum(isinstance(o, (llm.AsyncResponse, llm.Prompt)) for o in gc.get_objects())

    most = 0
    async with group_of(FakeModel(), concurrency=8) as model:
        before = live()
        n = 0
        async for _, _response in model.map(iter(range(2_000))):
            n += 1
            if n % 500 == 0:
                most = max(most, live() - before)
    assert n == 2_000
    # Three objects for each that is in flight, waiting for the loop, or in the loop's hand.
    assert most <= 3 * (8 + 2)


async def test_without_the_garbage_collector_nothing_piles_up() -> None:
    import weakref

    refs: list[weakref.ref[PromptResponse]] = []
    gc.collect()
    gc.disable()
    try:
        async with group_of(FakeModel(), concurrency=4) as model:
            async for _, response in model.map(range(200)):
                refs.append(weakref.ref(response))
            del response
            assert sum(ref() is not None for ref in refs) <= 1
    finally:
        gc.enable()


async def test_while_prompts_wait_for_another_attempt_others_are_asked() -> None:
    class BusyError(Exception):
        status_code = 500
        headers = {"retry-after": "10"}  # noqa: RUF012

    asked: list[tuple[float, str]] = []

    async def answer(prompt: str) -> AsyncGenerator[Any, None]:
        asked.append((anyio.current_time() - began, prompt))
        await anyio.sleep(1)
        if len(asked) <= 2:
            raise BusyError("not now")
        yield prompt

    source = Source(4)
    began = anyio.current_time()
    async with group_of(FakeModel(answer), concurrency=2) as model:
        pairs = [(item, await response.text()) async for item, response in model.map(source.sync(), str)]
    assert {prompt for at, prompt in asked if at < 2} == {"0", "1", "2", "3"}
    assert sorted(pairs) == [(item, str(item)) for item in range(4)]
    assert len(asked) == 6

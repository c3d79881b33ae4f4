"""Datasette's asyncio code called from both backends."""

from __future__ import annotations

import asyncio
import contextvars
import sqlite3
import sys
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import anyio.lowlevel
import pytest
import trio.testing
from datasette.app import Datasette

from datasette_llm.backends import datasette_side as side
from datasette_llm.backends.trio_loop import trio_asyncio

from .asyncio_work import Wrapper, asyncio_sleeper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class TestCall:
    async def test_it_passes_arguments_and_returns_the_result(self) -> None:
        async def asynchronous(first: int, /, function: int, *, args: int) -> tuple[int, int, int]:
            await asyncio.sleep(0)
            return first, function, args

        assert await side.call(asynchronous, 1, function=2, args=3) == (1, 2, 3)
        assert await side.call(divmod, 7, 2) == (3, 1)

    async def test_plain_functions_run_on_datasettes_side_too(self) -> None:
        assert (await side.call(asyncio.get_running_loop)).is_running()

    async def test_exceptions_arrive_bare(self) -> None:
        error = ValueError("no")

        async def fail() -> None:
            await asyncio.sleep(0)
            raise error

        with pytest.raises(ValueError, match="no") as caught:
            await side.call(fail)
        assert caught.value is error

    async def test_a_resolved_value_is_awaited_if_it_can_be(self) -> None:
        async def answer() -> int:
            await asyncio.sleep(0)
            return 42

        assert await side.resolve(answer()) == 42
        assert await side.resolve(41) == 41
        assert await side.resolve(await side.call(_done_future)) == 40

    async def test_cancelling_the_caller_cancels_the_call_and_waits_for_its_end(self) -> None:
        events: list[str] = []
        with anyio.move_on_after(1) as scope:
            await side.call(asyncio_sleeper, events)
        assert scope.cancelled_caught
        assert events == ["started", "cancelled", "ended"]

    async def test_resolving_in_a_cancelled_scope_drops_no_coroutine_unawaited(self) -> None:
        events: list[str] = []
        with anyio.CancelScope() as scope:
            scope.cancel()
            await side.resolve(asyncio_sleeper(events))
        assert scope.cancelled_caught
        assert events in ([], ["started", "cancelled", "ended"])

    async def test_code_that_swallows_its_cancellation_is_cancelled_again(self) -> None:
        swallowed = 0

        async def stubborn() -> None:
            nonlocal swallowed
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    swallowed += 1
                    if swallowed == 3:
                        raise

        with anyio.move_on_after(1) as scope:
            await side.call(stubborn)
        assert scope.cancelled_caught
        assert swallowed == 3

    async def test_a_shielded_caller_is_not_disturbed(self) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                assert await side.call(asyncio.sleep, 1, "slept") == "slept"

    async def test_context_variables_of_the_caller_are_seen(self) -> None:
        variable.set("caller")

        async def read() -> str:
            await asyncio.sleep(0)
            return variable.get()

        assert await side.call(variable.get) == "caller"
        assert await side.call(read) == "caller"
        assert await side.resolve(read()) == "caller"

    async def test_code_there_may_call_back_and_use_anyio(self) -> None:
        """A hook runs on the hosted loop, and may itself use this package and anyio."""

        async def hook() -> list[object]:
            assert side.backend() == "asyncio"
            seen: list[object] = [await side.call(asyncio.sleep, 0, "nested")]
            async with side.open_side(), side.context_manager(Wrapper()) as value:
                seen.append(value)
            event = anyio.Event()
            limiter = anyio.CapacityLimiter(1)
            run_var: anyio.lowlevel.RunVar[str] = anyio.lowlevel.RunVar("test")
            run_var.set("run")
            send, receive = anyio.create_memory_object_stream[str](0)

            async def child() -> None:
                async with limiter, send:
                    await event.wait()
                    await send.send("sent")

            async with anyio.create_task_group() as tasks, receive:
                tasks.start_soon(child)
                await anyio.wait_all_tasks_blocked()
                event.set()
                seen.append(await receive.receive())
            with anyio.move_on_after(1) as scope:
                await anyio.sleep(3600)
            seen += [scope.cancelled_caught, run_var.get()]
            seen.append(await asyncio.gather(asyncio.sleep(0, "gathered")))
            return seen

        expected = ["nested", "value", "sent", True, "run", ["gathered"]]
        assert await side.call(hook) == expected

    async def test_calls_overlap(self) -> None:
        meet = await side.call(asyncio.Event)
        arrived: list[int] = []

        async def arrive(number: int) -> None:
            arrived.append(number)
            if len(arrived) == 3:
                meet.set()
            await meet.wait()

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(side.call, arrive, number)
        assert sorted(arrived) == [0, 1, 2]


def _done_future() -> asyncio.Future[int]:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    future.set_result(40)
    return future


class TestContextManager:
    async def test_it_is_entered_and_left(self) -> None:
        wrapper = Wrapper()
        async with side.context_manager(wrapper) as value:
            wrapper.events.append(value)
        assert wrapper.events == ["entered", "value", "left"]

    async def test_the_blocks_exception_is_thrown_in_and_leaves_bare(self) -> None:
        wrapper = Wrapper()
        error = ValueError("from the block")
        with pytest.raises(ValueError, match="from the block") as caught:
            async with side.context_manager(wrapper):
                raise error
        assert caught.value is error
        assert wrapper.events == ["entered", "ValueError", "left"]

    @pytest.mark.parametrize("error", [StopIteration("one"), StopAsyncIteration("two")])
    async def test_exceptions_that_coroutines_treat_specially_pass_too(self, error: Exception) -> None:
        with pytest.raises(type(error)) as caught:
            async with side.context_manager(Wrapper()):
                raise error
        assert caught.value is error

    async def test_it_may_swallow(self) -> None:
        wrapper = Wrapper(swallow=True)
        async with side.context_manager(wrapper):
            raise ValueError("swallowed")
        assert wrapper.events == ["entered", "ValueError", "left"]

    async def test_it_may_replace_the_exception(self) -> None:
        @asynccontextmanager
        async def replacing() -> AsyncIterator[None]:
            try:
                yield
            except ValueError as error:
                raise KeyError("replaced") from error

        with pytest.raises(KeyError, match="replaced") as caught:
            async with side.context_manager(replacing):
                raise ValueError("original")
        assert isinstance(caught.value.__cause__, ValueError)

    async def test_one_that_fails_to_enter_raises_its_own_error(self) -> None:
        error = LookupError("no budget")
        with pytest.raises(LookupError, match="no budget") as caught:
            async with side.context_manager(Wrapper(entry=error)):
                pytest.fail("not to be reached")
        assert caught.value is error

    async def test_a_factory_that_fails_raises_its_own_error(self) -> None:
        def factory() -> Any:
            raise LookupError("no wrapper")

        with pytest.raises(LookupError, match="no wrapper"):
            async with side.context_manager(factory):
                pytest.fail("not to be reached")

    async def test_it_may_reset_a_context_variable(self) -> None:
        @asynccontextmanager
        async def setting() -> AsyncIterator[None]:
            token = variable.set("wrapper")
            yield
            await asyncio.sleep(0)
            assert variable.get() == "wrapper"
            variable.reset(token)

        async with side.context_manager(setting):
            pass

    async def test_cancellation_is_seen_as_asyncios_and_goes_on(self) -> None:
        wrapper = Wrapper()
        with anyio.move_on_after(1) as scope:
            async with side.context_manager(wrapper):
                await anyio.sleep(3600)
        assert scope.cancelled_caught
        assert wrapper.events[:2] == ["entered", "CancelledError"]

    async def test_the_blocks_error_is_seen_even_in_a_cancelled_scope(self) -> None:
        wrapper = Wrapper()
        with anyio.CancelScope() as scope:
            async with side.context_manager(wrapper):
                scope.cancel()
                raise ValueError("from the block")
        assert wrapper.events == ["entered", "ValueError", "left"][: len(wrapper.events)]
        assert "ValueError" in wrapper.events

    async def test_entering_can_be_cancelled(self) -> None:
        events: list[str] = []

        @asynccontextmanager
        async def slow() -> AsyncIterator[None]:
            await asyncio_sleeper(events)
            yield

        with anyio.move_on_after(1) as scope:
            async with side.context_manager(slow):
                pytest.fail("not to be reached")
        assert scope.cancelled_caught
        assert events == ["started", "cancelled", "ended"]

    async def test_a_deadline_around_its_yield_cancels_the_block(self) -> None:
        """Both asyncio's own and anyio's; the wrapper is left after the block."""
        events: list[str] = []

        @asynccontextmanager
        async def limited() -> AsyncIterator[None]:
            try:
                with anyio.fail_after(1):
                    yield
            finally:
                events.append("wrapper left")

        async def block() -> None:
            try:
                await anyio.sleep(3600)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(1)
                events.append("block left")

        with pytest.raises(TimeoutError):
            async with side.context_manager(limited):
                await block()
        assert events == ["block left", "wrapper left"]

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout is new in Python 3.11")
    async def test_an_asyncio_timeout_around_its_yield_cancels_the_block(self) -> None:
        @asynccontextmanager
        async def limited() -> AsyncIterator[None]:
            async with asyncio.timeout(1):
                yield

        with pytest.raises(TimeoutError):
            async with side.context_manager(limited):
                await anyio.sleep(3600)

    async def test_a_deadline_that_only_moves_on_swallows_the_cancellation(self) -> None:
        @asynccontextmanager
        async def limited() -> AsyncIterator[None]:
            with anyio.move_on_after(1):
                yield

        before = anyio.current_time()
        async with side.context_manager(limited):
            await anyio.sleep(3600)
        assert anyio.current_time() - before == pytest.approx(1)

    async def test_they_nest(self) -> None:
        outer, inner = Wrapper(swallow=True), Wrapper()
        async with side.context_manager(outer), side.context_manager(inner):
            raise ValueError("through both")
        assert inner.events == ["entered", "ValueError", "left"]
        assert outer.events == ["entered", "ValueError", "left"]


@pytest.mark.real_clock
class TestDatasette:
    async def test_startup_queries_writes_and_requests(self, tmp_path: Path) -> None:
        datasette = Datasette([str(_new_database(tmp_path))])
        await side.call(datasette.invoke_startup)
        async with side.open_side():
            await _use(datasette)
        await _use(datasette)

    async def test_overlapping_writes(self, tmp_path: Path) -> None:
        datasette = Datasette([str(_new_database(tmp_path))])
        db = datasette.get_database("data")
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(side.call, db.execute_write, "insert into t values (?)", [number])
        assert (await side.call(db.execute, "select count(*) from t")).single_value() == 20

    def test_one_datasette_serves_several_runs_of_both_backends(self, tmp_path: Path) -> None:
        datasettes: list[Datasette] = []

        async def main() -> None:
            if not datasettes:
                datasettes.append(Datasette([str(_new_database(tmp_path))]))
            await _use(datasettes[0])

        for backend in ("trio", "trio", "asyncio", "trio"):
            anyio.run(main, backend=backend)

    def test_one_datasette_moves_between_loops_of_one_run(self, tmp_path: Path) -> None:
        async def main() -> None:
            datasette = Datasette([str(_new_database(tmp_path))])
            for _ in range(2):
                async with trio_asyncio.open_loop() as loop:
                    assert await side.call(asyncio.get_running_loop) is loop
                    await _use(datasette)
            await _use(datasette)

        trio.run(main)


def _new_database(tmp_path: Path) -> Path:
    path = tmp_path / "data.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("create table t (id integer)")
    return path


async def _use(datasette: Datasette) -> None:
    db = datasette.get_database("data")
    before = (await side.call(db.execute, "select count(*) from t")).single_value()
    await side.call(db.execute_write, "insert into t values (1)")
    await side.call(db.execute_write, "insert into t values (2)", block=False)
    await side.call(db.execute_write_fn, lambda connection: connection.execute("select 1").fetchone())
    after = (await side.call(db.execute, "select count(*) from t")).single_value()
    assert after == before + 2
    response = await side.call(datasette.client.get, "/-/versions.json")
    assert response.status_code == 200

"""The asyncio loop beside trio: how it lives, ends, and is told of deadlines and cancellation."""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing

from datasette_llm import backends
from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.backends import datasette_side as side
from datasette_llm.backends import hosted_loop, trio_loop
from datasette_llm.backends.trio_loop import trio_asyncio

from .asyncio_work import Wrapper, asyncio_sleeper

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class TestHostedLoop:
    """What only trio has: the loop itself. `trio.run` is spelt out where its end matters."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "trio"

    async def test_all_tasks_of_a_run_share_one_loop(self) -> None:
        loops = [await side.call(asyncio.get_running_loop)]
        first, second = side.open_side(), side.open_side()
        async with first:
            loops.append(await side.call(asyncio.get_running_loop))
            await second.__aenter__()
        loops.append(await side.call(asyncio.get_running_loop))
        await second.__aexit__(None, None, None)
        loops.append(await side.call(asyncio.get_running_loop))
        assert len(set(loops)) == 1

    async def test_a_loop_that_the_program_opened_is_used(self) -> None:
        async with trio_asyncio.open_loop() as loop:
            assert await side.call(asyncio.get_running_loop) is loop
            async with side.open_side(), side.context_manager(Wrapper()):
                assert await side.call(asyncio.get_running_loop) is loop
        assert await side.call(asyncio.get_running_loop) is not loop

    async def test_asyncio_code_can_call_trio_back(self) -> None:
        async def hook() -> str:
            await trio_asyncio.trio_as_aio(trio.sleep)(1)
            answer: str = await trio_asyncio.trio_as_aio(side.call)(asyncio.sleep, 0, "round trip")
            return answer

        assert await side.call(hook) == "round trip"

    def test_the_loop_stays_for_those_who_settle_at_the_end_of_the_run(self) -> None:
        events: list[str] = []

        async def supervisor() -> None:
            async with side.open_side():
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await trio.sleep(0.01)
                        events.append(await side.call(asyncio.sleep, 0.01, "settled"))

        async def late() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.1)
                    events.append(await side.call(asyncio.sleep, 0, "a loop opened after the first has gone"))

        async def main() -> None:
            await side.call(asyncio.sleep, 0)
            trio.lowlevel.spawn_system_task(supervisor)
            trio.lowlevel.spawn_system_task(late)
            await trio.testing.wait_all_tasks_blocked()

        trio.run(main)
        assert events == ["settled", "a loop opened after the first has gone"]

    def test_a_holder_that_never_leaves_is_not_waited_for_for_ever(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        events: list[str] = []
        errors: list[str] = []

        async def stuck() -> None:
            with trio.CancelScope(shield=True), pytest.raises(RuntimeError) as caught:
                await side.call(asyncio_sleeper, events)
            errors.append(str(caught.value))

        async def main() -> None:
            trio.lowlevel.spawn_system_task(stuck)
            await trio.testing.wait_all_tasks_blocked()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert events == ["started", "cancelled", "ended"]
        assert errors == ["The asyncio code was cancelled, and not by its caller"]
        assert "is cancelled" in caplog.text

    def test_asyncio_itself_keeps_its_own_loops(self) -> None:
        async def running_loop() -> type:
            return type(asyncio.get_running_loop())

        assert not issubclass(anyio.run(running_loop, backend="asyncio"), trio_asyncio.BaseTrioEventLoop)
        assert issubclass(anyio.run(side.call, running_loop, backend="trio"), trio_asyncio.TrioEventLoop)

    @pytest.mark.real_clock
    async def test_plugins_may_use_thread_pools_of_their_own(self) -> None:
        async def use_threads() -> list[int]:
            loop = asyncio.get_running_loop()
            with ThreadPoolExecutor(1) as pool:
                own = await loop.run_in_executor(pool, threading.get_ident)
                # While that thread lives: its number may be given again.
                default = await loop.run_in_executor(None, threading.get_ident)
            return [own, default, threading.get_ident()]

        assert len(set(await side.call(use_threads))) == 3

    async def test_an_error_nobody_retrieves_is_logged_and_ends_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise ValueError("in a callback")

        def plant() -> None:
            asyncio.get_running_loop().call_soon(fail)

        loop = await side.call(asyncio.get_running_loop)
        await side.call(plant)
        await side.call(asyncio.sleep, 0)
        assert "in a callback" in caplog.text
        assert await side.call(asyncio.get_running_loop) is loop

    async def test_a_plugin_that_exits_reaches_the_caller_and_the_next_call_works(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def leave() -> None:
            raise SystemExit(3)

        with pytest.raises(SystemExit):
            await side.call(leave)
        assert await side.call(asyncio.sleep, 0, "again") == "again"
        assert "ended early" in caplog.text

    async def test_asyncio_code_that_cancels_itself_is_an_ordinary_error(self) -> None:
        async def stop() -> None:
            _current().cancel()
            await asyncio.sleep(3600)

        @asynccontextmanager
        async def stopping() -> AsyncIterator[None]:
            asyncio.get_running_loop().call_later(1, _current().cancel)
            yield

        @asynccontextmanager
        async def stopping_at_exit() -> AsyncIterator[None]:
            yield
            await stop()

        with pytest.raises(RuntimeError, match="not by its caller"):
            await side.call(stop)
        with pytest.raises(RuntimeError, match="not by its caller"):
            async with side.context_manager(stopping):
                await trio.sleep(3600)
        with pytest.raises(RuntimeError, match="not by its caller"):
            async with side.context_manager(stopping_at_exit):
                pass

    async def test_a_deadline_that_passes_unnoticed_by_the_block_still_counts(self) -> None:
        @asynccontextmanager
        async def limited() -> AsyncIterator[None]:
            with anyio.fail_after(1):
                yield

        async def block() -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(2)

        with pytest.raises(TimeoutError):
            async with side.context_manager(limited):
                await block()

    async def test_the_rest_of_a_group_survives_a_deadline(self) -> None:
        """The block's own cancellation is taken out of a group; its siblings reach the wrapper."""
        seen: list[BaseException] = []

        @asynccontextmanager
        async def limited() -> AsyncIterator[None]:
            with anyio.move_on_after(1):
                try:
                    yield
                except BaseException as error:
                    seen.append(error)
                    raise

        async def fail_late() -> None:
            try:
                await trio.sleep(3600)
            finally:
                raise ValueError("sibling")

        async def block() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_late)
                await trio.sleep(3600)

        with pytest.raises(BaseExceptionGroup) as caught:
            async with side.context_manager(limited):
                await block()
        assert [str(error) for error in caught.value.exceptions] == ["sibling"]
        assert seen == [caught.value]

    async def test_cancelled_before_there_is_a_loop(self) -> None:
        events: list[str] = []
        with trio.CancelScope() as scope:
            scope.cancel()
            await side.resolve(asyncio_sleeper(events))
        assert scope.cancelled_caught
        assert await side.call(asyncio.sleep, 0, "opened all the same") == "opened all the same"

    @pytest.fixture
    def _no_trio_asyncio(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "trio_asyncio", None)
        for module in (hosted_loop, trio_loop):
            monkeypatch.delitem(sys.modules, module.__name__)
            monkeypatch.delattr(backends, module.__name__.rpartition(".")[2])

    @pytest.mark.usefixtures("_no_trio_asyncio")
    @pytest.mark.parametrize(
        "use",
        [
            lambda: side.call(print),
            lambda: side.resolve(asyncio_sleeper([])),
            lambda: side.context_manager(Wrapper()).__aenter__(),
        ],
        ids=["call", "resolve", "context_manager"],
    )
    async def test_without_trio_asyncio_the_error_says_what_to_install(self, use: Callable[[], Any]) -> None:
        with pytest.raises(RuntimeError, match=r"pip install 'datasette-llm\[trio\]'"):
            await use()

    @pytest.mark.usefixtures("_no_trio_asyncio")
    async def test_without_trio_asyncio_what_needs_no_datasette_works(self) -> None:
        async with side.open_side():
            assert await side.resolve("plain value") == "plain value"


def _current() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task

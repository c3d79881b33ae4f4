"""The root supervisor: who owns prompts that are in no group, and what ends them."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from anyio.lowlevel import checkpoint

from datasette_llm import PromptCancelled
from datasette_llm.backends.datasette_side import backend
from datasette_llm.tasks import root as root_module
from datasette_llm.tasks.root import drain, root_supervisor

from .fakes import FakeModel
from .patience import PATIENCE_SECONDS
from .spies import Spy, Visit, nothing_left, running_tasks, watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


async def answers_slowly(prompt: str) -> AsyncGenerator[str, None]:
    yield "first"
    await anyio.sleep(10)
    yield "last"


async def settles_slowly(visit: Visit) -> None:
    await anyio.sleep(0.01)


async def test_it_starts_on_demand_and_is_gone_when_idle() -> None:
    with watched(FakeModel(answers_slowly)) as llm:
        model = await llm.model()
        async with nothing_left():
            before = running_tasks()
            response = await model.prompt("hi")
            first = root_supervisor()
            assert running_tasks() - before
            await response.text()
        assert first.closing
        async with nothing_left():
            await (await model.prompt("again")).text()


async def test_it_keeps_shared_http_clients_for_a_while_and_closes_them() -> None:
    closed: list[bool] = []

    class Clients:
        async def aclose(self) -> None:
            closed.append(True)

    with watched(FakeModel()) as llm:
        model = await llm.model()
        response = await model.prompt("hi")
        supervisor = root_supervisor()
        supervisor.clients._sets["key"] = Clients()  # type: ignore[assignment]
        await response.text()
        await anyio.sleep(20)
        assert root_supervisor() is supervisor
        await (await model.prompt("again")).text()
        await anyio.sleep(20)
        assert not closed
        await anyio.sleep(20)
        assert closed == [True]
        assert supervisor.closing


async def test_drain_lets_prompts_finish() -> None:
    spy = Spy()
    with watched(FakeModel(answers_slowly), spy) as llm:
        async with nothing_left():
            response = await (await llm.model()).prompt("hi")
            await drain(30)
            assert response.done
            assert response.error is None
    spy.check()


async def test_drain_cancels_what_does_not_finish_in_time(caplog: pytest.LogCaptureFixture) -> None:
    spy, model = Spy(leaving=settles_slowly), FakeModel(answers_slowly)
    with watched(model, spy) as llm:
        async with nothing_left():
            response = await (await llm.model()).prompt("hi")
            began = anyio.current_time()
            await drain(3)
            assert anyio.current_time() - began < 4
            assert isinstance(response.error, PromptCancelled)
            # The server is not gone yet: what comes now is still served.
            assert await (await (await llm.model()).prompt("late")).text() == "firstlast"
    assert "Cancelling 1 prompts" in caplog.text
    assert isinstance(spy.visits[0].saw, PromptCancelled)
    spy.check()


async def test_drain_without_any_prompt_does_nothing() -> None:
    async with nothing_left():
        await drain()


def run_asyncio(main: Callable[[], Any]) -> None:
    asyncio.run(main())


def run_trio(main: Callable[[], Any]) -> None:
    trio.run(main)


runners = pytest.mark.parametrize("run", [run_asyncio, run_trio])


@runners
@pytest.mark.parametrize("where", ["entering", "streaming", "leaving"])
def test_at_the_end_of_the_loop_wrappers_settle(run: Any, where: str) -> None:
    """On the machine's clock: the loop is one that the program itself runs and ends."""
    settled: list[str] = []

    async def entering(visit: Visit) -> None:
        if where == "entering":
            await anyio.sleep(0.05)

    async def leaving(visit: Visit) -> None:
        try:
            await anyio.sleep(0.05)
            settled.append(visit.plugin)
        except BaseException:
            settled.append(f"{visit.plugin} was interrupted")
            raise

    spies = Spy("outer", entering=entering, leaving=leaving), Spy("inner", leaving=leaving)
    model = FakeModel(None if where == "leaving" else answers_slowly)

    async def ask(wrapped: Any) -> None:
        try:
            await wrapped.prompt("hi")
        except PromptCancelled:
            pass

    async def main() -> None:
        wrapped = await llm.model()
        if where == "entering":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, wrapped)
                await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
        else:
            response = await wrapped.prompt("hi")
            if where == "streaming":
                await anext(response)
            else:
                await anyio.sleep(0.01)

    with watched(model, *spies) as llm:
        run(main)
    assert model.counts["opened"] == model.counts["closed"]
    for spy in spies:
        assert all(visit.left == visit.entered for visit in spy.visits)
    if where == "streaming":
        for spy in spies:
            assert isinstance(spy.visits[0].saw, PromptCancelled)
        assert settled == ["inner", "outer"]
    elif where == "entering":
        assert spies[1].visits == []
    else:
        # asyncio interrupts the await that it finds each task at; what follows is not interrupted.
        assert settled[-1] == "outer"


@runners
def test_at_the_end_of_the_loop_a_wrapper_that_hangs_is_abandoned(
    run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def hangs(visit: Visit) -> None:
        await anyio.sleep_forever()

    original = root_module.RootSupervisor.__init__

    def impatient(self: Any) -> None:
        original(self)
        self.grace_seconds = 0.05

    monkeypatch.setattr(root_module.RootSupervisor, "__init__", impatient)

    async def main() -> None:
        await (await llm.model()).prompt("hi")

    inner, outer = Spy("inner", leaving=hangs), Spy("outer")
    with watched(FakeModel(answers_slowly), outer, inner) as llm:
        run(main)
    outer.check()
    assert isinstance(outer.visits[0].saw, PromptCancelled)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "Abandoned a wrapper" in caplog.text


@runners
def test_a_group_at_the_end_of_the_loop_settles_and_runs_its_exit_hooks(run: Any) -> None:
    spy = Spy(leaving=settles_slowly)
    model = FakeModel(answers_slowly)
    entered: list[Any] = []

    async def background(llm: Any) -> None:
        async with llm.group() as group:
            entered.append(group)
            await group.prompt("hi")
            await anyio.sleep_forever()

    async def main() -> None:
        if run is run_asyncio:
            # What asyncio.run() finds running at its end it cancels.
            tasks.append(asyncio.get_running_loop().create_task(background(llm)))
        else:
            trio.lowlevel.spawn_system_task(background, llm)
        while not entered or not entered[0].stats.running:
            await checkpoint()

    tasks: list[Any] = []
    with watched(model, spy) as llm:
        run(main)
    spy.check()
    assert isinstance(spy.visits[0].saw, PromptCancelled)
    assert spy.exits == [entered[0].group]
    assert model.counts["opened"] == model.counts["closed"] == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
async def test_what_stops_the_program_lets_the_wrappers_settle_first(stop: type[BaseException]) -> None:
    """Under trio Ctrl-C may hit the code of a prompt itself; asyncio's runner sends it elsewhere."""
    if backend() == "asyncio":
        pytest.skip("asyncio itself raises it out of the loop")
    spy = Spy(leaving=settles_slowly)

    async def stops(prompt: str) -> AsyncGenerator[str, None]:
        await anyio.sleep(1)
        if prompt == "stop":
            raise stop
        await anyio.sleep(1)
        yield "x"

    with watched(FakeModel(stops), spy) as llm, pytest.raises(stop):  # noqa: PT012
        async with llm.group() as group:
            await group.prompt("stop")
            await group.prompt("x")
            await anyio.sleep_forever()
    spy.check()
    assert all(isinstance(visit.saw, PromptCancelled) for visit in spy.visits)
    assert len(spy.exits) == 1


SCRIPT = """
    import os, signal, sys
    os.environ["DATASETTE_LOAD_PLUGINS"] = "datasette-llm,datasette-secrets"
    # What is started in the background of a shell inherits that it is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import anyio
    from tests.fakes import FakeModel
    from tests.spies import Spy, watched

    async def chunks(prompt):
        yield "first"
        print("ready", flush=True)
        await anyio.sleep(60)

    async def leaving(visit):
        await anyio.sleep(0.05)
        print("settled", visit.prompt, type(visit.saw).__name__, flush=True)

    async def exiting(group):
        await anyio.sleep(0.05)
        print("exit hook", flush=True)

    async def main():
        if sys.argv[2] == "group":
            async with llm.group() as model:
                await model.prompt("hi")
                await anyio.sleep(60)
        else:
            response = await (await llm.model()).prompt("hi")
            await response.text()

    model = FakeModel(chunks)
    with watched(model, Spy(leaving=leaving, exiting=exiting)) as llm:
        try:
            anyio.run(main, backend=sys.argv[1])
        finally:
            print("closed", model.counts["closed"], flush=True)
"""


@pytest.mark.system
@pytest.mark.parametrize("kind", ["group", "standalone"])
@pytest.mark.parametrize("name", ["asyncio", "trio"])
def test_ctrl_c_in_a_script_settles_everything(name: str, kind: str) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), name, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    try:
        assert script.stdout.readline() == "ready\n"
        script.send_signal(signal.SIGINT)
        output, errors = script.communicate(timeout=PATIENCE_SECONDS)
    finally:
        script.kill()
        script.wait()
    settled = ["settled hi PromptCancelled"]
    assert output.splitlines() == [*settled, *(["exit hook"] if kind == "group" else []), "closed 1"]
    if name == "trio" or sys.version_info >= (3, 11):
        # Before 3.11 asyncio raises Ctrl-C wherever the loop is, and a script ends with what came of that.
        assert script.returncode == -signal.SIGINT, errors
        assert "KeyboardInterrupt" in errors
    assert script.returncode != 0
    assert "ExceptionGroup" not in errors

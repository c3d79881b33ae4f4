"""What Dask's workers need here: an engine's thread, processes of this machine, and one such process."""

from __future__ import annotations

import asyncio
import io
import json
import queue
import socket
import sys
import threading
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from datasette_llm.calls.remote import dask_actor, engine, local_cluster, local_worker
from datasette_llm.calls.remote.local_cluster import LocalProcesses
from datasette_llm.calls.remote.questions import packed, unpacked
from datasette_llm.calls.workers import Workers
from datasette_llm.errors import NoWorkers, WorkersError

from .fakes import FakeModel
from .patience import PATIENCE_SECONDS
from .spies import watched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

pytest.importorskip("distributed")
pytestmark = pytest.mark.real_clock

NONE = Workers(scheduler="tcp://127.0.0.1:1", timeout=0.2, linger=0.0)


async def ended() -> bool:
    """Wait until no thread of an engine is left."""
    for thread in threading.enumerate():
        if thread.name == "datasette-llm workers":
            await anyio.to_thread.run_sync(thread.join, PATIENCE_SECONDS)
            if thread.is_alive():
                return False
    return True


async def test_a_scheduler_that_never_answers_is_said_to_and_leaves_no_thread() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as mute, watched(FakeModel()) as facade:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(NoWorkers, match="the scheduler"):
            async with facade.group(workers=Workers(scheduler=address, timeout=0.2, linger=0.0)):
                pass
        assert await ended()


async def test_an_engine_is_ended_with_the_process_whoever_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ending", False)
    held = await engine.hold(NONE)
    assert await engine.hold(NONE) is held
    await anyio.to_thread.run_sync(engine._end_all)
    assert not held._thread.is_alive()


async def test_that_workers_cannot_be_had_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    going = threading.Event()

    @asynccontextmanager
    async def source(workers: Workers) -> AsyncIterator[Any]:
        if workers.count == 1:
            raise OSError("no room for them")
        while not going.is_set():  # noqa: ASYNC110 - set by another thread
            await anyio.sleep(0.01)
        yield None

    monkeypatch.setattr(engine, "_source", source)
    with pytest.raises(WorkersError, match="workers cannot be started: no room for them"):
        await engine.hold(Workers(count=1))
    monkeypatch.setattr(engine, "BEGIN_SECONDS", 0.05)
    with pytest.raises(WorkersError, match="nothing came of it within"):
        await engine.hold(Workers(count=2, linger=0.0))
    going.set()
    assert await ended()

    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(engine, "load_distributed", missing)
    with pytest.raises(WorkersError, match="pip install"):
        await engine.hold(Workers(count=1))


def python(code: str) -> Sequence[str]:
    return (sys.executable, "-I", "-S", "-c", code)


def test_processes_that_do_not_start_are_given_up_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    processes = LocalProcesses(1, {}, tuple, python("raise SystemExit(3)"))
    try:
        for _ in range(local_cluster.MOST_FAILURES):
            processes.look()
            processes._processes[0].popen.wait(PATIENCE_SECONDS)
        processes.look()
    finally:
        processes._end()
    assert processes.trouble == "local workers do not start, the last one: exit status 3"
    assert "A local worker did not start: exit status 3" in caplog.text


def test_processes_that_somebody_kills_are_started_again_however_often() -> None:
    processes = LocalProcesses(1, {}, tuple, python(WAITING))
    try:
        for _ in range(local_cluster.MOST_FAILURES + 1):
            processes.look()
            processes._processes[0].popen.kill()
            processes._processes[0].popen.wait(PATIENCE_SECONDS)
        processes.look()
        assert len(processes._processes) == 1
    finally:
        processes._end()
    assert processes.trouble is None


WAITING = "import sys; sys.stdin.read()"


async def test_a_process_that_does_not_come_to_its_scheduler_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: list[int] = []
    processes = LocalProcesses(2, {"told": 1}, lambda: known, python(WAITING))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(processes.run)
        processes.look()
        first, second = (each.popen for each in processes._processes)
        known.append(first.pid)
        monkeypatch.setattr(local_cluster, "REGISTER_SECONDS", 0.0)
        processes.look()
        third = next(each.popen for each in processes._processes if each.popen not in (first, second))
        assert second.returncode is not None
        assert first.poll() is None
        tasks.cancel_scope.cancel()
    assert first.returncode is not None
    assert third.returncode is not None
    assert processes.trouble is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_worker_of_a_local_cluster_makes_calls_over_tls() -> None:
    """All of it but the process: what would run in that runs here."""
    async with local_cluster.local_cluster(1, python(WAITING)) as source, anyio.create_task_group() as tasks:
        told = json.loads(source._processes._told)  # type: ignore[attr-defined]
        tasks.start_soon(local_worker._work, told)
        with anyio.fail_after(PATIENCE_SECONDS):
            while not (addresses := list(await source.addresses())):  # noqa: ASYNC110 - told by nobody
                await anyio.sleep(0.01)
            link = await source.connect(addresses[0])
            hello = unpacked(await link.ask(packed({"hello": True})))["hello"]
            assert hello["pid"] > 0
            assert link.private
            await link.send(packed({"calls": []}))
            assert unpacked(await link.poll(0))["told"] == []
            await link.aclose()
            while dask_actor._actors:  # noqa: ASYNC110 - another thread
                await anyio.sleep(0.01)
        with pytest.raises(LookupError, match="this worker's bench has ended"):
            await dask_actor.carry("gone", "ask", [b""])
        source._processes.trouble = "they do not start"  # type: ignore[attr-defined]
        with pytest.raises(WorkersError, match="they do not start"):
            await source.addresses()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_bench_whose_thread_does_not_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: dask_actor.BenchActor) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(dask_actor.BenchActor, "_main", broken)
    with pytest.raises(RuntimeError, match="can't start"):
        await dask_actor.BenchActor("one").start()
    let_go = threading.Event()
    monkeypatch.setattr(dask_actor.BenchActor, "_run", lambda self: let_go.wait())
    monkeypatch.setattr(dask_actor, "START_SECONDS", 0.01)
    with pytest.raises(TimeoutError, match="did not start in"):
        await dask_actor.BenchActor("two").start()
    let_go.set()
    dask_actor._actors.clear()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_bench_that_is_busy_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_actor, "POLL_SECONDS", 0.01)
    busy = threading.Event()
    with watched(FakeModel()):
        actor = dask_actor.BenchActor("busy")
        await actor.start()
        blocked = actor._there(busy.wait, PATIENCE_SECONDS)
        assert unpacked(await actor.poll(7)) == {"batch": 7, "ended": False, "told": []}
        busy.set()
        assert await blocked
        await actor.send(packed({"calls": [[1, {"model": "fake", "prompt": "x", "stream": False}]]}))
        with anyio.fail_after(PATIENCE_SECONDS):
            while not (told := unpacked(await actor.poll(0))["told"]):
                pass
        assert [(number, kind) for number, kind, _ in told] == [(1, "done")]
        await actor.end()


@pytest.mark.parametrize("ends", ["by itself", "with its standard input"])
def test_a_worker_process_is_told_its_work_by_a_line_and_ends_with_its_standard_input(
    monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    told: list[dict[str, Any]] = []
    left: queue.Queue[int] = queue.Queue()

    async def work(given: dict[str, Any]) -> None:
        told.append(given)
        if ends == "with its standard input":
            await asyncio.to_thread(lambda: left.put(left.get(timeout=PATIENCE_SECONDS)))

    monkeypatch.setattr(local_worker, "_work", work)
    monkeypatch.setattr(local_worker, "_load_models", lambda: None)
    local_worker.run(io.BytesIO(b'{"scheduler": "tls://127.0.0.1:1"}\nx'), left.put)
    assert {left.get(timeout=PATIENCE_SECONDS), left.get(timeout=PATIENCE_SECONDS)} == {0, 1}
    assert told == [{"scheduler": "tls://127.0.0.1:1"}]

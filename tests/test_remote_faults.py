"""Workers that do not fit, do not answer or are no more: it is found, and said, and nobody waits for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import llm
import pytest

from datasette_llm.calls.remote import identity
from datasette_llm.calls.remote.bench import LEASE_SECONDS, Bench
from datasette_llm.calls.remote.dask_source import DaskLink
from datasette_llm.calls.remote.fleet import WorkerGone
from datasette_llm.calls.remote.line import SILENCE_SECONDS, UnfitWorker
from datasette_llm.calls.remote.questions import packed
from datasette_llm.errors import NoWorkers, WorkersError
from datasette_llm.pace.throttle import Throttle

from .fakes import FakeModel
from .remote_workers import fake_workers
from .spies import watched

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping


async def test_a_worker_that_falls_silent_is_given_up_and_its_calls_are_made_by_others() -> None:
    model = FakeModel(seconds=1)
    with watched(model) as facade:
        async with fake_workers("a", "b") as workers, facade.group(workers=workers.spec) as group:
            responses = [await group.prompt(str(number), stream=False) for number in range(4)]
            workers.links["a"].silent = True
            began = anyio.current_time()
            assert [await response.text() for response in responses] == ["0", "1", "2", "3"]
            assert anyio.current_time() - began < SILENCE_SECONDS + 3
            assert workers.fleet.figures.deaths == 1


async def test_an_answer_that_somebody_has_begun_to_read_is_not_begun_again() -> None:
    async def script(prompt: str) -> AsyncGenerator[str, None]:
        yield "begun"
        await anyio.sleep_forever()

    model = FakeModel(script)
    with watched(model) as facade:
        async with fake_workers("a", "b") as workers, facade.group(workers=workers.spec) as group:
            response = await group.prompt("x")
            chunks = aiter(response)
            assert await anext(chunks) == "begun"
            await workers.kill_one_at_work()
            with pytest.raises(WorkerGone, match="in the middle of its answer"):
                await anext(chunks)
    assert model.prompts == ["x"]


async def test_a_worker_that_ends_of_its_own_is_no_death() -> None:
    with watched(FakeModel(seconds=1)) as facade:
        async with fake_workers("a", "b") as workers, facade.group(workers=workers.spec) as group:
            response = await group.prompt("x", stream=False)
            await anyio.sleep(0.5)
            busy = next(address for address, n in workers.fleet.figures.workers.items() if n)
            workers.links[busy].bench.end()
            assert await response.text() == "x"
            assert workers.fleet.figures.deaths == 0


async def test_when_the_fleet_ends_whoever_waits_hears_of_it() -> None:
    with watched(FakeModel(seconds=1000)) as facade:
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            running = await group.prompt("running")
            await anyio.sleep(0.5)
            await workers.kill("a")
            await anyio.sleep(1)
            workers.scope.cancel()
            with pytest.raises(WorkersError, match="the workers have ended"):
                await running.text()
            with pytest.raises(WorkersError, match="the workers have ended"):
                await (await group.prompt("later")).text()
            with pytest.raises(WorkersError, match="the workers have ended"):
                async with facade.group(workers=workers.spec):
                    pass


async def test_that_there_will_be_no_worker_is_said_at_once() -> None:
    with watched(FakeModel(seconds=1)) as facade:
        async with fake_workers(timeout=1000) as workers:
            workers.hopeless = "local workers do not start, the last one: exit status 3"
            began = anyio.current_time()
            with pytest.raises(WorkersError, match="exit status 3"):
                async with facade.group(workers=workers.spec):
                    pass
            assert anyio.current_time() - began < 5


async def test_a_worker_that_cannot_be_reached_is_tried_again_and_named() -> None:
    with watched(FakeModel()) as facade:
        async with fake_workers("a", timeout=5) as workers:
            workers.failing["a"] = OSError("the worker a did not answer within 15 seconds")
            with pytest.raises(NoWorkers, match="the worker a did not answer"):
                async with facade.group(workers=workers.spec):
                    pass
            del workers.failing["a"]
            async with facade.group(workers=workers.spec) as group:
                assert await (await group.prompt("x")).text() == "x"


@pytest.mark.parametrize(
    ("hello", "words"),
    [({"llm": "0.1"}, "it has llm 0.1, and here is"), ({"wire": 0}, "another version of datasette-llm")],
)
async def test_a_worker_of_another_version_is_left_out_or_refused_before_a_row_is_sent(
    hello: dict[str, object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = FakeModel()
    with watched(model) as facade:
        async with fake_workers("old") as workers:
            workers.hellos["old"] = hello
            with pytest.raises(WorkersError, match=words):
                async with facade.group(workers=workers.spec):
                    pass
            assert model.prompts == []
            workers.add("new")
            await anyio.sleep(3)
            async with facade.group(workers=workers.spec) as group:
                assert await (await group.prompt("x")).text() == "x"
            assert "The worker old cannot be used" in caplog.text
            assert workers.links["old"].calls == 0


async def test_another_plugin_class_or_address_of_a_model_is_told_apart() -> None:
    model: Any = FakeModel()
    model.api_base = "http://here"
    with watched(model):
        same = identity.of_model(model)
        assert identity.difference(same) is None
        assert "asks another address" in str(identity.difference(same | {"address": {"api_base": "x"}}))
        assert "and here a other.Model" in str(identity.difference(same | {"class": "other.Model"}))
        absent = same | {"id": "absent", "plugin": ["llm-absent", "1.0"]}
        assert "it has no model absent, which comes with llm-absent 1.0" in str(identity.difference(absent))
        own = identity.of_model(llm.get_async_model("gpt-4o-mini"))
        other = own | {"plugin": ["llm-other", "2.0"]}
        assert "and here of llm-other 2.0" in str(identity.difference(other))


async def test_the_pace_sees_a_workers_answers_with_their_age(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def observe(self: Throttle, status: int, headers: Mapping[str, str], age: float = 0.0) -> None:
        seen.append((status, dict(headers), round(age, 1)))

    monkeypatch.setattr(Throttle, "observe", observe)

    async def script(prompt: str) -> AsyncGenerator[str, None]:
        headers = {"X-RateLimit-Remaining-Requests": "5", "Set-Cookie": "secret"}
        workers.links["a"].bench._observe(200, headers, 1.0)
        await anyio.sleep(2)
        if prompt == "fail":
            raise ValueError("no")
        yield "answer"

    with watched(FakeModel(script)) as facade:
        async with fake_workers("a") as workers, facade.group(workers=workers.spec) as group:
            await (await group.prompt("x", stream=False)).text()
            with pytest.raises(ValueError, match="no"):
                await (await group.prompt("fail", stream=False)).text()
    assert seen == [(200, {"x-ratelimit-remaining-requests": "5"}, 3.0)] * 2


async def test_a_lease_is_not_over_because_the_worker_itself_stood_still() -> None:
    """What asked in the meantime is heard only afterwards."""
    with watched(FakeModel(seconds=1000)) as _:
        bench = Bench()
        async with anyio.create_task_group() as tasks:
            await tasks.start(bench.run)
            bench.take(packed({"calls": [[1, {"model": "fake", "prompt": "x", "stream": False}]]}))
            for _ in range(5):
                await anyio.sleep(LEASE_SECONDS - 1)
                bench.take(packed({"cancel": [7]}))
            assert not bench._ended.is_set()
            bench.end()


class Rpc:
    """Stands for Dask's: what calls of it return or raise."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        async def call(**_: Any) -> Any:
            if isinstance(self._outcome, Exception):
                raise self._outcome
            if self._outcome is None:
                await anyio.sleep_forever()
            return self._outcome

        return call


async def test_a_dask_worker_without_this_package_or_that_fails_or_is_silent_is_said_to() -> None:
    pytest.importorskip("distributed")
    with pytest.raises(UnfitWorker, match="no datasette-llm that can work with this one"):
        await DaskLink(Rpc(ModuleNotFoundError("No module named 'datasette_llm'")), "tcp://host:1").open()
    with pytest.raises(TimeoutError, match="did not start"):
        await DaskLink(
            Rpc({"status": "error", "exception": TimeoutError("the thread did not start")}), "tcp://host:1"
        ).open()
    link = DaskLink(Rpc(None), "tcp://host:1")
    with pytest.raises(ConnectionError, match="the worker tcp://host:1 did not answer within 60 seconds"):
        await link.open()
    with pytest.raises(ConnectionError, match="did not answer within"):
        await link.send(b"")
    await link.let_go()
    await DaskLink(Rpc(OSError("closed")), "tcp://host:1").let_go()

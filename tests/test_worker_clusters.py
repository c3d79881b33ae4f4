"""Workers of a real scheduler that lives in this process: by its address, and by a client of somebody's."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from datasette_llm import LLM
from datasette_llm.calls import workers as kinds_of_workers
from datasette_llm.calls.remote.engine import _engines
from datasette_llm.errors import NoWorkers

from .fakes import FakeModel, registered
from .hooks import datasette_with
from .patience import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.real_clock


def started_cluster() -> Any:
    return distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of a cluster with one worker, all in threads of this process."""
    with (
        started_cluster() as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client
        # What uses the cluster lets go of it a second after the last group.
        for engine in list(_engines.values()):
            engine._thread.join(PATIENCE_SECONDS)


class Threads(FakeModel):
    """Answers with the name of the thread that it is asked in."""

    def __init__(self) -> None:
        super().__init__(self._name, model_id="threads")

    async def _name(self, prompt: str) -> AsyncGenerator[Any, None]:
        if prompt == "break":
            raise ValueError("it broke")
        yield threading.current_thread().name


@pytest.mark.parametrize("given", ["address", "client"])
async def test_calls_are_made_by_a_scheduler_that_is_there(client: Any, given: str) -> None:
    workers = client.scheduler.address if given == "address" else client
    with registered(Threads()), anyio.fail_after(PATIENCE_SECONDS):
        async with LLM(datasette_with()).group("threads", workers=workers) as group:
            names = {await response.text() async for _, response in group.map(map(str, range(20)))}
            with pytest.raises(ValueError, match="it broke"):
                await (await group.prompt("break")).text()
            chunks = [chunk async for chunk in await group.prompt("streamed")]
            figures = group.stats.workers
    assert figures is not None
    # The last one's fleet may still be there.
    assert sum(figures.prompts.values()) >= 22
    assert names == {"datasette-llm bench"} == {*chunks}


async def test_workers_of_the_configuration_make_a_purposes_calls(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds_of_workers, "KEPT_SECONDS", 0.1)
    config = {"purposes": {"bulk": {"workers": {"scheduler": client.scheduler.address}}}}
    facade = LLM(datasette_with(config))
    with registered(Threads()), anyio.fail_after(PATIENCE_SECONDS):
        async with facade.group("threads", purpose="bulk") as group:
            assert await (await group.prompt("x")).text() == "datasette-llm bench"
        async with facade.group("threads", purpose="talk") as group:
            assert await (await group.prompt("x")).text() != "datasette-llm bench"


async def test_when_the_scheduler_dies_prompts_wait_and_then_say_so() -> None:
    cluster = await anyio.to_thread.run_sync(started_cluster)
    workers = {"scheduler": cluster.scheduler_address, "timeout": PATIENCE_SECONDS}
    with registered(Threads()), anyio.fail_after(PATIENCE_SECONDS):
        async with LLM(datasette_with()).group("threads", workers=workers) as group:
            assert await (await group.prompt("x")).text() == "datasette-llm bench"
            await anyio.to_thread.run_sync(cluster.close)
            # Not before: a worker may take its time to begin.
            for engine in list(_engines.values()):
                engine.fleet.timeout = 0.3
            with pytest.raises(NoWorkers, match="no worker for"):
                await (await group.prompt("y")).text()

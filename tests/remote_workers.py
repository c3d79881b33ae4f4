"""Workers without processes: benches on the test's own event loop, that can be killed and slowed down."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from datasette_llm.calls.remote.bench import Bench
from datasette_llm.calls.remote.fleet import Fleet
from datasette_llm.calls.workers import Workers
from datasette_llm.errors import WorkersError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from anyio.abc import TaskGroup, TaskStatus


class FakeLink:
    """Carries parcels to a bench at once, or after a while; breaks when the worker is killed.

    Attributes:
        calls: how many calls were sent.
        silent: whether nothing of it arrives any more.
        hello: what it says of itself that is not so.
        parcels: everything that was carried there.
    """

    def __init__(self, delay: float = 0.0, *, private: bool = True) -> None:
        self.private = private
        self.calls = 0
        self.parcels: list[bytes] = []
        self.dead = False
        self.silent = False
        self.hello: dict[str, object] = {}
        self.bench = Bench()
        self.scope = anyio.CancelScope()
        self._delay = delay

    async def _carry(self) -> None:
        if self._delay:
            await anyio.sleep(self._delay)
        if self.silent:
            await anyio.sleep_forever()
        if self.dead:
            raise OSError("connection refused")

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        with self.scope:
            await self.bench.run(task_status=task_status)

    async def ask(self, request: bytes) -> bytes:
        await self._carry()
        self.parcels.append(request)
        answer = json.loads(self.bench.ask(request))
        if "hello" in answer:
            answer["hello"].update(self.hello)
        return json.dumps(answer).encode()

    async def send(self, parcel: bytes) -> None:
        await self._carry()
        self.parcels.append(parcel)
        self.calls += parcel.count(b'"prompt":')
        self.bench.take(parcel)

    async def poll(self, acknowledged: int) -> bytes:
        content = await self.bench.poll(acknowledged)
        await self._carry()
        return content

    async def aclose(self) -> None:
        if not self.dead:
            self.bench.end()


class FakeWorkers:
    """Where the fleet of a test gets its workers.

    Attributes:
        links: of the workers that are or were there, by address.
        reachable: whether the scheduler answers.
        hopeless: why there will be no worker, if so.
        failing: what connecting to a worker raises, by address.
        hellos: what a worker says of itself that is not so, by address.
        scope: of the fleet; cancelled, it ends.
    """

    def __init__(self, tasks: TaskGroup, fleet: Fleet, *, private: bool = True) -> None:
        self.links: dict[str, FakeLink] = {}
        self.reachable = True
        self.hopeless: str | None = None
        self.failing: dict[str, Exception] = {}
        self.hellos: dict[str, dict[str, object]] = {}
        self.scope = anyio.CancelScope()
        self.fleet = fleet
        self.spec = Workers(fleet=fleet)
        self._private = private
        self._tasks = tasks
        self._delays: dict[str, float] = {}

    def add(self, address: str, delay: float = 0.0) -> None:
        """Have a worker join."""
        self._delays[address] = delay

    async def kill(self, address: str) -> None:
        """Have a worker vanish in the middle of what it does, and wait until that is known."""
        del self._delays[address]
        link = self.links[address]
        link.dead = True
        link.scope.cancel()
        while address in self.fleet.lines:  # noqa: ASYNC110 - a fleet has no event for it
            await anyio.sleep(0.01)

    async def kill_one_at_work(self) -> None:
        """Have a worker vanish that has prompts."""
        await self.kill(next(address for address, n in self.fleet.figures.workers.items() if n))

    async def run(self) -> None:
        with self.scope:
            await self.fleet.run(self)

    async def addresses(self) -> Collection[str]:
        if self.hopeless is not None:
            raise WorkersError(self.hopeless)
        if not self.reachable:
            raise OSError("the scheduler does not answer")
        return list(self._delays)

    async def connect(self, address: str) -> FakeLink:
        if address in self.failing:
            raise self.failing[address]
        link = self.links[address] = FakeLink(self._delays[address], private=self._private)
        link.hello = self.hellos.get(address, {})
        await self._tasks.start(link.run)
        return link


@asynccontextmanager
async def fake_workers(
    *addresses: str, timeout: float = 60.0, private: bool = True
) -> AsyncIterator[FakeWorkers]:
    """Run a fleet with these workers."""
    async with anyio.create_task_group() as tasks:
        fleet = Fleet(timeout)
        workers = FakeWorkers(tasks, fleet, private=private)
        for address in addresses:
            workers.add(address)
        tasks.start_soon(workers.run)
        yield workers
        tasks.cancel_scope.cancel()

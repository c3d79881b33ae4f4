"""What lives in a Dask worker: one bench, on an event loop and in a thread of its own.

Dask's own loop only carries parcels. It awaits these methods; it never runs a model's code.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

import anyio

from ...backends.loops import LoopDoor
from .bench import POLL_SECONDS, Bench, nothing_new

if TYPE_CHECKING:
    from collections.abc import Callable

    from anyio.abc import TaskGroup

logger = logging.getLogger("datasette_llm")

#: How long the thread may take to start, in seconds.
START_SECONDS = 20.0
#: What a Dask worker is asked for when a bench is meant.
OPERATION = "datasette_llm_bench"
ENDED = "this worker's bench has ended"
_METHODS = frozenset({"ask", "send", "poll", "end"})

_actors: dict[str, BenchActor] = {}


class BenchActor:
    """One coordinator's bench: bytes in, bytes out."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._started: Future[None] = Future()
        self._bench: Bench | None = None
        self._door: LoopDoor | None = None
        self._tasks: TaskGroup | None = None
        self._asked: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="datasette-llm bench", daemon=True)

    async def start(self) -> None:
        """Start the thread.

        Raises:
            TimeoutError: it did not begin to work.
        """
        _actors[self._key] = self
        self._thread.start()
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._started), START_SECONDS)
        except asyncio.TimeoutError:
            raise TimeoutError(f"the thread of a worker did not start in {START_SECONDS:g} seconds") from None

    def _run(self) -> None:
        try:
            anyio.run(self._main)
        except BaseException as error:
            if self._started.done():
                logger.exception("A worker's thread ended")
            else:
                self._started.set_exception(error)
        finally:
            _actors.pop(self._key, None)
            for answer in list(self._asked):
                _settle(answer, LookupError(ENDED))

    async def _main(self) -> None:
        self._bench = Bench()
        async with anyio.create_task_group() as self._tasks:
            # Not anyio's portal, which has the thread that asks wait until this loop comes to it.
            self._door = LoopDoor()
            async with anyio.create_task_group() as tasks:
                await tasks.start(self._bench.run)
                self._started.set_result(None)
            # The polls that are left say that this is the end; they take no longer than a poll does.

    def _there(self, method: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        """Have the bench's loop call something; returns at once, with what will be its answer."""
        assert self._door is not None
        answer: Future[Any] = Future()
        self._asked.add(answer)
        answer.add_done_callback(self._asked.discard)

        def begin() -> None:
            assert self._tasks is not None
            try:
                outcome = method(*arguments)
                if isinstance(outcome, Coroutine):
                    self._tasks.start_soon(_finish, outcome, answer)
                    return
            except Exception as error:
                outcome = error
            _settle(answer, outcome)

        self._door.call_soon(begin)
        return asyncio.wrap_future(answer)

    async def ask(self, request: bytes) -> bytes:
        """Answer what is asked before calls are sent."""
        assert self._bench is not None
        return bytes(await self._there(self._bench.ask, request))

    async def send(self, parcel: bytes) -> bytes:
        """Begin the calls of a parcel, and cancel those it names."""
        assert self._bench is not None
        await self._there(self._bench.take, parcel)
        return b""

    async def poll(self, acknowledged: int) -> bytes:
        """Return what came of calls, as soon as there is something.

        A bench that is busy, with the import of a provider's client, say, does not answer for seconds. The
        process is there all the same, and says so: what it would have told is told at the next poll.
        """
        assert self._bench is not None
        answer = self._there(self._bench.poll, acknowledged)
        done, _ = await asyncio.wait({answer}, timeout=2 * POLL_SECONDS)
        return bytes(answer.result()) if done else nothing_new(acknowledged)

    async def end(self) -> bytes:
        """Cancel what runs, and end the thread."""
        assert self._bench is not None
        await self._there(self._bench.end)
        return b""


async def _finish(coroutine: Coroutine[Any, Any, Any], answer: Future[Any]) -> None:
    try:
        outcome: Any = await coroutine
    except Exception as error:
        outcome = error
    _settle(answer, outcome)


def _settle(answer: Future[Any], outcome: Any) -> None:
    try:
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)
    except InvalidStateError:  # nobody waits for it any more
        pass


async def open_bench(key: str, dask_worker: Any) -> None:
    """Begin to work for a coordinator: runs in a Dask worker, which fills in itself."""
    dask_worker.handlers[OPERATION] = carry
    await BenchActor(key).start()


async def carry(bench: str, method: str, arguments: list[Any]) -> bytes:
    """Have a bench do something: what a Dask worker calls for a message of this operation.

    Raises:
        LookupError: it has ended.
    """
    actor = _actors.get(bench)
    if actor is None or method not in _METHODS:
        raise LookupError(ENDED)
    answer: bytes = await getattr(actor, method)(*arguments)
    return answer

"""What a map pulls its items from, and the task that pulls those that come asynchronously.

Cancel scopes that a generator opens may not wander between tasks, nor may a scope of ours be left while
one of the generator's is open. So one task pulls an async source, the feeder, and opens a single scope
around all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import anyio
from anyio import CancelScope

from ..backends.closing import close_quietly

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

#: How long closing an async source may take, in seconds.
CLOSE_SECONDS = 5.0


class Fed(Protocol):
    """The map, as its feeder knows it."""

    exhausted: bool

    @property
    def has_room(self) -> bool: ...

    def pulled(self) -> None: ...

    def wake_worker(self) -> None: ...

    def end_source(self, error: Exception | None = None) -> None: ...

    def at_home(self, function: Callable[[], Any]) -> None: ...


class Feeder(Generic[T]):
    """Pulls an async source for the workers, and closes it in the end."""

    def __init__(self, run: Fed, source: AsyncIterator[T]) -> None:
        self._map = run
        self._source = source
        self._ready: deque[T] = deque()
        self._wanted: anyio.Event | None = None
        self._scope: CancelScope | None = None
        self._pulling = False

    def wake(self) -> None:
        """There is room for another item."""
        if self._wanted is not None:
            self._wanted.set()

    def take(self) -> tuple[T] | None:
        """Take an item that has been pulled, if there is one."""
        return (self._ready.popleft(),) if self._ready else None

    def stop(self) -> None:
        """Pull no more. A generator that is running is cancelled, one that waits is closed."""
        self.wake()
        if self._pulling and self._scope is not None:
            self._map.at_home(self._scope.cancel)

    async def run(self) -> None:
        """Pull until the source ends or nobody wants more."""
        # Shielded, so that a source that is closed can clean up: stop() is what ends the pulling.
        with CancelScope(shield=True) as scope:
            self._scope = scope
            try:
                await self._pull()
            except Exception as error:
                self._map.end_source(error)
            finally:
                self._map.end_source()
                if not scope.cancel_called:
                    # In this very scope, since the generator may have scopes of its own open in it.
                    scope.deadline = anyio.current_time() + CLOSE_SECONDS
                    await self._close()
        if scope.cancel_called:
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._close()

    async def _pull(self) -> None:
        while True:
            while not self._map.has_room:
                if self._map.exhausted:
                    return
                self._wanted = anyio.Event()
                await self._wanted.wait()
            self._pulling = True
            try:
                item = await anext(self._source)
            except StopAsyncIteration:
                return
            finally:
                self._pulling = False
            if self._map.exhausted:
                return
            self._map.pulled()
            self._ready.append(item)
            self._map.wake_worker()

    async def _close(self) -> None:
        await close_quietly(self._source, "the source of a map")


def source_of(items: Iterable[T] | AsyncIterable[T]) -> Iterator[T] | AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        return aiter(items)
    if isinstance(items, Iterable):
        return iter(items)
    raise TypeError(f"map() takes an iterable or an async iterable, not {type(items).__name__}")

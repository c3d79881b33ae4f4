"""``map()``: a stream of prompts from an iterable, in a fixed set of workers.

Workers live in the group's task group and run their prompts in place, one after the other: no task per
item. There are at most as many as prompts may be in flight, started as items are there for them. An item
is pulled only when fewer than that many are pulled and not yet taken by the loop, so memory does not grow
with the iterable, and a slow loop slows the prompts down (backpressure).

Two objects: ``PromptMap`` is the iterator the loop holds; dropping it (``break``) stops the map. ``MapRun``
is what the workers hold, and it does not know the iterator.

An async iterable is pulled by one task of its own, the feeder, because a generator's cancel scopes may
not wander between tasks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import llm
from anyio import CancelScope

from ..errors import PromptCancelled
from .hook_scope import hooks_wrap_prompts
from .response import PromptResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from .group import Group
    from .prompt_task import PromptTask

T = TypeVar("T")

#: How long closing an async source may take, in seconds.
CLOSE_SECONDS = 5.0


class PromptMap(Generic[T]):
    """The async iterator that ``map()`` returns: ``(item, response)`` pairs as prompts finish.

    Leaving the loop early stops the pulling and cancels the prompts in flight.
    """

    def __init__(self, run: MapRun[T]) -> None:
        self._run = run

    def __aiter__(self) -> PromptMap[T]:
        return self

    async def __anext__(self) -> tuple[T, PromptResponse]:
        return await self._run.next_pair()

    async def aclose(self) -> None:
        """Stop pulling and cancel what is in flight, as ``contextlib.aclosing`` calls it."""
        self._run.stop()

    def __del__(self) -> None:
        # Where the loop was left with break, this is the first to know.
        self._run.stop()


class MapRun(Generic[T]):
    """What the workers of one ``map()`` share.

    Args:
        group: the supervisor of the prompts.
        items: a sync or async iterable, pulled lazily.
        to_prompt: what to prompt for an item: a string, or a mapping of ``prompt()`` keywords.
        make_task: makes the prompt's task from ``prompt()`` keywords.
    """

    def __init__(
        self,
        group: Group,
        items: Iterable[T] | AsyncIterable[T],
        to_prompt: Callable[[T], str | Mapping[str, Any]],
        make_task: Callable[[Mapping[str, Any]], PromptTask],
    ) -> None:
        self._group = group
        self._to_prompt = to_prompt
        self._make_task = make_task
        self._source = _source_of(items)
        self._offer, self._offered = anyio.create_memory_object_stream[T](0)
        self._results, self._finished = anyio.create_memory_object_stream["tuple[T, PromptResponse]"](
            float("inf")
        )
        self._begun = False
        self._exhausted = False
        self._stopped = False
        self._error: Exception | None = None
        self._outstanding = 0
        self._waiting_for_room: deque[anyio.Event] = deque()
        self._workers = 0
        self._scopes: dict[CancelScope, None] = {}
        self._running: dict[PromptTask, None] = {}

    # The loop's side

    async def next_pair(self) -> tuple[T, PromptResponse]:
        """The next finished prompt.

        Raises:
            StopAsyncIteration: every prompt has been given, or the map has been stopped.
            PromptCancelled: the group has been cancelled.
            Exception: what the iterable or ``to_prompt`` raised, after the prompts pulled before.
        """
        if not self._begun:
            self._begin()
        if not self._stopped:
            try:
                try:
                    pair = self._finished.receive_nowait()
                except anyio.WouldBlock:
                    pair = await self._finished.receive()
            except anyio.EndOfStream:
                self.stop()
                if self._error is not None:
                    raise self._error from None
            except anyio.ClosedResourceError:
                pass
            else:
                self._outstanding -= 1
                self._wake_one()
                return pair
        if self._group._cancelled:
            raise PromptCancelled("the group has been cancelled")
        raise StopAsyncIteration

    def stop(self) -> None:
        """Stop pulling and cancel what is in flight. Returns at once; idempotent."""
        self._stopped = self._begun = self._exhausted = True
        self._group._maps.pop(self, None)
        for task in list(self._running):
            task.cancel()
        for scope in list(self._scopes):
            scope.cancel()
        for stream in (self._results, self._finished, self._offer, self._offered):
            stream.close()

    # The workers' side

    def _begin(self) -> None:
        self._begun = True
        self._group.check_open()
        self._group._maps[self] = None
        if isinstance(self._source, AsyncIterator):
            self._spawn(self._feed)
        self._spawn_worker()

    def _spawn(self, function: Callable[[], Any]) -> None:
        tasks = self._group._tasks
        assert tasks is not None
        tasks.start_soon(function)

    def _spawn_worker(self) -> None:
        self._workers += 1
        self._spawn(self._work)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        with CancelScope() as scope:
            self._scopes[scope] = None
            try:
                yield
            finally:
                del self._scopes[scope]

    async def _work(self) -> None:
        pull = self._take_offer if isinstance(self._source, AsyncIterator) else self._pull
        try:
            with self._stoppable():
                while not self._stopped:
                    pulled = await pull()
                    if not pulled:
                        break
                    if self._workers < self._group.slots.limit and not self._exhausted:
                        self._spawn_worker()
                    await self._prompt(pulled[0])
        finally:
            self._workers -= 1
            if not self._workers:
                self._results.close()

    async def _prompt(self, item: T) -> None:
        try:
            keywords = _keywords(self._to_prompt(item))
        except Exception as error:
            self._end_source(error)
            return
        try:
            task = self._make_task(keywords)
        except TypeError as error:
            # Not this row's fault: prompt() has no such argument.
            self._end_source(error)
            return
        except Exception as error:
            self._give(item, self._refused(error))
            return
        if hooks_wrap_prompts():
            # In a task of its own: shielded, and context variables a wrapper sets end with the prompt.
            self._running[task] = None
            try:
                self._group.start(task)
                await task.response.wait()
            finally:
                del self._running[task]
        else:
            await task.run_unwrapped()
        self._give(item, task.response)

    def _refused(self, error: Exception) -> PromptResponse:
        """The response of a prompt that llm did not take: an option out of range, a wrong attachment."""
        model = self._group.choice.model
        observed = llm.AsyncResponse(llm.Prompt(None, model), model, stream=False)
        response = PromptResponse(observed, on_cancel=lambda: None)
        response._finish(error)
        self._group.counters.failed += 1
        self._group.prompt_failed(error)
        return response

    def _give(self, item: T, response: PromptResponse) -> None:
        if not self._stopped:
            if response._error is not None:
                self._group.watch_failure(response)
            self._results.send_nowait((item, response))

    # The source

    async def _wait_for_room(self) -> bool:
        """Wait until another item may be pulled. Returns whether there may be another item."""
        while self._outstanding >= self._group.slots.limit and not self._exhausted:
            room = anyio.Event()
            self._waiting_for_room.append(room)
            await room.wait()
        return not self._exhausted

    def _wake_one(self) -> None:
        # One at a time: there is room for one, and waking all of them would cost the square of it.
        if self._waiting_for_room:
            self._waiting_for_room.popleft().set()

    def _end_source(self, error: Exception | None = None) -> None:
        self._exhausted = True
        self._error = self._error or error
        while self._waiting_for_room:
            self._wake_one()

    async def _pull(self) -> tuple[T] | None:
        if not await self._wait_for_room():
            return None
        assert isinstance(self._source, Iterator)
        try:
            item = next(self._source)
        except StopIteration:
            self._end_source()
            return None
        except Exception as error:
            self._end_source(error)
            return None
        self._outstanding += 1
        return (item,)

    async def _take_offer(self) -> tuple[T] | None:
        try:
            return (await self._offered.receive(),)
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            return None

    async def _feed(self) -> None:
        """Pull an async source and offer its items to the workers; close it in the end."""
        source = self._source
        assert isinstance(source, AsyncIterator)
        try:
            with self._stoppable():
                while await self._wait_for_room():
                    try:
                        item = await anext(source)
                    except StopAsyncIteration:
                        break
                    self._outstanding += 1
                    await self._offer.send(item)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            # The map was stopped between the pull and the offer.
            pass
        except Exception as error:
            self._error = self._error or error
        finally:
            self._end_source()
            self._offer.close()
            if hasattr(source, "aclose"):
                with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                    await source.aclose()


def _source_of(items: Iterable[T] | AsyncIterable[T]) -> Iterator[T] | AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        return aiter(items)
    if isinstance(items, Iterable):
        return iter(items)
    raise TypeError(f"map() takes an iterable or an async iterable, not {type(items).__name__}")


def _keywords(prompt: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        return prompt
    raise TypeError(
        f"to_prompt must return a string or a dict of prompt() keywords, not {type(prompt).__name__}"
    )

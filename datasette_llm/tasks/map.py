"""``map()``: a stream of prompts from an iterable, in a fixed set of workers.

Workers live in the group's task group and run their prompts in place, one after the other: no task per
item. An item is pulled only while fewer items are pulled and not yet taken by the loop than prompts may be
in flight: memory does not grow with the iterable, and a slow loop slows the prompts down (backpressure).
Prompts that wait between two attempts are not in flight: as many others are pulled, up to twice the number.
Workers are started as there are items for them; those without one are idle.

Two objects: ``PromptMap`` is the iterator the loop holds; dropping it (``break``) stops the map. ``MapRun``
is what the workers hold, and it does not know the iterator.

A sync iterable is pulled by whichever worker is free, an async one by a task of its own, the feeder.

A map ends in one of three ways:

* exhausted: the source has ended (or it, or ``to_prompt``, raised) and the loop has taken every pair;
* left: the loop's end. What is in flight is cancelled, what is finished is dropped;
* stopped by the group (cancelled, or its block left): what is in flight is cancelled, the loop still gets
  the pairs that have an outcome of their own, then ``PromptCancelled``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from inspect import iscoroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import llm
from anyio import CancelScope, get_cancelled_exc_class

from ..backends.collector import spare_older_objects
from ..backends.loops import LoopDoor
from ..backends.signal import Signal
from ..calls.attachments import need_finding, with_types
from ..errors import PromptCancelled
from ..responses.response import PromptResponse
from .feeding import Feeder, source_of
from .hook_scope import hooks_wrap_prompts

if TYPE_CHECKING:
    from collections.abc import Callable

    from .group_supervisor import GroupSupervisor
    from .prompt_task import PromptTask

T = TypeVar("T")


class PromptMap(Generic[T]):
    """The async iterator that ``map()`` returns: ``(item, response)`` pairs as prompts finish.

    Leaving the loop early stops the pulling and cancels the prompts in flight.
    """

    def __init__(self, run: MapRun[T]) -> None:
        self._run = run
        self._door = LoopDoor()

    def __aiter__(self) -> PromptMap[T]:
        return self

    async def __anext__(self) -> tuple[T, PromptResponse]:
        return await self._run.next_pair()

    async def aclose(self) -> None:
        """Stop pulling and cancel what is in flight, as ``contextlib.aclosing`` calls it."""
        self._run.leave()

    def __del__(self) -> None:
        # Where the loop was left with break, this is the first to know.
        if not self._run.ended:
            self._door.call_soon(self._run.leave)


class MapRun(Generic[T]):
    """What the workers of one ``map()`` share.

    Args:
        supervisor: the owner of the prompts.
        items: a sync or async iterable, pulled lazily.
        to_prompt: what to prompt for an item: a string, or a mapping of ``prompt()`` keywords.
        make_task: makes the prompt's task from ``prompt()`` keywords.

    Attributes:
        exhausted: whether nothing more is pulled.
        ended: whether nothing more is given to the loop.
    """

    def __init__(
        self,
        supervisor: GroupSupervisor,
        items: Iterable[T] | AsyncIterable[T],
        to_prompt: Callable[[T], str | Mapping[str, Any]],
        make_task: Callable[[Mapping[str, Any]], PromptTask],
    ) -> None:
        self.ended = False
        self._supervisor = supervisor
        self._slots = supervisor.slots
        self.at_home = supervisor.at_home
        self._to_prompt = to_prompt
        self._make_task = make_task
        self._begun = False
        self._stopped = False
        self.exhausted = False
        self._error: Exception | None = None
        # Pulled, and not yet taken by the loop.
        self._outstanding = 0
        # Of these, how many wait between two attempts.
        self._resting = 0
        self._results: deque[tuple[T, PromptResponse]] = deque()
        self._news: Signal | None = None
        self._idle: deque[anyio.Event] = deque()
        # Workers that have been woken and have not looked for an item yet.
        self._waking = 0
        self._in_flight: dict[PromptTask, None] = {}
        self._while_running = ExitStack()
        source = source_of(items)
        self._feeder = Feeder(self, source) if isinstance(source, AsyncIterator) else None
        self._iterator: Iterator[T] = source if isinstance(source, Iterator) else iter(())

    # The loop's side

    async def next_pair(self) -> tuple[T, PromptResponse]:
        """The next finished prompt.

        Cancelling this call loses nothing: the pair is the next call's.

        Raises:
            StopAsyncIteration: every prompt has been given, or the loop has been left.
            PromptCancelled: the group has been cancelled, or its block left.
            Exception: what the iterable or ``to_prompt`` raised, after the prompts pulled before.
        """
        if not self._begun:
            self._begin()
        while not self._results:
            if self.ended:
                raise StopAsyncIteration
            if self._stopped and not self._in_flight:
                self._end()
                raise PromptCancelled(
                    "the group has been cancelled"
                    if self._supervisor._cancelled
                    else "the group's block was left before the map had ended"
                )
            if self.exhausted and not self._outstanding:
                self._end()
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            if self._news is None:
                self._news = Signal()
            await self._news.wait()
        pair = self._results.popleft()
        self._outstanding -= 1
        self.stir()
        return pair

    def leave(self) -> None:
        """The loop has been left: nobody wants what is still to come. Returns at once; idempotent."""
        self.stop()
        self._results.clear()
        self._end()

    def stop(self) -> None:
        """Stop pulling and cancel what is in flight. Returns at once; idempotent."""
        self._begun = self._stopped = True
        self._supervisor._maps.pop(self, None)
        for task in list(self._in_flight):
            task.cancel()
        self._while_running.close()
        self.end_source()

    def _end(self) -> None:
        self.ended = True
        self._while_running.close()
        self._supervisor._maps.pop(self, None)
        self._tell_loop()

    def _tell_loop(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None

    # The source's side

    @property
    def has_room(self) -> bool:
        """Whether another item may be pulled."""
        wanted = self._slots.wanted
        return self._outstanding - min(self._resting, wanted) < wanted and not self.exhausted

    def stir(self) -> None:
        """Have another item pulled, if there is room for one."""
        if self._feeder is not None:
            if self.has_room:
                self._feeder.wake()
        elif not self._waking and self.has_room:
            # The one that is woken wakes the next, if there is room for it then.
            self.wake_worker()

    def _rest(self, resting: bool) -> None:
        """A prompt waits between two attempts, or does so no more."""
        self._resting += 1 if resting else -1
        if resting:
            self.stir()

    def pulled(self) -> None:
        """An item has been pulled."""
        self._outstanding += 1

    def end_source(self, error: Exception | None = None) -> None:
        """Nothing more is pulled; ``error`` is why, if it did not end by itself."""
        self.exhausted = True
        if self._error is None and not self._stopped:
            self._error = error
        if self._feeder is not None:
            self._feeder.stop()
        while self._idle:
            self.wake_worker()
        self._tell_loop()

    # The workers' side

    def _begin(self) -> None:
        self._begun = True
        try:
            self._supervisor.check_open()
        except BaseException:
            self._end()
            raise
        self._supervisor._maps[self] = None
        self._while_running.enter_context(spare_older_objects())
        if self._feeder is not None:
            self._spawn(self._feeder.run)
        else:
            self.wake_worker()

    def _spawn(self, function: Callable[[], Any]) -> None:
        self.at_home(partial(self._start, function))

    def _start(self, function: Callable[[], Any]) -> None:
        try:
            self._supervisor.start_soon(function)
        except RuntimeError:
            # The group has ended meanwhile.
            self.stop()

    def wake_worker(self) -> None:
        """Have a worker look for an item."""
        self._waking += 1
        if self._idle:
            # One at a time, each wakes the next: all at once would cost the square of it.
            self._idle.popleft().set()
        else:
            self._spawn(self._work)

    async def _work(self) -> None:
        with CancelScope() as scope:
            self._waking -= 1
            while not self._stopped:
                item = self._take()
                if item is not None:
                    self.stir()
                    await self._prompt(item[0], scope)
                elif self.exhausted:
                    break
                else:
                    idle = anyio.Event()
                    self._idle.append(idle)
                    await idle.wait()
                    self._waking -= 1

    def _take(self) -> tuple[T] | None:
        """Take an item to prompt for, if there is one and room for it."""
        if self._feeder is not None:
            return self._feeder.take()
        if not self.has_room:
            return None
        try:
            item = next(self._iterator)
        except StopIteration:
            self.end_source()
            return None
        except Exception as error:
            self.end_source(error)
            return None
        self.pulled()
        return (item,)

    async def _prompt(self, item: T, scope: CancelScope) -> None:
        try:
            keywords = _keywords(self._to_prompt(item))
        except Exception as error:
            self._drop(error)
            return
        try:
            if need_finding(keywords):
                takes = getattr(self._supervisor.choice.model, "attachment_types", ())
                keywords = await with_types(self._supervisor.clients_here, keywords, takes)
            task = self._make_task(keywords)
        except get_cancelled_exc_class():
            self._outstanding -= 1
            self._tell_loop()
            raise
        except TypeError as error:
            # Not this row's fault: prompt() has no such argument.
            self._drop(error)
            return
        except Exception as error:
            self._give(item, self._refused(error))
            return
        # The limit may have grown to let it begin.
        task.on_begin = self.stir
        task.on_rest = self._rest
        wrapped = hooks_wrap_prompts()
        self._in_flight[task] = None
        try:
            if wrapped:
                # In a task of its own: shielded, and context variables a wrapper sets end with the prompt.
                self._supervisor.start(task)
                await task.response.wait()
            else:
                await task.run_unwrapped(scope)
        finally:
            del self._in_flight[task]
            self._give(item, task.response)

    def _refused(self, error: Exception) -> PromptResponse:
        """The response of a prompt that llm did not take: an option out of range, a wrong attachment."""
        model = self._supervisor.choice.model
        observed = llm.AsyncResponse(llm.Prompt(None, model), model, stream=False)
        response = PromptResponse(observed, on_cancel=lambda: None)
        response._finish(error)
        self._supervisor.group._responses.add(response, keep=False)
        self._supervisor.counters.failed += 1
        self._supervisor.prompt_failed(error)
        self._supervisor.watch_failure(response)
        return response

    def _give(self, item: T, response: PromptResponse) -> None:
        error = response._error
        # Of a prompt that was interrupted there is nothing to say.
        interrupted = self._stopped and isinstance(error, PromptCancelled)
        if self.ended or interrupted or not response._finished:
            self._outstanding -= 1
        else:
            self._results.append((item, response))
        self._tell_loop()

    def _drop(self, error: Exception) -> None:
        """No prompt can be made of an item: the map ends, when those in flight have been given."""
        self._outstanding -= 1
        self.end_source(error)


def _keywords(prompt: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        return prompt
    if iscoroutine(prompt):
        prompt.close()
    raise TypeError(
        f"to_prompt must return a string or a dict of prompt() keywords, not {type(prompt).__name__}"
    )

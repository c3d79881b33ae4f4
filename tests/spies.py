"""A plugin that writes down what happens to it, and what an event loop has left running."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio
from datasette.app import Datasette
from datasette.plugins import pm

from datasette_llm import LLM
from datasette_llm.backends.datasette_side import backend

from .fakes import FakeModel, registered
from .hooks import hookimpl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from datasette_llm import Group, PromptResult


@dataclass
class Visit:
    """One wrapper of one prompt, as its plugin sees it."""

    plugin: str
    prompt: str | None
    result: PromptResult
    entered: bool = False
    left: int = 0
    saw: BaseException | None = None


@dataclass
class Spy:
    """A plugin that wraps every prompt and is told of every group's exit.

    ``entering``, ``leaving`` and ``exiting`` are awaited at the point they name and may raise or hang;
    ``answered`` is registered as a callback of every response.
    """

    name: str = "spy"
    record: list[tuple[str, str, str | None]] = field(default_factory=list)
    entering: Callable[[Visit], Awaitable[Any]] | None = None
    leaving: Callable[[Visit], Awaitable[Any]] | None = None
    answered: Callable[[Any], Any] | None = None
    exiting: Callable[[Group], Awaitable[Any]] | None = None
    visits: list[Visit] = field(default_factory=list)
    exits: list[Group] = field(default_factory=list)

    @property
    def __name__(self) -> str:
        return self.name

    __hash__ = object.__hash__

    @hookimpl
    def llm_prompt_context(self, prompt: str | None) -> Any:
        @asynccontextmanager
        async def wrapper(result: PromptResult) -> AsyncIterator[None]:
            visit = Visit(self.name, prompt, result)
            self.visits.append(visit)
            self.record.append(("enter", self.name, prompt))
            if self.answered is not None:
                await result.on_response_done(self.answered)
            if self.entering is not None:
                await self.entering(visit)
            visit.entered = True
            try:
                yield
            except BaseException as error:
                visit.saw = error
                raise
            finally:
                visit.left += 1
                self.record.append(("leave", self.name, prompt))
                if self.leaving is not None:
                    await self.leaving(visit)

        return wrapper

    @hookimpl
    def llm_group_exit(self, group: Group) -> Any:
        self.exits.append(group)
        return self.exiting(group) if self.exiting is not None else None

    def check(self) -> None:
        """Every wrapper that was entered was left exactly once, and saw an ordinary exception or none."""
        for visit in self.visits:
            assert visit.left == visit.entered, visit
            assert visit.saw is None or isinstance(visit.saw, Exception), visit
        assert len(self.exits) == len({id(group) for group in self.exits})


@contextmanager
def watched(
    model: FakeModel,
    *spies: Spy,
    config: dict[str, Any] | None = None,
    datasette: Datasette | None = None,
) -> Iterator[LLM]:
    """Yield a facade that knows this model and these plugins, the first of them outermost.

    Args:
        config: settings of datasette-llm.
        datasette: one to use instead of a new one with these settings.
    """
    with registered(model):
        for spy in reversed(spies):
            # pluggy calls the plugin first that was registered last.
            pm.register(spy)
        try:
            plugins = {"datasette-llm": {"default_model": model.model_id, **(config or {})}}
            yield LLM(datasette or Datasette(config={"plugins": plugins}))
        finally:
            for spy in spies:
                pm.unregister(spy)


def running_tasks() -> set[Any]:
    """Every task of this event loop but the hosted asyncio loop's own machinery and this one."""
    if backend() == "asyncio":
        return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    found: set[Any] = set()
    root = trio.lowlevel.current_root_task()
    pending = [root] if root is not None else []
    while pending:
        task = pending.pop()
        if "hosted asyncio loop" in task.name:
            continue
        found.add(task)
        for nursery in task.child_nurseries:
            pending.extend(nursery.child_tasks)
    found.discard(trio.lowlevel.current_task())
    return found


@asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Check that the block leaves no task behind."""
    from anyio.lowlevel import checkpoint

    before = running_tasks()
    yield
    for _ in range(10):
        # The root supervisor needs a few turns to notice that it is idle.
        await checkpoint()
    left = {task for task in running_tasks() - before if not getattr(task, "done", bool)()}
    assert not left

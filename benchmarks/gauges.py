"""What a process holds at one moment, and whether plugins get back what they gave.

``Books`` is the plugin: it wraps every prompt, keeps a reservation for each and one for each group in a
Datasette database, and counts. ``measure()`` reads it together with the process's own figures.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import anyio
from pluggy import HookimplMarker

from datasette_llm.backends.datasette_side import backend, call

from .memory import resident_mb

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator

    from datasette.app import Datasette

    from datasette_llm import Group, PromptResult

    from .launch import Server

hookimpl = HookimplMarker("datasette")

#: A prompt that contains this word is refused by the plugin.
REFUSE = "refuse"


class Refused(Exception):
    """The plugin does not let a prompt in."""


class Books:
    """A plugin that reserves when a prompt or a group begins, and settles when it ends.

    Attributes:
        entered: wrappers that let their prompt in.
        left: those of them that have been left.
        odd: exceptions seen by wrappers that plugins do not expect: not an ``Exception``.
        groups: groups that were opened; whoever opens one counts it.
        exits: groups whose exit hook was called.
        twice: groups whose exit hook was called again, or that two prompts were the first of.
    """

    __name__ = "benchmark-books"

    def __init__(self) -> None:
        self.entered = self.left = self.odd = 0
        self.groups = self.exits = self.twice = 0
        self._numbers = itertools.count(1)
        self._of_group: dict[Group, int] = {}
        self._database: Any = None

    async def open(self, datasette: Datasette) -> None:
        """Make the table; from here on, prompts may come."""
        self._database = datasette.add_memory_database("books")
        await call(self._database.execute_write, "create table reservations (number integer primary key)")

    async def reserved(self) -> int:
        """Return how many reservations are open."""
        # Where the plugin writes: readers of a database in memory are refused while that happens.
        count: int = await call(self._database.execute_write_fn, _count)
        return count

    async def _reserve(self) -> int:
        number = next(self._numbers)
        await self._database.execute_write("insert into reservations values (?)", [number])
        return number

    async def _settle(self, number: int) -> None:
        await self._database.execute_write("delete from reservations where number = ?", [number])

    @hookimpl
    def llm_prompt_context(self, prompt: str | None) -> Any:
        @asynccontextmanager
        async def wrapper(result: PromptResult) -> AsyncIterator[None]:
            group = result.group
            if group is not None and group not in self._of_group:
                number = await self._reserve()
                if group in self._of_group:
                    self.twice += 1
                self._of_group[group] = number
            if prompt is not None and REFUSE in prompt:
                raise Refused
            number = await self._reserve()
            self.entered += 1
            try:
                yield
            except BaseException as error:
                self.odd += not isinstance(error, Exception)
                raise
            finally:
                self.left += 1
                await self._settle(number)

        return wrapper

    @hookimpl
    def llm_group_exit(self, group: Group) -> Any:
        self.exits += 1
        self.twice += bool(getattr(group, "_books_closed", False))
        group._books_closed = True  # type: ignore[attr-defined]
        number = self._of_group.pop(group, None)
        return None if number is None else self._settle(number)


@dataclass(frozen=True, slots=True)
class Figures:
    """One line of the table; the names of the fields are its heading."""

    seconds: float
    rss_mb: float
    cpu_s: float
    tasks: int
    fds: int
    gc_objects: int
    prompts: int
    entered: int
    left: int
    groups: int
    exits: int
    reserved: int
    in_flight: int
    connections: int

    @classmethod
    def heading(cls) -> str:
        """Return the names, as wide as the figures."""
        return " ".join(f"{each.name:>11}" for each in fields(cls))

    def __str__(self) -> str:
        values = (getattr(self, each.name) for each in fields(self))
        return " ".join(f"{value:>11.1f}" if isinstance(value, float) else f"{value:>11}" for value in values)


async def measure(books: Books, server: Server, began: float) -> Figures:
    """Read every gauge.

    Args:
        books: the plugin.
        server: the provider; the connection that asks it is not counted.
        began: when the first line was due, on ``time.monotonic()``.
    """
    reserved = await books.reserved()
    counts = await anyio.to_thread.run_sync(lambda: server.counts)
    return Figures(
        seconds=time.monotonic() - began,
        rss_mb=resident_mb(),
        cpu_s=time.process_time(),
        tasks=_tasks(),
        # Listing them opens one.
        fds=len(os.listdir("/proc/self/fd")) - 1,
        gc_objects=len(gc.get_objects()),
        prompts=counts["requests"],
        entered=books.entered,
        left=books.left,
        groups=books.groups,
        exits=books.exits,
        reserved=reserved,
        in_flight=counts["running"],
        connections=counts["open_connections"] - 1,
    )


def _count(database: sqlite3.Connection) -> int:
    count: int = database.execute("select count(*) from reservations").fetchone()[0]
    return count


def _tasks() -> int:
    """Tasks of the running event loop; on trio the run's own machinery counts too."""
    if backend() == "asyncio":
        return len(asyncio.all_tasks())
    import trio

    return trio.lowlevel.current_statistics().tasks_living

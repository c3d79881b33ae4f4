"""``python -m benchmarks.soak``: hours of mixed load, and whether anything is left of it.

Runs the episodes of ``load`` against the provider in a process of its own, with a plugin that counts and
reserves. A line of figures is printed at the start (after a short warm-up, at rest), every 30 seconds, and
at the end, at rest again. The exit code is 1 if a wrapper was not left, a group had no exit hook, or a
task, a connection, a file, a reservation or a growing heap is left.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
import warnings
from random import Random
from typing import TYPE_CHECKING

import anyio

from .launch import own_environment, running_server

if TYPE_CHECKING:
    from .gauges import Books, Figures
    from .launch import Server
    from .load import Load

WARM_UP_SECONDS = 5.0
#: How long what was cancelled last may take to settle: the grace period, and some for a busy machine.
REST_SECONDS = 20.0
#: What may come on top of the start: caches of libraries, the allocator's fragments.
MORE_OBJECTS = 5_000
MORE_MB = 40.0


async def at_rest(books: Books, server: Server, began: float, start: Figures | None = None) -> Figures:
    """Let the standalone prompts end, and measure when the process is back where it was at the start."""
    from datasette_llm.tasks.root import drain

    from .gauges import measure

    await drain()
    deadline = anyio.current_time() + REST_SECONDS
    while True:
        gc.collect()
        figures = await measure(books, server, began)
        settled = not (figures.reserved or figures.in_flight or figures.connections)
        if start is not None:
            settled = settled and figures.tasks <= start.tasks and figures.fds <= start.fds
        elif settled:
            # Threads and caches that a first measurement makes.
            return await measure(books, server, began)
        if settled or anyio.current_time() > deadline:
            return figures
        await anyio.sleep(0.2)


def violations(start: Figures, end: Figures, books: Books, load: Load) -> list[str]:
    """Return a sentence for each thing that does not hold at the end."""
    holds = {
        f"wrappers: {end.entered} entered, {end.left} left": end.entered == end.left,
        f"wrappers saw {books.odd} exceptions that are no Exception": not books.odd,
        f"groups: {end.groups} opened, {end.exits} exit hooks": end.groups == end.exits,
        f"{books.twice} groups were begun or ended twice": not books.twice,
        f"{end.reserved} reservations are open": not end.reserved,
        f"tasks: {start.tasks} at the start, {end.tasks} at the end": end.tasks <= start.tasks,
        f"open files: {start.fds} at the start, {end.fds} at the end": end.fds <= start.fds,
        f"the provider still works on {end.in_flight} requests": not end.in_flight,
        f"the provider has {end.connections} open connections": not end.connections,
        f"objects: {start.gc_objects} at the start, {end.gc_objects} at the end": (
            end.gc_objects <= start.gc_objects + MORE_OBJECTS
        ),
        f"memory: {start.rss_mb:.0f} MB at the start, {end.rss_mb:.0f} at the end": (
            end.rss_mb <= start.rss_mb + MORE_MB
        ),
        f"{len(load.problems)} wrong answers or unexpected errors": not load.problems,
    }
    return [sentence for sentence, held in holds.items() if not held]


async def soak(server: Server, *, seconds: float, every: float, seed: int, workers: int) -> int:
    """Run the load for so long. Returns how many things do not hold at the end."""
    from datasette.app import Datasette
    from datasette.plugins import pm

    from datasette_llm import LLM
    from datasette_llm.backends.datasette_side import call

    from .gauges import Books, Figures, measure
    from .load import CONFIG, SERVER, Load
    from .models import MODEL_ID, registered

    datasette = Datasette(
        memory=True, config={"plugins": {"datasette-llm": {"default_model": MODEL_ID, **CONFIG}}}
    )
    await call(datasette.invoke_startup)
    books = Books()
    await books.open(datasette)
    pm.register(books)
    try:
        with registered(server.url):
            server.configure(**SERVER, seed=seed)
            load = Load(LLM(datasette), books)
            began = time.monotonic()
            randoms = [Random(f"{seed}/{number}") for number in range(workers)]
            await load.warm_up(randoms[0])
            await load.run(randoms, min(WARM_UP_SECONDS, seconds))
            start = await at_rest(books, server, began)
            print(Figures.heading(), flush=True)
            print(start, "start", flush=True)
            async with anyio.create_task_group() as tasks:

                async def report() -> None:
                    while True:
                        await anyio.sleep(every)
                        print(await measure(books, server, began), flush=True)

                tasks.start_soon(report)
                await load.run(randoms, seconds)
                tasks.cancel_scope.cancel()
            end = await at_rest(books, server, began, start)
            print(end, "end", flush=True)
    finally:
        pm.unregister(books)
    print("episodes:", ", ".join(f"{name} {count}" for name, count in load.kinds.most_common()))
    print("outcomes:", ", ".join(f"{name} {count}" for name, count in load.outcomes.most_common()))
    for problem in load.problems[:20]:
        print("problem:", problem)
    found = violations(start, end, books, load)
    for sentence in found:
        print("does not hold:", sentence)
    if not found:
        print("everything holds")
    return len(found)


def main() -> None:
    """Read the command line, run, and exit with 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--every", type=float, default=30, help="seconds between two lines of figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8, help="episodes at the same time")
    given = parser.parse_args()
    # The openai client leaves streams that were cut off to the garbage collector, which says so on trio.
    warnings.simplefilter("ignore", ResourceWarning)
    # Warnings of what the load does on purpose: failed prompts that nobody read, cooldowns.
    logging.getLogger("datasette_llm").setLevel(logging.ERROR)

    async def run(server: Server) -> int:
        return await soak(
            server,
            seconds=given.minutes * 60,
            every=given.every,
            seed=given.seed,
            workers=given.workers,
        )

    with tempfile.TemporaryDirectory() as directory, running_server() as server:
        # Before Datasette is imported, which looks for plugins then.
        os.environ |= own_environment(directory)
        found = anyio.run(run, server, backend=given.backend)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

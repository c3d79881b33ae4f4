"""Measurements, each in a process of its own: so CPU time and memory are its own.

``python -m benchmarks.measure`` reads one ``Work`` as JSON per line and prints one ``Result`` per
line, ``null`` for a measurement that failed. It imports everything once and forks for each.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from typing import TYPE_CHECKING

import anyio
import openai

from . import by_workers, in_process, memory, page, ways
from .launch import Server
from .models import registered
from .rows import prompts
from .work import Result, Work

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Way = Callable[[Work, list[str], Result], Awaitable[None]]

LONGEST_SECONDS = 900

OVER_HTTP: dict[str, Way] = {
    "map": ways.through_map,
    "prompt": ways.through_prompt,
    "plain llm": ways.through_plain_llm,
    "openai client": ways.through_openai,
    "aiometer": ways.through_aiometer,
    "page": page.pages_during_enrichment,
    "page beside": page.pages_beside_enrichment,
    "page workers": page.pages_while_workers_enrich,
    "workers": by_workers.through_workers,
}
#: They start what they measure themselves.
ELSEWHERE = frozenset({"page", "page beside", "page workers", "workers"})
IN_PROCESS: dict[str, Way] = {
    "instant plain llm": in_process.instant_plain_llm,
    "instant map": in_process.instant_map,
    "instant prompt": in_process.instant_prompt,
    "lookup llm": in_process.lookup_llm,
    "lookup": in_process.lookup_facade,
    "memory": in_process.memory_of_map,
}


async def measure(work: Work) -> Result:
    """Do the work once to warm up (a few prompts), once to measure."""
    over_http = work.way in OVER_HTTP
    way = OVER_HTTP.get(work.way) or IN_PROCESS[work.way]
    if work.way != "memory":
        texts = prompts(min(work.n, 10_000))
        texts = (texts * (work.n // len(texts) + 1))[: work.n]
    else:
        texts = []
    result = Result(work.n)
    if not work.fast:
        # As where aiohttp is not installed.
        openai.DefaultAioHttpClient = openai.DefaultAsyncHttpxClient
    with registered(work.url if over_http else ""):
        if over_http:
            server = Server(work.url)
            server.configure()
        if work.way != "memory" and work.way not in ELSEWHERE:
            # What a library does once, at its first call, is not what is measured.
            await way(Work(**(work.as_dict() | {"n": 3})), texts[:3], Result(3))
        if over_http:
            server.configure(**work.server)
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        await way(work, texts, result)
        result.cpu = result.cpu or time.process_time() - cpu
        result.wall = result.wall or time.perf_counter() - wall
        if over_http:
            result.server = server.counts
    result.peak_mb = memory.peak_mb()
    return result


def main() -> None:
    """Fork for each line of standard input, and wait."""
    # Plain llm leaves its clients and generators to the garbage collector, which says so on trio.
    warnings.simplefilter("ignore", ResourceWarning)
    for line in sys.stdin:
        gc.freeze()
        child = os.fork()
        if not child:
            status = 1
            try:
                # One that hangs must not hang the rest; the signal ends the process.
                signal.alarm(LONGEST_SECONDS)
                work = Work(**json.loads(line))
                result = anyio.run(measure, work, backend=work.backend)
                print(json.dumps(result.as_dict()), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            print("null", flush=True)


if __name__ == "__main__":
    main()

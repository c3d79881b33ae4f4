"""What a prompt costs with each provider's plugin, as a ratio to OpenAI's in the same round.

``table()`` has each family of ``tests/protocols`` asked through ``map()``, whole and streamed, by turns: the
server in a process of its own, and the client in another, which has imported everything before.
What counts is the CPU of the client's process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio

from .launch import ROOT, own_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILIES = ("openai", "responses", "anthropic", "gemini", "mistral", "groq", "ollama")
#: Prompts that are measured, how many at once, and seconds an answer takes.
PROMPTS, AT_ONCE, SECONDS = 300, 50, 0.05
HEADINGS = ("family", "way", "CPU ms/prompt", "of openai's", "connections", "hidden retries")


def serve(family: str) -> None:
    """Answer in a family's protocol; print the address, then the counts for each line that is read."""
    from tests.protocols.answers import Answer
    from tests.protocols.server import ProtocolServer

    with ProtocolServer(_protocol(family)).running() as server:
        server.script = Answer("one two three four five six seven", delay=SECONDS)
        print(server.url, flush=True)
        for _ in sys.stdin:
            counts = {"connections": server.connections, "hidden": server.hidden_retries}
            print(json.dumps(counts), flush=True)


def _protocol(family: str) -> Any:
    return import_module(f"tests.protocols.{family}").PROTOCOL


async def ask(model_id: str, prompts: int, *, stream: bool) -> None:
    """Ask so many prompts of a registered model, through a group of their own."""
    from datasette.app import Datasette

    from datasette_llm import LLM

    async with LLM(Datasette(memory=True)).group(model_id, concurrency=AT_ONCE) as model:
        async for _, response in model.map(range(prompts), lambda number: f"prompt {number}", stream=stream):
            assert (await response.text()).startswith("one two")


def measure(family: str, url: str, *, stream: bool) -> float:
    """Return the CPU seconds of this process for each prompt."""
    from tests.fakes import registered

    protocol = _protocol(family)
    with protocol.pointed_at(url):
        model = protocol.model(url)
        with registered(model):
            anyio.run(lambda: ask(model.model_id, 20, stream=stream))
            began = time.process_time()
            anyio.run(lambda: ask(model.model_id, PROMPTS, stream=stream))
            return (time.process_time() - began) / PROMPTS


def one(family: str, *, stream: bool) -> dict[str, Any]:
    """Measure one family, in processes of its own."""
    me = [sys.executable, "-m", "benchmarks.families"]
    with tempfile.TemporaryDirectory() as directory:
        environment = own_environment(directory)
        with subprocess.Popen(
            [*me, "serve", family],
            cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as server:  # fmt: skip
            assert server.stdin is not None
            assert server.stdout is not None
            try:
                url = server.stdout.readline().strip()
                asked = subprocess.run(
                    [*me, "measure", family, url, *["stream"] * stream],
                    cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120, check=True,
                )  # fmt: skip
                print("", file=server.stdin, flush=True)
                counts = json.loads(server.stdout.readline())
            finally:
                server.stdin.close()
    return {"cpu": float(asked.stdout.splitlines()[-1]), **counts}


def table(rounds: int, families: tuple[str, ...] = FAMILIES) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: medians of interleaved rounds."""
    for stream in (False, True):
        found = [{family: one(family, stream=stream) for family in families} for _ in range(rounds)]
        for family in families:
            cpu = median(each[family]["cpu"] for each in found)
            ratio = median(each[family]["cpu"] / each[families[0]]["cpu"] for each in found)
            last = found[-1][family]
            way = "streamed" if stream else "map"
            counts = str(last["connections"]), str(last["hidden"])
            yield family, way, f"{cpu * 1000:.2f}", f"{ratio:.2f}", *counts


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(measure(sys.argv[2], sys.argv[3], stream="stream" in sys.argv))

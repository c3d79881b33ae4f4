"""``python -m benchmarks.workers``: "wide" with 0, 1 and 2 workers, and how much longer one prompt takes.

Each number of workers is measured in a process of its own, against a provider in another one, over HTTP.
Wall time is told as a multiple of the ideal one, CPU for each prompt: of the process that has the rows, and
of all workers together (what their start took is left out).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import anyio

from .launch import ROOT, own_environment, running_server
from .provider import answer_text

MODEL_ID = "loopback"
KEY = "sk-bench-4711-0815"
WARM = 40
#: Longer than this for one number of workers: it hangs.
PATIENCE_SECONDS = 300.0


def write_model(directory: Path, url: str) -> None:
    """Write llm's files for a model at this address, and its key."""
    (directory / "extra-openai-models.yaml").write_text(
        f"- model_id: {MODEL_ID}\n  model_name: bench\n  api_base: {url}\n  api_key_name: {MODEL_ID}\n",
        encoding="utf-8",
    )
    (directory / "keys.json").write_text(json.dumps({MODEL_ID: KEY}), encoding="utf-8")


def worker_processes(parent: int) -> list[int]:
    """Return the local workers that a process has started (where the system tells)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"local_worker" in command:
            found.append(int(entry.name))
    return found


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time that processes have used."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def all_there(model: Any, workers: int) -> None:
    """Wait until so many workers take calls."""
    pool = model._supervisor.clients
    while len(pool.figures.workers) < workers:  # noqa: ASYNC110 - the fleet is in another thread
        await anyio.sleep(0.1)


async def measure(workers: int, prompts: int, concurrency: int) -> dict[str, Any]:
    """Run the prompts with so many workers; the provider is the one of llm's configuration."""
    from datasette.app import Datasette

    from datasette_llm import LLM

    facade = LLM(Datasette(memory=True, config={"plugins": {"datasette-llm": {"default_model": MODEL_ID}}}))
    began = time.perf_counter()
    async with facade.group(concurrency=concurrency, workers=workers) as model:
        started = time.perf_counter() - began
        if workers:
            with anyio.move_on_after(60):
                await all_there(model, workers)
        waits = []
        for number in range(WARM):
            began = time.perf_counter()
            await (await model.prompt(f"warm {number}", stream=False)).text()
            waits.append(time.perf_counter() - began)
        pids = worker_processes(os.getpid())
        theirs, ours, began = cpu_seconds(pids), time.process_time(), time.perf_counter()
        right = 0
        async for prompt, response in model.map(map(str, range(prompts))):
            right += response.error is None and await response.text() == answer_text(prompt)
        return {
            "workers": workers,
            "start": started,
            "wall": time.perf_counter() - began,
            "cpu": (time.process_time() - ours) / prompts,
            "worker_cpu": (cpu_seconds(pids) - theirs) / prompts,
            "one": median(waits[WARM // 2 :]),
            "right": right,
        }


def run(workers: int, options: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.workers", "--child", str(workers)]
    command += ["--prompts", str(options.prompts), "--concurrency", str(options.concurrency)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=own_environment(directory),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=500)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(anyio.run(partial(measure, options.child, options.prompts, options.concurrency))))
        return
    ideal = options.prompts * options.latency / options.concurrency
    print("workers | wall / ideal | CPU ms a prompt | of workers | one prompt, ms more | start s | right")
    with tempfile.TemporaryDirectory() as directory, running_server(latency=options.latency) as server:
        write_model(Path(directory), server.url)
        for workers in options.workers:
            result = run(workers, options, directory)
            print(
                f"{workers} | {result['wall'] / ideal:.2f} | {result['cpu'] * 1000:.2f} | "
                f"{result['worker_cpu'] * 1000:.2f} | {(result['one'] - options.latency) * 1000:.1f} | "
                f"{result['start']:.1f} | {result['right']}",
                flush=True,
            )


if __name__ == "__main__":
    main()

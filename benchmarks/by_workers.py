"""The same prompts with model calls made by workers. Each measurement has a process of its own."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from . import workers

if TYPE_CHECKING:
    from .work import Result, Work


async def through_workers(work: Work, prompts: list[str], result: Result) -> None:
    """``model.map()``, with as many workers as the configuration of the work says."""
    await anyio.to_thread.run_sync(_measure, work, result)


def _measure(work: Work, result: Result) -> None:
    options = argparse.Namespace(prompts=work.n, concurrency=work.concurrency)
    with tempfile.TemporaryDirectory() as directory:
        workers.write_model(Path(directory), work.url)
        told = workers.run(work.config.get("workers", 1), options, directory)
    result.wall, result.cpu = told["wall"], told["cpu"] * work.n
    result.right = told["right"]
    result.wrong = work.n - told["right"]
    result.extra |= {
        "worker_cpu_ms": told["worker_cpu"] * 1000,
        "one_more_ms": (told["one"] - work.server.get("latency", 0.0)) * 1000,
        "start_seconds": told["start"],
    }

"""``python -m datasette_llm.calls.remote.local_worker``: one process, which ends with its standard input.

Its first line says where the scheduler is and what certificates to use: nothing of that is an argument or a
variable, which other users could read.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, BinaryIO

import anyio

from .dask_source import QUIET, load_distributed

if TYPE_CHECKING:
    from collections.abc import Callable
#: How long it may take to come to the scheduler, in seconds.
REGISTER_SECONDS = 60.0
CLOSE_SECONDS = 3.0


def security_from(told: dict[str, str]) -> Any:
    """Return a ``distributed.Security`` for an authority, a certificate and its key: files or PEM texts."""
    distributed = load_distributed()
    named: dict[str, str] = {}
    if "ca_file" in told:
        named["tls_ca_file"] = told["ca_file"]
    for role in ("client", "worker", "scheduler"):
        for name in ("cert", "key"):
            if name in told:
                named[f"tls_{role}_{name}"] = told[name]
    return distributed.Security(require_encryption=True, **named)


async def _work(told: dict[str, Any]) -> None:
    distributed = load_distributed()
    import dask

    with dask.config.set(QUIET):
        worker = distributed.Worker(
            told["scheduler"],
            nthreads=1,
            host="127.0.0.1",
            security=security_from(told["tls"]),
            memory_limit=0,
            dashboard=False,
            # Whoever started this process starts it again.
            death_timeout=REGISTER_SECONDS,
            dashboard_address="127.0.0.1:0",
        )
    try:
        await worker
        await worker.finished()
    finally:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await worker.close()


def _load_models() -> None:
    import llm

    llm.get_async_models()


def _end_with(stdin: BinaryIO, leave: Callable[[int], object]) -> None:
    try:
        while stdin.read(1):
            pass
    finally:
        leave(0)


def run(stdin: BinaryIO, leave: Callable[[int], object]) -> None:
    """Work until standard input ends.

    Args:
        stdin: its first line says for whom.
        leave: ends the process at once, with an exit status.
    """
    # What takes long, before anybody waits for it.
    load_distributed()
    _load_models()
    told = json.loads(stdin.readline())
    threading.Thread(target=_end_with, args=(stdin, leave), daemon=True).start()
    try:
        asyncio.run(_work(told))
    finally:
        leave(1)


def main() -> None:
    """Work until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(sys.stdin.buffer, os._exit)


if __name__ == "__main__":
    main()

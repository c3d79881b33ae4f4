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
from typing import Any

from .dask_source import load_distributed

#: How long it may take to come to the scheduler, in seconds.
REGISTER_SECONDS = 60.0


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

    with dask.config.set({"distributed.worker.http.routes": []}):
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
    await worker
    await worker.finished()


def _load_models() -> None:
    import llm

    llm.get_async_models()


def _end_with_stdin() -> None:
    try:
        while sys.stdin.buffer.read(1):
            pass
    finally:
        os._exit(0)


def main() -> None:
    """Work until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What takes long, before anybody waits for it.
    load_distributed()
    _load_models()
    told = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        asyncio.run(_work(told))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()

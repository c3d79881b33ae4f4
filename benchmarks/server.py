"""A local provider with OpenAI's chat completions interface, as a process of its own.

``python -m benchmarks.server --port 0 --latency 0.2`` prints its address, then serves until it is
interrupted. ``GET /counts`` says what it saw (``?prompts=1``: for each prompt), ``POST /reset`` sets
that to zero, and ``POST /settings`` with a JSON object starts over with those settings.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
from dataclasses import MISSING, fields

from .provider import Provider, Settings
from .wire import Connection


async def serve(port: int, settings: Settings, *, until_stdin_closes: bool = False) -> None:
    """Serve on the loopback interface, after having printed the address."""
    loop = asyncio.get_running_loop()
    provider = Provider(settings)
    server = await loop.create_server(lambda: Connection(provider), "127.0.0.1", port, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    gc.freeze()
    stopped = asyncio.Event()
    if until_stdin_closes:
        loop.add_reader(sys.stdin.fileno(), stopped.set)
    try:
        await stopped.wait()
    finally:
        server.close()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="end with the process that started this one"
    )
    for setting in fields(Settings):
        assert setting.default is not MISSING
        name = f"--{setting.name.replace('_', '-')}"
        if isinstance(setting.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            kind = float if setting.default is None else type(setting.default)
            parser.add_argument(name, type=kind, default=setting.default)
    given = vars(parser.parse_args())
    port, until_stdin_closes = given.pop("port"), given.pop("until_stdin_closes")
    try:
        asyncio.run(serve(port, Settings().changed(given), until_stdin_closes=until_stdin_closes))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()

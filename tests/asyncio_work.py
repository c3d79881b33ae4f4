"""What plugins do on Datasette's side: context managers and coroutines that only asyncio can run."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Wrapper:
    """A plugin's wrapper that records what it sees, and may swallow or fail on the way out."""

    def __init__(self, *, swallow: bool = False, entry: Exception | None = None) -> None:
        self.swallow = swallow
        self.entry = entry
        self.events: list[str] = []

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[str]:
        asyncio.get_running_loop()
        await asyncio.sleep(0)
        if self.entry is not None:
            raise self.entry
        self.events.append("entered")
        try:
            yield "value"
        except BaseException as error:
            self.events.append(type(error).__name__)
            if not self.swallow:
                raise
        finally:
            await asyncio.sleep(0)
            self.events.append("left")


async def asyncio_sleeper(events: list[str]) -> None:
    try:
        events.append("started")
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        events.append("cancelled")
        raise
    finally:
        events.append("ended")

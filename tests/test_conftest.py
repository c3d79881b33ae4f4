"""The virtual clock itself, on which the other tests rely."""

from __future__ import annotations

import anyio


async def test_an_hour_takes_no_time() -> None:
    started = anyio.current_time()
    await anyio.sleep(3600)
    assert anyio.current_time() - started >= 3600

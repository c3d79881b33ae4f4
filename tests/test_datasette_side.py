"""Datasette's asyncio code called from both backends."""

from __future__ import annotations

import anyio.lowlevel
import pytest
from datasette.app import Datasette

from datasette_llm.runtime import datasette_side as side


@pytest.mark.real_clock
async def test_call_runs_datasette_queries() -> None:
    datasette = Datasette(memory=True)
    await side.call(datasette.invoke_startup)
    db = datasette.add_memory_database("side_query")
    await side.call(db.execute_write, "create table if not exists t (id integer)")
    assert (await side.call(db.execute, "select 1 + 1")).single_value() == 2
    response = await side.call(datasette.client.get, "/-/versions.json")
    assert response.status_code == 200


async def test_exceptions_arrive_bare() -> None:
    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await side.call(fail)

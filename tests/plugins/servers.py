"""Datasettes and models for the tests of other people's plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llm
from datasette.app import Datasette

from datasette_llm.backends.datasette_side import call

from ..fakes import FakeModel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def started(files: list[str] | None = None, **plugins: Any) -> Datasette:
    """Return a Datasette whose startup has run; keywords are plugin configurations, ``-`` as ``_``."""
    plugins.setdefault("datasette_llm", {"default_model": "fake"})
    config = {name.replace("_", "-"): settings for name, settings in plugins.items()}
    datasette = Datasette(files or [], config={"plugins": config})
    await call(datasette.invoke_startup)
    return datasette


async def query(datasette: Datasette, sql: str) -> list[tuple[Any, ...]]:
    """Query the internal database, from either backend."""
    rows = await call(datasette.get_internal_database().execute, sql)
    return [tuple(row) for row in rows.rows]


class ToolModel(FakeModel):
    """Calls the tool ``look_up`` once, then answers with what it found; a token in, a token out."""

    async def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        if not prompt.tool_results:
            response.add_tool_call(
                llm.ToolCall(name="look_up", arguments={"name": "ana"}, tool_call_id="call-1")
            )
            yield ""
        else:
            yield prompt.tool_results[0].output
        response.set_usage(input=1, output=1)


async def look_up(name: str) -> str:
    """Look a name up."""
    return f"{name} found"

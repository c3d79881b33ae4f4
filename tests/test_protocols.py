"""The loopback protocol servers themselves: each plugin, streamed and not, gets what was scripted."""

from __future__ import annotations

from typing import Any

import pytest

from datasette_llm import LLM

from .fakes import registered
from .hooks import datasette_with
from .protocols import FAMILIES, PLUGIN_MARKS, Answer, ToolCall, protocol_server, skip_unless_spoken

pytestmark = PLUGIN_MARKS


def look_up(name: str) -> str:
    """Look a name up."""
    return f"{name} found"


# One test for all of it: what plugins leave open is collected after each, which takes longer than they do.
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_plugin_gets_what_was_scripted(family: str, anyio_backend: tuple[str, Any]) -> None:
    skip_unless_spoken(family, anyio_backend)
    with protocol_server(family) as server:
        model = server.model()
        with registered(model):
            wrapped = await LLM(datasette_with()).model(model.model_id)
            for stream in (True, False):
                server.script = Answer("one two three", usage=(7, 4))
                response = await wrapped.prompt("the question", stream=stream)
                assert await response.text() == "one two three"
                usage = await response.usage()
                assert (usage.input, usage.output) == (7, 4)
                assert server.prompt(server.requests[-1]) == "the question"
            assert len(server.requests) == 2
            assert 1 <= server.connections <= 2

            if model.supports_tools:
                calling = Answer(tool_calls=(ToolCall("look_up", {"name": "ana"}),))
                server.script = lambda _: calling if len(server.requests) == 3 else Answer("done")
                assert (await wrapped.chain("x", tools=[look_up]).text()).strip() == "done"
                assert "ana found" in str(server.requests[-1].json)

            sent = len(server.requests)
            server.script = Answer(status=400, message="the request is wrong", code="invalid_request_error")
            refused = await wrapped.prompt("x")
            with pytest.raises(Exception, match="the request is wrong"):
                await refused.text()
            assert len(server.requests) == sent + 1
        assert (server.hidden_retries, server.disconnects) == (0, 0)

"""The protocols of six providers on the loopback interface, for the plugins that really speak them.

    with protocol_server("anthropic") as server:
        server.script = Answer("hello", finish="max_tokens")
        with registered(server.model()):
            ...

``server`` is one real HTTP server in a thread; each family (`anthropic`, `gemini`, `groq`, `mistral`,
`ollama`, `openai`, `responses`) says how an ``Answer`` looks on its wire, streamed and not, and makes the
plugin's own async model for it. A test of a plugin that is not installed is skipped.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from .answers import Answer, Raw, ToolCall
from .server import ProtocolServer, Request

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Every family there is: names of modules of this package.
FAMILIES = ("openai", "responses", "anthropic", "gemini", "mistral", "groq", "ollama")

#: Marks for tests of the plugins: what they and their SDKs leave to the garbage collector is their doing.
PLUGIN_MARKS = [
    pytest.mark.real_clock,
    pytest.mark.usefixtures("leaky_clients"),
    pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:coroutine 'AsyncClient.aclose' was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),
    pytest.mark.filterwarnings("ignore:The `dict` method is deprecated"),
]

__all__ = [
    "FAMILIES",
    "PLUGIN_MARKS",
    "Answer",
    "ProtocolServer",
    "Raw",
    "Request",
    "ToolCall",
    "protocol_server",
    "skip_unless_spoken",
]


@contextmanager
def protocol_server(family: str) -> Iterator[ProtocolServer]:
    """Run a server that speaks one family's protocol, and have that family's plugin talk to it.

    Args:
        family: one of ``FAMILIES``.
    """
    protocol = import_module(f"{__name__}.{family}").PROTOCOL
    with ProtocolServer(protocol).running() as server, protocol.pointed_at(server.url):
        yield server


def skip_unless_spoken(family: str, backend: tuple[str, object]) -> None:
    """Skip a test on a backend that the SDK does not run on: Mistral's asks asyncio for threads."""
    if (family, backend[0]) == ("mistral", "trio"):
        pytest.skip("Mistral's SDK runs on asyncio alone")

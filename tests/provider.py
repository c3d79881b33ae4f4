"""A provider on the loopback interface: real HTTP for tests, in a process of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llm.default_plugins.openai_models import AsyncChat

from benchmarks.launch import Server, running_server

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def provider_server(**settings: Any) -> Iterator[Server]:
    """Run the benchmarks' OpenAI-compatible server with these settings.

    ``server.url`` is the base URL, ``server.counts`` what it saw until now, ``server.prompts`` how
    often each prompt arrived and was answered; ``server.configure(**settings)`` starts over.
    """
    with running_server(**settings) as server:
        yield server


def openai_model(server: Server, model_id: str = "local", key: str = "sk-test") -> Any:
    """Return llm's own OpenAI model, talking to this server (register it with ``registered()``)."""
    return AsyncChat(model_id, model_name="bench", api_base=server.url, key=key)

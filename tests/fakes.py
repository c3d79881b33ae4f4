"""Fakes that stand in for a provider and for other people's plugins."""

from __future__ import annotations

from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import anyio
import llm
from llm.plugins import pm as llm_pm

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from contextlib import AbstractContextManager

    from llm.parts import StreamEvent


class FakeModel(llm.AsyncModel):
    """A model whose behaviour a test writes as an async generator function.

    Args:
        script: called with the prompt text, yields chunks; ``None`` echoes the prompt.
        model_id: the id it is registered under.
        seconds: how long (on the test's clock) each answer takes before its first chunk.

    ``running`` and ``peak`` count the generators that are open now and that were at most;
    ``opened`` and ``closed`` count all of them.
    """

    can_stream = True
    supports_tools = True
    supports_schema = True

    def __init__(
        self,
        script: Callable[[str], AsyncGenerator[Any, None]] | None = None,
        *,
        model_id: str = "fake",
        seconds: float = 0.0,
    ) -> None:
        self.model_id = model_id
        self.script = script
        self.seconds = seconds
        self.prompts: list[str] = []
        self.counts = {"opened": 0, "closed": 0, "running": 0, "peak": 0}

    class Options(llm.Options):
        temperature: float | None = None

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None = None,
    ) -> AsyncGenerator[str | StreamEvent, None]:
        counts = self.counts
        counts["opened"] += 1
        counts["running"] += 1
        counts["peak"] = max(counts["peak"], counts["running"])
        self.prompts.append(prompt.prompt)
        try:
            if self.seconds:
                await anyio.sleep(self.seconds)
            if self.script is None:
                yield prompt.prompt
            else:
                async with aclosing(self.script(prompt.prompt)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            response.set_usage(input=len(prompt.prompt.split()), output=1)
        finally:
            counts["running"] -= 1
            counts["closed"] += 1


def registered(*models: llm.AsyncModel) -> AbstractContextManager[None]:
    """Have llm know these models (each also as a minimal sync model of the same id)."""
    return known_to_llm(*((_SyncTwin(model.model_id), model) for model in models))


@contextmanager
def known_to_llm(*pairs: tuple[Any, Any]) -> Iterator[None]:
    """Have llm know these models, each as a sync and an async one."""

    class Plugin:
        @llm.hookimpl
        def register_models(self, register: Callable[..., None]) -> None:
            for pair in pairs:
                register(*pair)

    plugin = Plugin()
    llm_pm.register(plugin)
    try:
        yield
    finally:
        llm_pm.unregister(plugin)


class _SyncTwin(llm.Model):
    def __init__(self, model_id: str) -> None:
        self.model_id = model_id

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        raise NotImplementedError("only the async twin of this model is used")

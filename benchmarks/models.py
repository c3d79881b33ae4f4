"""The models that are measured, registered with llm for the time of a measurement."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import llm
from llm.default_plugins.openai_models import AsyncChat, Chat
from llm.plugins import load_plugins, pm

from .provider import answer_text

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

MODEL_ID = "bench"
KEY = "sk-bench"


class Instant(llm.AsyncModel):
    """A model that answers at once, for what everything around the call costs."""

    model_id = MODEL_ID
    can_stream = True

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None = None,
    ) -> AsyncGenerator[str, None]:
        yield answer_text(prompt.prompt or "")


class _Sync(llm.Model):
    model_id = MODEL_ID

    def execute(self, prompt: Any, stream: Any, response: Any, conversation: Any) -> Iterator[str]:
        raise NotImplementedError("only its asynchronous twin is measured")


@contextmanager
def registered(url: str) -> Iterator[None]:
    """Have llm know the model ``bench``: its own OpenAI model at this address, or an instant one."""

    class Plugin:
        __name__ = "benchmark-models"

        @llm.hookimpl
        def register_models(self, register: Callable[..., None]) -> None:
            if url:
                options: dict[str, Any] = {
                    "model_name": MODEL_ID,
                    "api_base": url,
                    "key": KEY,
                    "supports_tools": True,
                }
                both = [kind(MODEL_ID, **options) for kind in (Chat, AsyncChat)]
                register(*both)
            else:
                register(_Sync(), Instant())

    load_plugins()
    plugin = Plugin()
    pm.register(plugin)
    try:
        yield
    finally:
        pm.unregister(plugin)

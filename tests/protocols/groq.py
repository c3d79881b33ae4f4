"""Groq's chat, as llm-groq speaks it: OpenAI's with usage under a key of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from .openai import ChatCompletions, usage_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .answers import Answer
    from .server import Request


class GroqChat(ChatCompletions):
    """``POST /openai/v1/chat/completions``."""

    def add_usage(self, chunks: list[dict[str, Any]], answer: Answer, request: Request) -> None:
        chunks[-1]["x_groq"] = {"id": "req_1", "usage": usage_of(answer)}

    def model(self, url: str, **options: Any) -> Any:
        plugin = pytest.importorskip("llm_groq", reason="llm-groq is not installed")
        key = options.pop("key", "gsk-test")
        name = options.pop("model_id", "groq-test")
        model = plugin.LLMAsyncGroq(f"groq/{name}", name, **options)
        model.key = key
        return model

    @contextmanager
    def pointed_at(self, url: str) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GROQ_BASE_URL", url)
            yield


PROTOCOL = GroqChat()

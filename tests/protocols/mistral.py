"""Mistral's chat, as llm-mistral speaks it: OpenAI's with usage in the last chunk."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from .openai import ChatCompletions, usage_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .answers import Answer
    from .server import Request


class MistralChat(ChatCompletions):
    """``POST /v1/chat/completions``; streamed at the same path."""

    def add_usage(self, chunks: list[dict[str, Any]], answer: Answer, request: Request) -> None:
        chunks[-1]["usage"] = usage_of(answer)
        chunks[-1]["choices"][0]["delta"] = {"content": ""}

    def error(self, answer: Answer) -> Any:
        return {"object": "error", "message": answer.message, "type": answer.code, "code": answer.code}

    def model(self, url: str, **options: Any) -> Any:
        plugin = pytest.importorskip("llm_mistral", reason="llm-mistral is not installed")
        key = options.pop("key", "mistral-test-key")
        name = options.pop("model_id", "mistral-test")
        model = plugin.AsyncMistral(f"mistral/{name}", name, False, True, True, False, **options)
        model.key = key
        return model

    @contextmanager
    def pointed_at(self, url: str) -> Iterator[None]:
        configuration = pytest.importorskip("mistralai.client.sdkconfiguration", reason="not installed")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(configuration.SERVERS, configuration.SERVER_GLOBAL, url)
            yield


PROTOCOL = MistralChat()

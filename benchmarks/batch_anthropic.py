"""Anthropic's message batches, as a pretended provider has them."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from .batch_api import DAY, TOKEN_CHARACTERS, Api, missing, rfc
from .provider import json_reply

if TYPE_CHECKING:
    from .batch_api import Asked, Held
    from .provider import Reply

_MESSAGES = "/v1/messages"
_KIND = re.compile(r'"result": {"type": "(\w+)"')


class Anthropic(Api):
    """``/v1/messages/batches``, and messages."""

    def handle(self, asked: Asked) -> Reply | None:
        if asked.path == _MESSAGES:
            return json_reply(*self.provider.answer_live(self, asked.json))
        rest = asked.under(f"{_MESSAGES}/batches")
        if rest is None:
            return None
        if not rest:
            return self._begin(asked.json) if asked.method == "POST" else self._listed(asked)
        name, _, what = rest.partition("/")
        held = self.provider.batches.get(name)
        if held is None:
            return missing(f"batch {name!r}")
        if what == "results":
            return self.sent(held.output)
        if what == "cancel":
            self.provider.cancel(held)
        return json_reply(200, self.shown(held))

    def _begin(self, asked: dict[str, Any]) -> Reply:
        lines = [(each["custom_id"], each["params"]) for each in asked["requests"]]
        if any(params.get("stream") for _, params in lines):
            return json_reply(400, self.error("stream is not supported in batches"))
        return self.begun(self.provider.begin(self, lines))

    def _listed(self, asked: Asked) -> Reply:
        page, more = self.page(asked.query.get("after_id"), int(asked.query.get("limit", "20")))
        return json_reply(200, {"data": [self.shown(held) for held in page], "has_more": more})

    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": body.get("model"),
            "content": [{"type": "text", "text": text}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": sent, "output_tokens": len(text) // TOKEN_CHARACTERS + 1},
        }

    def error(self, message: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}

    def shown(self, held: Held) -> dict[str, Any]:
        done = held.is_done
        counts = Counter(_KIND.findall(held.output.decode())) if done else Counter[str]()
        counts["succeeded"] = len(held.lines) * done - counts["errored"] - counts["expired"]
        return {
            "id": held.id,
            "type": "message_batch",
            "processing_status": "ended" if done else "in_progress",
            "request_counts": {
                "processing": 0 if done else len(held.lines),
                **{name: counts[name] for name in ("succeeded", "errored", "canceled", "expired")},
            },
            "created_at": rfc(held.begun),
            "expires_at": rfc(held.begun + DAY),
            "results_url": f"{self.provider.url}{_MESSAGES}/batches/{held.id}/results" if done else None,
        }

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        kind = "succeeded" if status == 200 else "errored"
        result = {"type": kind, "message" if status == 200 else "error": answer}
        return json.dumps({"custom_id": custom_id, "result": result}).encode()

    def unanswered(self, custom_id: str) -> bytes:
        return json.dumps({"custom_id": custom_id, "result": {"type": "expired"}}).encode()

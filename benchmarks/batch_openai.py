"""OpenAI's files and batches, as a pretended provider has them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, ClassVar

from .batch_api import DAY, TOKEN_CHARACTERS, Api, missing
from .provider import json_reply

if TYPE_CHECKING:
    from .batch_api import Asked, Held
    from .provider import Reply

_BOUNDARY = re.compile(rb"boundary=([^;\s]+)")
_LIVE = "/v1/chat/completions"


class OpenAI(Api):
    """``/v1/files``, ``/v1/batches``, and chat completions."""

    keeps_errors_apart: ClassVar[bool] = True

    def handle(self, asked: Asked) -> Reply | None:
        if asked.path == _LIVE:
            return json_reply(*self.provider.answer_live(self, asked.json))
        file = asked.under("/v1/files")
        if file is not None:
            return self._keep(asked) if not file else self._download(file.partition("/")[0])
        rest = asked.under("/v1/batches")
        if rest is None:
            return None
        if not rest:
            return self._begin(asked.json) if asked.method == "POST" else self._listed(asked)
        name, _, what = rest.partition("/")
        held = self.provider.batches.get(name)
        if held is None:
            return missing(f"batch {name!r}")
        if what == "cancel":
            self.provider.cancel(held)
        return json_reply(200, self.shown(held))

    def _keep(self, asked: Asked) -> Reply:
        found = self.provider.keep(_uploaded(asked.headers, asked.body))
        return json_reply(200, {"id": found, "object": "file"})

    def _download(self, name: str) -> Reply:
        held = self.provider.batches.get(name.partition("_")[2])
        if held is None:
            return missing(f"file {name!r}")
        return self.sent(held.errors if name.startswith("errors_") else held.output)

    def _begin(self, asked: dict[str, Any]) -> Reply:
        content = self.provider.files.pop(asked["input_file_id"], None)
        if content is None:
            return missing("such file")
        lines = [json.loads(line) for line in content.splitlines()]
        if len({line["custom_id"] for line in lines}) < len(lines):
            return json_reply(400, self.error("custom ids are not unique"))
        each = [(line["custom_id"], line["body"]) for line in lines]
        return self.begun(
            self.provider.begin(self, each, endpoint=asked["endpoint"], name=asked.get("metadata") or {})
        )

    def _listed(self, asked: Asked) -> Reply:
        page, more = self.page(asked.query.get("after"), int(asked.query.get("limit", "20")))
        return json_reply(200, {"data": [self.shown(held) for held in page], "has_more": more})

    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        received = len(text) // TOKEN_CHARACTERS + 1
        message = {"role": "assistant", "content": text}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": sent,
                "completion_tokens": received,
                "total_tokens": sent + received,
            },
        }

    def shown(self, held: Held) -> dict[str, Any]:
        errors = None
        if held.code is not None:
            limit = self.provider.settings.token_limit
            message = (
                f"Enqueued token limit reached for m in organization o. Limit: {limit:,} enqueued tokens."
            )
            errors = {"object": "list", "data": [{"code": held.code, "message": message}]}
        return {
            "id": held.id,
            "object": "batch",
            "endpoint": held.endpoint,
            "status": held.state,
            "metadata": held.name,
            "errors": errors,
            "created_at": int(held.begun),
            "expires_at": int(held.begun) + DAY,
            "output_file_id": f"output_{held.id}" if held.is_done and held.output else None,
            "error_file_id": f"errors_{held.id}" if held.is_done and held.errors else None,
            "request_counts": {
                "total": len(held.lines),
                "completed": held.output.count(b"\n"),
                "failed": held.errors.count(b"\n"),
            },
        }

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        response = {"status_code": status, "request_id": "r1", "body": answer}
        return json.dumps({"id": "l1", "custom_id": custom_id, "response": response, "error": None}).encode()

    def unanswered(self, custom_id: str) -> bytes:
        error = {"code": "batch_expired", "message": "This request could not be executed before it expired."}
        return json.dumps({"id": "l1", "custom_id": custom_id, "response": None, "error": error}).encode()


def _uploaded(headers: dict[str, str], body: bytes) -> bytes:
    """Return the file in a form that was sent."""
    found = _BOUNDARY.search(headers["content-type"].encode())
    assert found is not None
    for part in body.split(b"--" + found[1]):
        head, _, content = part.partition(b"\r\n\r\n")
        if b'name="file"' in head:
            return content[:-2]
    raise ValueError("there is no file in the form")

"""Gemini's files and batch operations, as a pretended provider has them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .batch_api import TOKEN_CHARACTERS, Api, missing
from .http_server import whole_reply
from .provider import json_reply

if TYPE_CHECKING:
    from .batch_api import Asked, Held
    from .provider import Reply

_VERSION = "/v1beta"
_STATES = {
    "in_progress": "BATCH_STATE_RUNNING",
    "completed": "BATCH_STATE_SUCCEEDED",
    "cancelled": "BATCH_STATE_CANCELLED",
    # What was not answered in time has lines that say so.
    "expired": "BATCH_STATE_SUCCEEDED",
    "failed": "BATCH_STATE_FAILED",
}


class Gemini(Api):
    """``models/NAME:batchGenerateContent``, its files and operations, and generateContent."""

    def handle(self, asked: Asked) -> Reply | None:
        path = asked.path
        if path == f"/upload{_VERSION}/files":
            return whole_reply(
                200, "text/plain", b"", {"x-goog-upload-url": f"{self.provider.url}/upload/here"}
            )
        if path == "/upload/here":
            return json_reply(200, {"file": {"name": self.provider.keep(asked.body)}})
        file = asked.under(f"/download{_VERSION}")
        if file is not None:
            held = self.provider.batches.get(file.partition(":")[0].rpartition("_")[2])
            return missing("such file") if held is None else self.sent(held.output)
        model = asked.under(f"{_VERSION}/models")
        if model is not None:
            return self._generate(model.rpartition(":")[2], asked.json)
        batch = asked.under(f"{_VERSION}/batches")
        if batch is None:
            return None
        if not batch:
            return self._listed(asked)
        name, _, what = batch.partition(":")
        held = self.provider.batches.get(name)
        if held is None:
            return missing(f"batch {name!r}")
        if what == "cancel":
            self.provider.cancel(held)
            return json_reply(200, {})
        return json_reply(200, self.shown(held))

    def _generate(self, method: str, asked: dict[str, Any]) -> Reply:
        if method != "batchGenerateContent":
            status, answer = self.provider.answer_live(self, asked)
            return json_reply(status, [answer] if method.startswith("stream") else answer)
        batch = asked["batch"]
        content = self.provider.files.pop(batch["input_config"]["file_name"], None)
        if content is None:
            return missing("such file")
        lines = [json.loads(line) for line in content.splitlines()]
        name = {"displayName": batch["display_name"]}
        each = [(line["key"], line["request"]) for line in lines]
        return self.begun(self.provider.begin(self, each, name=name))

    def _listed(self, asked: Asked) -> Reply:
        page, more = self.page(asked.query.get("pageToken"), int(asked.query.get("pageSize", "20")))
        after = {"nextPageToken": page[-1].id} if more else {}
        return json_reply(200, {"operations": [self.shown(held) for held in page], **after})

    def prompt(self, body: dict[str, Any]) -> str:
        return "".join(part.get("text", "") for part in body["contents"][-1]["parts"])

    def say(self, text: str, sent: int, body: dict[str, Any]) -> dict[str, Any]:
        received = len(text) // TOKEN_CHARACTERS + 1
        content = {"role": "model", "parts": [{"text": text}]}
        return {
            "candidates": [{"index": 0, "content": content, "finishReason": "STOP"}],
            "modelVersion": "m",
            "responseId": "r1",
            "usageMetadata": {
                "promptTokenCount": sent,
                "candidatesTokenCount": received,
                "totalTokenCount": sent + received,
            },
        }

    def error(self, message: str) -> dict[str, Any]:
        return {"error": {"code": 3, "message": message, "status": "INVALID_ARGUMENT"}}

    def shown(self, held: Held) -> dict[str, Any]:
        lines = held.output.splitlines()
        failed = sum(b'"error": {' in line for line in lines)
        stats = {"requestCount": str(len(held.lines))}
        if held.is_done:
            stats |= {
                "successfulRequestCount": str(len(lines) - failed),
                "failedRequestCount": str(failed),
            }
        told: dict[str, Any] = {
            "name": f"batches/{held.id}",
            "metadata": {"state": _STATES[held.state], **held.name, "batchStats": stats},
            "done": held.is_done,
        }
        if held.code is not None:
            message = f"Enqueued token limit reached. Limit: {self.provider.settings.token_limit:,}"
            return told | {"error": {"code": 8, "message": message, "status": "RESOURCE_EXHAUSTED"}}
        return told | ({"response": {"responsesFile": f"files/batch_{held.id}"}} if held.is_done else {})

    def line(self, custom_id: str, status: int, answer: dict[str, Any]) -> bytes:
        result = {"response": answer} if status == 200 else answer
        return json.dumps({"key": custom_id, **result}).encode()

    def unanswered(self, custom_id: str) -> bytes:
        error = {"code": 1, "message": "The batch ended before this request was carried out."}
        return json.dumps({"key": custom_id, "error": error}).encode()

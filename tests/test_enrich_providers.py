"""What an enrichment makes of what providers really send: none is written that is not an answer."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from .enrich_tables import TableFile
from .fakes import registered
from .protocols import PLUGIN_MARKS, Answer, Raw, ToolCall, protocol_server, skip_unless_spoken

if TYPE_CHECKING:
    from pathlib import Path

    from .protocols import Request

pytestmark = PLUGIN_MARKS

CALL = (ToolCall("look_up", {"name": "ana"}),)

#: What is sent to each row, and the kind of its failure; "" is an answer.
SENT: dict[str, list[tuple[Answer | Raw, str]]] = {
    "openai": [
        (Answer(), ""),
        (Answer(usage=None), ""),
        (Answer(finish="length"), "cut off"),
        (Answer(None, finish="length"), "cut off"),
        (Answer(None, finish="content_filter"), "filtered"),
        (Answer(refusal="I will not."), "refused"),
        (Answer(tool_calls=CALL), "called a tool"),
        (Answer(finish="error"), "broken off"),
        (Answer(None), "empty"),
        (Raw('{"object": "chat.completion", "choices": []}'), "no answer"),
        (Raw('{"error": {"message": "no such deployment"}}'), "no answer"),
        (Raw("<html>Sign in</html>", "text/html"), "no answer"),
        (Answer("a\ud800b"), "cannot be stored"),
    ],
    "responses": [
        (Answer(), ""),
        (Answer(finish="max_output_tokens"), "cut off"),
        (Answer(finish="content_filter"), "filtered"),
        (Answer(refusal="I will not."), "refused"),
        (Answer(tool_calls=CALL), "called a tool"),
        (Answer(None, finish="failed", code="invalid_prompt"), "no answer"),
    ],
    "anthropic": [
        (Answer(), ""),
        (Answer(finish="max_tokens"), "cut off"),
        (Answer(finish="pause_turn"), "cut off"),
        (Answer("half", finish="refusal", refusal="not about that"), "refused"),
        (Answer(tool_calls=CALL, finish="tool_use"), "called a tool"),
    ],
    "gemini": [
        (Answer(), ""),
        (Answer(finish="MAX_TOKENS"), "cut off"),
        (Answer("half", finish="SAFETY"), "filtered"),
        (Answer(blocked="OTHER"), "filtered"),
        (Answer(None, finish="MALFORMED_FUNCTION_CALL"), "broken off"),
        (Raw('[{"candidates": [{"finishReason": "STOP"}]}]'), "no answer"),
    ],
    "mistral": [
        (Answer(), ""),
        (Answer(finish="model_length"), "cut off"),
        (Answer(finish="error"), "broken off"),
    ],
    "groq": [(Answer(), ""), (Answer(finish="length"), "cut off"), (Answer(usage=None), "")],
    "ollama": [
        (Answer(), ""),
        (Answer(finish="length"), "cut off"),
        (Answer("", finish="load"), "broken off"),
    ],
}


@pytest.mark.parametrize("family", SENT)
async def test_only_answers_are_written(family: str, tmp_path: Path, anyio_backend: tuple[str, Any]) -> None:
    skip_unless_spoken(family, anyio_backend)
    sent = SENT[family]
    with protocol_server(family) as server:
        model = server.model()

        def script(request: Request) -> Answer | Raw:
            return sent[int(server.prompt(request))][0]

        server.script = script
        file = TableFile(tmp_path, "create table t (id integer primary key, body text)")
        file.run_many("insert into t values (?, ?)", [(number, str(number)) for number in range(len(sent))])
        with registered(model):
            report = await file.enrich("t", "{{ body }}", column="out", model=model.model_id, concurrency=3)
        file.close()
    failed = {number: kind for number, (_, kind) in enumerate(sent) if kind}
    recorded = file.run("select pk, error from _llm_enrich_errors")
    assert {int(pk): error.partition(":")[0] for pk, error in recorded} == failed
    assert file.run("select id from t where out is null order by id") == [(number,) for number in failed]
    assert (report.written, report.failed) == (len(sent) - len(failed), len(failed))
    assert {each.kind: each.count for each in report.failures} == Counter(failed.values())
    assert len(server.requests) == len(sent)

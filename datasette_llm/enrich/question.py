"""The identity of a question: one short hash of what is really sent.

It says whether a question has been asked before (reuse), whether an answer still belongs to its row
(staleness), which row a batch's result is for, and where a value came from. 128 bits: with a billion
different questions the chance that any two share a hash is below 1 in 10^20.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DIGEST_BYTES = 16

# Changes when the same question would get another hash: answers recorded before then count as stale.
_VERSION = b"llm-question-1"


class QuestionHasher:
    """Hashes the questions of one job, which differ in nothing but their prompts and attachments.

    Args:
        model_id: the model's own id, never an alias.
        options: all that the model is called with, configured defaults included.
        system: the system prompt.
        schema: the JSON schema that an answer has to fit.
    """

    __slots__ = ("_common",)

    def __init__(
        self,
        model_id: str,
        *,
        options: Mapping[str, Any] | None = None,
        system: str | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> None:
        common = {"model": model_id, "options": dict(options or {}), "system": system, "schema": schema}
        self._common = hashlib.blake2b(digest_size=DIGEST_BYTES, person=_VERSION)
        _update(self._common, json.dumps(common, sort_keys=True, default=str))

    def digest(self, prompt: str, attachments: Sequence[tuple[str, str]] = ()) -> bytes:
        """Return the hash of one question, `DIGEST_BYTES` long.

        Args:
            prompt: the rendered prompt.
            attachments: for each its type, and what identifies its content: a URL, or a hash of it.
        """
        state = self._common.copy()
        _update(state, prompt)
        for kind, identity in attachments:
            _update(state, kind)
            _update(state, identity)
        return state.digest()


def _update(state: hashlib.blake2b, text: str) -> None:
    # With its length in front, so that no two lists of texts are the same bytes.
    data = text.encode("utf-8", "surrogatepass")
    state.update(len(data).to_bytes(8, "big"))
    state.update(data)

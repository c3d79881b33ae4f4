"""What responses came to: the tokens they used, and why their models stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .finish import ended_because

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .response import PromptResponse


def used_tokens(response: PromptResponse) -> tuple[int, int]:
    """How many tokens a response sent and received, if its model says so with numbers."""
    observed = response._observed
    sent, received = observed.input_tokens, observed.output_tokens
    return sent if isinstance(sent, int) else 0, received if isinstance(received, int) else 0


def finish_reasons(responses: Iterable[PromptResponse], error: Exception | None) -> list[str]:
    """Why the models of these responses stopped, where they say so; the error is that of the last one."""
    reasons: list[str] = []
    for response in responses:
        ended = response.finish_reason if response.done else ended_because(response._observed, error)
        if ended is not None and ended != "unknown":
            reasons.append(ended)
    return reasons

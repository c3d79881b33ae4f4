"""One test prompt, and what came of it in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from ...calls.failures import classify
from ...calls.prices import cost_of
from ...errors import ModelNotFoundError
from ...facade import LLM
from ...secrecy import redacted

if TYPE_CHECKING:
    from datasette.app import Datasette

PROMPT = "Answer with the one word OK."
#: How long an answer may take, all that is waited for included.
SECONDS = 60.0
#: More of an answer, or of an error, is not shown.
CHARACTERS = 600

_REMEDIES = {
    "key": "The API key is refused: give another one.",
    "money": "The account has no money left: add credit at the provider, or use another key.",
    "model": "The provider has no such model for this key.",
    "quota": "The quota is used up: go on when it is back.",
}


async def send_test_prompt(
    datasette: Datasette, actor: dict[str, Any] | None, *, model_id: str | None, purpose: str | None
) -> dict[str, Any]:
    """Send one short prompt as any plugin would, and say what came of it.

    Args:
        datasette: whose models and plugins.
        actor: who sends it; what they may not use is refused.
        model_id: the model, or ``None`` for the default of the purpose.
        purpose: what it is for.

    Returns:
        ``ok``, ``model``, ``purpose``, ``seconds``; the ``answer`` with its tokens and cost, or the ``error``
        and, where one is known, a ``remedy``.
    """
    began = anyio.current_time()
    told: dict[str, Any] = {"ok": False, "model": model_id, "purpose": purpose}
    try:
        with anyio.fail_after(SECONDS):
            model = await LLM(datasette).model(model_id, purpose=purpose, actor=actor)
            told["model"] = model.model_id
            response = await model.prompt(PROMPT, stream=False)
            try:
                answer = await response.text()
            finally:
                response.cancel()  # Where the time is over; what has ended stays as it is.
            usage = await response.usage()
            told |= {
                "ok": True,
                "answer": _shown(answer),
                "finish_reason": response.finish_reason,
                "input_tokens": usage.input,
                "output_tokens": usage.output,
                "cost": cost_of(response, model.pricing),
            }
    except TimeoutError as error:
        told["error"] = _shown(str(error)) or f"no answer within {SECONDS:g} seconds"
    except ModelNotFoundError as error:
        told["error"] = _shown(str(error))
    except Exception as error:
        # Whatever a model, its provider or a plugin's wrapper raised is what was asked for.
        told["error"] = _shown(f"{type(error).__name__}: {error}")
        told["remedy"] = _REMEDIES.get(classify(error).reason or "")
    return {**told, "seconds": round(anyio.current_time() - began, 2)}


def _shown(text: str) -> str:
    text = " ".join(redacted(text).split())
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + "..."

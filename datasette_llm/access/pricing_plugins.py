"""Prices that a plugin of datasette-llm-accountant knows: its own hook is asked, if anybody implements it.

Such a plugin is asked for the costs of given tokens. Where these grow with the tokens in and the tokens out,
as prices do, two of its answers say what a million of each costs, and it need not be asked for each prompt.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import anyio
import llm

from ..backends.datasette_side import call
from ..calls.prices import MILLION, Price

if TYPE_CHECKING:
    from datasette.app import Datasette

logger = logging.getLogger("datasette_llm")

#: How long a plugin may take to say what a model costs, in seconds: it may load a list.
PLUGIN_SECONDS = 10.0


async def find_plugin_price(datasette: Datasette, model_id: str) -> Price | None:
    """Return what a pricing plugin says of a model; ``None`` if there is none that knows it."""
    from datasette.plugins import pm

    hook = getattr(pm.hook, "register_llm_accountant_pricing", None)
    if hook is None or not hook.get_hookimpls():
        return None
    try:
        with anyio.move_on_after(PLUGIN_SECONDS):
            provider = hook(datasette=datasette)
            return None if provider is None else await _price(provider, model_id)
    except Exception as error:  # Whatever it raises for a model that it does not know.
        logger.debug("A pricing plugin has no price for %s: %s", model_id, error)
    return None


async def _price(provider: Any, model_id: str) -> Price | None:
    known = await call(provider.supported_models)
    if known is not None and model_id not in known:
        return None

    async def cost(sent: int, received: int) -> float:
        usage = llm.Usage(input=sent, output=received, details={})
        nanocents = await call(provider.calculate_cost_from_response, model_id, usage, None)
        return float(nanocents) / 100 / 1_000_000_000

    price = Price(await cost(MILLION, 0), await cost(0, MILLION))
    if not math.isclose(await cost(MILLION, MILLION), price.input + price.output, rel_tol=1e-6):
        return None  # Not what a price is: it depends on the number.
    return price

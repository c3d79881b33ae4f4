"""What an answer costs, in dollars.

What the provider itself says comes first: in its usage (OpenRouter) or in a header (litellm's proxy). Then
the configured price of the model, then what the package genai-prices knows. A model without a price has
none: its answers cost ``None``, never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import anyio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..responses.response import PromptResponse

MILLION = 1_000_000

#: litellm's proxy says with each answer what it cost.
COST_HEADER = "x-litellm-response-cost"


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens of an answer as they are billed.

    Attributes:
        input: tokens sent, those read from the provider's cache and written to it included.
        output: tokens received, reasoning included.
        cached: those of the input that were read from the cache.
        cache_written: those of the input that were written to it, where that has a price of its own.
    """

    input: int
    output: int
    cached: int = 0
    cache_written: int = 0


class Pricing(Protocol):
    """Knows what tokens of one model cost."""

    def cost(self, usage: Usage) -> float | None:
        """Return what it costs in dollars, or ``None`` if that cannot be said."""


@dataclass(frozen=True, slots=True)
class Price:
    """A price as it is configured: dollars per million tokens.

    Attributes:
        cached_input: of input that is read from the cache; as ``input`` if it is ``None``.
        batch: the part of these that is to be paid for answers in batches; half if it is ``None``.
    """

    input: float
    output: float
    cached_input: float | None = None
    batch: float | None = None

    def cost(self, usage: Usage) -> float:
        cached = self.input if self.cached_input is None else self.cached_input
        whole = usage.input - usage.cached
        return (whole * self.input + usage.cached * cached + usage.output * self.output) / MILLION


@dataclass(frozen=True, slots=True)
class _Listed:
    """The price of a model that genai-prices knows."""

    model_name: str
    provider: str

    def cost(self, usage: Usage) -> float | None:
        import genai_prices

        tokens = genai_prices.Usage(
            input_tokens=usage.input,
            output_tokens=usage.output,
            cache_read_tokens=usage.cached or None,
            cache_write_tokens=usage.cache_written or None,
        )
        try:
            found = genai_prices.calc_price(tokens, self.model_name, provider_id=self.provider)
        except (LookupError, ValueError):
            return None
        return float(found.total_price)


#: What providers take for answers in batches, as a part of the price.
BATCH_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class _OfBatches:
    """A price for answers that come in batches."""

    usual: Pricing
    share: float

    def cost(self, usage: Usage) -> float | None:
        cost = self.usual.cost(usage)
        return None if cost is None else cost * self.share


def in_batches(pricing: Pricing | None) -> Pricing | None:
    """Return what answers cost that come in batches: as it is configured, else half of the price."""
    if pricing is None:
        return None
    share = getattr(pricing, "batch", None)
    return _OfBatches(pricing, BATCH_SHARE if share is None else share)


# Where llm's plugins call a provider's key by another name than the list calls the provider.
_PROVIDERS = {"gemini": "google", "grok": "x-ai"}
# Where plugins keep the name that the provider knows a model by.
_NAMES = ("model_name", "claude_model_id", "gemini_model_id", "model_id")


async def find_pricing(model: Any) -> Pricing | None:
    """Return the listed price of one of llm's models.

    A model that needs no key, or is served at an address of its own, is nobody's whose price is listed.
    """
    needs_key = getattr(model, "needs_key", None)
    if not isinstance(needs_key, str) or getattr(model, "api_base", None):
        return None
    names = tuple(str(getattr(model, name)) for name in _NAMES if getattr(model, name, None))
    arguments = (_PROVIDERS.get(needs_key, needs_key), names)
    if arguments not in _searched:
        # Loading the list takes a quarter of a second.
        _searched[arguments] = await anyio.to_thread.run_sync(_search, *arguments)
    return _searched[arguments]


_searched: dict[tuple[str, tuple[str, ...]], Pricing | None] = {}


@lru_cache(maxsize=1)
def _has_list() -> bool:
    try:
        import genai_prices  # noqa: F401
    except ImportError:  # There is none for Python 3.10.
        return False
    return True


def _search(provider: str, names: tuple[str, ...]) -> Pricing | None:
    if not _has_list():
        return None
    for name in names:
        for form in (name, name.partition("/")[2]):
            listed = _Listed(form, provider)
            if form and listed.cost(Usage(1, 1)) is not None:
                return listed
    return None


def cost_of(response: PromptResponse, pricing: Pricing | None) -> float | None:
    """Return what an answer cost in dollars; ``None`` if nobody says."""
    observed = response._observed
    details = observed.token_details if isinstance(observed.token_details, dict) else {}
    told = _dollars(details.get("cost"))
    if told is None:
        told = response.told_cost
    if told is not None or pricing is None:
        return told
    usage = usage_of(observed.input_tokens, observed.output_tokens, details)
    return None if usage is None else pricing.cost(usage)


def told_in_headers(headers: Mapping[str, str]) -> float | None:
    """Return the cost that a proxy tells in its headers; one that says 0 does not know it."""
    return _dollars(headers.get(COST_HEADER)) or None


def usage_of(sent: Any, received: Any, details: Mapping[str, Any]) -> Usage | None:
    """Return the tokens as they are billed, from what llm keeps; ``None`` if the model does not say.

    Anthropic counts what goes through its cache beside the input, the others as a part of it. Reasoning is
    a part of the output everywhere in what llm keeps.
    """
    if not isinstance(sent, int) and not isinstance(received, int):
        return None
    sent, received = _whole(sent), _whole(received)
    read, written = (_whole(details.get(f"cache_{what}_input_tokens")) for what in ("read", "creation"))
    if read or written:
        return Usage(sent + read + written, received, read, written)
    for inner in (details.get("prompt_tokens_details"), details.get("input_tokens_details"), details):
        if isinstance(inner, dict):
            for name in ("cached_tokens", "cachedContentTokenCount", "prompt_cache_hit_tokens"):
                if _whole(inner.get(name)):
                    return Usage(sent, received, min(sent, _whole(inner[name])))
    return Usage(sent, received)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _dollars(value: Any) -> float | None:
    try:
        cost = float(value)
    except (TypeError, ValueError):
        return None
    return cost if math.isfinite(cost) and cost >= 0 else None

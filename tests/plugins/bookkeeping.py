"""An accountant with open books, for the tests of datasette-llm-accountant."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("datasette_llm_accountant", reason="datasette-llm-accountant is not installed")

from datasette_llm_accountant import Accountant, InsufficientBalanceError, Nanocents, PricingProvider, Tx


class Books(Accountant):  # type: ignore[misc]  # it ships no types
    """Keeps every transaction: reserved, then settled or rolled back.

    Attributes:
        open: what is reserved and not settled, by transaction.
        settled: what each settled transaction came to, in the order of settling.
        rolled_back: how many were given back.
        refusals: how many reservations are refused before one is granted.
    """

    def __init__(self, *, refusals: int = 0) -> None:
        self.refusals = refusals
        self.reservations = 0
        self.open: dict[str, int] = {}
        self.settled: list[int] = []
        self.rolled_back = 0
        self.about: list[tuple[Any, Any, Any]] = []

    async def reserve(
        self, nanocents: int, model_id: Any = None, purpose: Any = None, actor_id: Any = None
    ) -> Tx:
        # Others get their turn here, as they do while a real one writes to its database.
        await asyncio.sleep(0)
        if self.refusals:
            self.refusals -= 1
            raise InsufficientBalanceError("nothing left")
        self.reservations += 1
        transaction = Tx(f"tx{self.reservations}")
        self.open[transaction] = nanocents
        self.about.append((model_id, purpose, actor_id))
        await asyncio.sleep(0)
        return transaction

    async def settle(self, tx: Tx, nanocents: int, **about: Any) -> None:
        await asyncio.sleep(0)
        del self.open[tx]
        self.settled.append(int(nanocents))

    async def rollback(self, tx: Tx) -> None:
        await asyncio.sleep(0)
        del self.open[tx]
        self.rolled_back += 1

    @property
    def balanced(self) -> bool:
        """Whether every reservation has been settled or given back, once."""
        return not self.open and self.reservations == len(self.settled) + self.rolled_back


class TokenPrice(PricingProvider):  # type: ignore[misc]  # it ships no types
    """A fixed price per token; the plugin's own provider fetches a list of prices from the network.

    Args:
        nanocents: the price.
        known: the models that have one, or ``None`` for all.
    """

    def __init__(self, nanocents: int = 1, known: set[str] | None = None) -> None:
        self.nanocents = nanocents
        self.known = known

    async def supported_models(self) -> set[str] | None:
        return self.known

    async def calculate_cost_from_response(self, model_id: str, usage: Any, response: Any) -> Any:
        await asyncio.sleep(0)
        return Nanocents(self.nanocents * (usage.input + usage.output))

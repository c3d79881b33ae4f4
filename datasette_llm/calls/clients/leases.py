"""Clients that are alike, and what one prompt gets of them: a lease.

Clients are kept per API key, address, headers and whatever else they are made with, so two keys never share
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from .identity import CannotShareError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

#: How many requests one HTTP client is given at a time before another one is made beside it: httpcore
#: looks through all connections of a pool twice for each request. Against 64, and with 500 in flight, 8 saves
#: a tenth of the CPU that a prompt takes.
REQUESTS_PER_CLIENT = 8

#: Beyond that many clients, the one that is least busy is given the next request.
MOST_CLIENTS = 64

#: So many different kinds of clients an owner keeps: a model that makes each client with something new, such
#: as the number of a request, has clients of its own from then on.
MOST_SETS = 64

#: How long closing all clients may take, in seconds.
CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Made:
    """A client that was made to be shared, and how to close it."""

    client: Any
    aclose: Callable[[], Awaitable[None]]


class ClientSet:
    """Clients that are alike, each with connections of its own; the first that has room is used next.

    Args:
        make: makes another client.
        aclose: closes what all of them stem from, if there is something.
        most: how many clients there may be.
    """

    def __init__(
        self,
        make: Callable[[], Made],
        aclose: Callable[[], Awaitable[None]] | None = None,
        *,
        most: int | None = None,
    ) -> None:
        self._make = make
        self._aclose = aclose
        self._most = most
        self.clients: list[SharedClient] = []

    def lease(self) -> Lease:
        """Return a client for one prompt."""
        least = None
        for client in self.clients:
            # Filling one after the other keeps few connections open, and those warm.
            if client.busy < REQUESTS_PER_CLIENT:
                return Lease(client)
            if least is None or client.busy < least.busy:
                least = client
        if least is None or len(self.clients) < (MOST_CLIENTS if self._most is None else self._most):
            least = SharedClient(self._make())
            self.clients.append(least)
        return Lease(least)

    async def aclose(self) -> None:
        try:
            if self._aclose is not None:
                await self._aclose()
        finally:
            for client in self.clients:
                await client.made.aclose()


class SharedClient:
    """One client on connections of its own.

    Attributes:
        busy: how many leases of it there are.
    """

    __slots__ = ("busy", "client", "made")

    def __init__(self, made: Made) -> None:
        self.busy = 0
        self.made = made
        self.client = made.client


class Lease:
    """A client as one prompt sees it: the client counts as busy for as long as this object lives.

    A model keeps its client in a local variable of ``execute()``, so that is until the answer is
    complete, failed or given up, streamed or not. Closing a lease closes nothing.
    """

    __slots__ = ("_leased",)

    def __init__(self, client: SharedClient) -> None:
        client.busy += 1
        self._leased = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._leased.client, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # Libraries that are handed a client check what it is.
        return type(self._leased.client)

    async def __aenter__(self) -> Lease:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def aclose(self) -> None:
        pass

    close = aclose

    def __del__(self) -> None:
        self._leased.busy -= 1


class ClientSets:
    """All clients of one owner, closed together.

    Attributes:
        closed: whether they are; nothing is leased afterwards.
    """

    def __init__(self) -> None:
        self._sets: dict[Hashable, ClientSet] = {}
        self.closed = False

    def clients(self, identity: Hashable, make: Callable[[], ClientSet]) -> ClientSet:
        """Return the clients that are alike in this way, from ``make`` if there are none yet."""
        known = self._sets.get(identity)
        if known is None:
            known = self._sets.setdefault(identity, make())
        return known

    def lease(self, identity: Hashable, make: Callable[[], Made]) -> Lease:
        """Return a client for one prompt, of those that are alike in this way.

        Raises:
            CannotShareError: there are too many kinds already.
        """
        known = self._sets.get(identity)
        if known is None:
            if len(self._sets) >= MOST_SETS:
                raise CannotShareError("no two of its clients are alike")
            clients = ClientSet(make)
            # Not kept if it cannot be made.
            lease = clients.lease()
            self._sets[identity] = clients
            return lease
        return known.lease()

    @property
    def empty(self) -> bool:
        """Whether no client was made yet."""
        return not self._sets

    async def aclose(self) -> None:
        """Close every client; afterwards models get clients of their own again. Never hangs."""
        self.closed = True
        sets, self._sets = list(self._sets.values()), {}
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            for clients in sets:
                await clients.aclose()

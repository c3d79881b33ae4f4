"""Workers of a Dask scheduler: who is there, and an actor in each."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import sys
from typing import TYPE_CHECKING, Any

import anyio

from .dask_actor import BenchActor

if TYPE_CHECKING:
    from collections.abc import Collection


logger = logging.getLogger("datasette_llm")

#: How long it may take to reach the scheduler, in seconds.
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 2.0


def load_distributed() -> Any:
    """Import Dask's ``distributed``, which then keeps its log to itself.

    Raises:
        ImportError: it is not installed.
    """
    ours = "distributed" not in sys.modules
    import distributed

    if ours:
        # It logs each connection that ends, on stderr.
        logging.getLogger("distributed").setLevel(logging.CRITICAL)
    return distributed


class DaskSource:
    """The workers of a scheduler; connects again when that was away.

    Args:
        address: the scheduler's.
        security: a ``distributed.Security``, or ``None``.
    """

    def __init__(self, address: str, security: Any = None) -> None:
        self._address = address
        self._security = security
        self._client: Any = None

    async def addresses(self) -> Collection[str]:
        """Return the workers that the scheduler knows.

        Raises:
            OSError: it cannot be reached.
        """
        client: Any = await self._connected()
        return list(await client.scheduler.ncores())

    async def _connected(self) -> Any:
        distributed = load_distributed()
        if self._client is not None and self._client.status != "running":
            await self.aclose()
        if self._client is None:
            self._client = await distributed.Client(
                self._address,
                security=self._security,
                asynchronous=True,
                direct_to_workers=True,
                set_as_default=False,
                timeout=CONNECT_SECONDS,
                name="datasette-llm",
            )
        return self._client

    async def connect(self, address: str) -> DaskLink:
        """Make an actor in a worker."""
        client = await self._connected()
        key = f"datasette-llm-{secrets.token_hex(6)}"
        future = client.submit(
            BenchActor, actor=True, workers=[address], allow_other_workers=False, pure=False, key=key
        )
        await future
        return DaskLink(client.rpc(address), future, private=is_private(address))

    async def aclose(self) -> None:
        """Let go of the scheduler. Never raises, never hangs."""
        client, self._client = self._client, None
        if client is None:
            return
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            try:
                await client.close(CLOSE_SECONDS)
            except Exception as error:
                logger.debug("A scheduler was left as it is: %s", error)


class DaskLink:
    """Carries bytes to the actor in one worker, and back.

    Dask's own stand-in for an actor makes a future and a callback of each call, and may go by way of the
    scheduler; this asks the worker.
    """

    def __init__(self, rpc: Any, future: Any, *, private: bool) -> None:
        from distributed.protocol.serialize import to_serialize

        self._rpc = rpc
        self._future = future
        self._sent_as: Any = to_serialize
        self.private = private

    async def _call(self, method: str, *arguments: Any) -> Any:
        answer = await self._rpc.actor_execute(
            function=method,
            actor=self._future.key,
            args=[self._sent_as(argument) for argument in arguments],
            kwargs={},
        )
        if answer["status"] != "OK":
            raise answer["exception"]
        return answer["result"]

    async def ask(self, request: bytes) -> bytes:
        return bytes(await self._call("ask", request))

    async def send(self, parcel: bytes) -> None:
        await self._call("send", parcel)

    async def poll(self, acknowledged: int) -> bytes:
        return bytes(await self._call("poll", acknowledged))

    async def aclose(self) -> None:
        try:
            await self._call("end")
        finally:
            self._future.release()


def is_private(address: str) -> bool:
    """Say whether nobody else can read what goes to an address: TLS, or this machine itself."""
    protocol, _, rest = address.partition("://")
    if protocol in ("tls", "wss", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

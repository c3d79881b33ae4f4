"""Workers of a Dask scheduler: who is there, and a bench in each."""

from __future__ import annotations

import ipaddress
import logging
import pickle
import secrets
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio

from .bench import POLL_SECONDS
from .dask_actor import OPERATION, open_bench
from .line import UnfitWorker

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


logger = logging.getLogger("datasette_llm")

#: How long it may take to reach the scheduler or a worker, in seconds. Dask gives each try a fifth of it.
CONNECT_SECONDS = 15.0
#: How long an answer may take that is there already.
ANSWER_SECONDS = 10.0
#: How long a worker may take that has to import this package, llm's plugins or a provider's client first.
OPEN_SECONDS = 60.0
CLOSE_SECONDS = 2.0
#: What Dask does all the time to watch itself, and shows on pages that a local cluster does not have, is off:
#: a profile each 10 ms, a look at the loop each 20, at disks, and at tasks that could be moved.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}


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
    """The workers of a scheduler. A question makes its own connection where there is none, so that no broken
    one leaves anything half made behind.

    Args:
        address: the scheduler's.
        security: a ``distributed.Security``; by default the one of Dask's configuration.
    """

    def __init__(self, address: str, security: Any = None) -> None:
        distributed = load_distributed()
        self._address = address
        self._connection = (security or distributed.Security()).get_connection_args("client")
        self._scheduler = self._rpc(address)

    def _rpc(self, address: str) -> Any:
        distributed = load_distributed()
        return distributed.rpc(address, timeout=CONNECT_SECONDS, connection_args=self._connection)

    async def addresses(self) -> Collection[str]:
        """Return the workers that the scheduler knows.

        Raises:
            OSError: it cannot be reached, or does not answer.
        """
        with _answer_within(CONNECT_SECONDS + ANSWER_SECONDS, f"the scheduler {self._address}"):
            return list(await self._scheduler.ncores())

    async def connect(self, address: str) -> DaskLink:
        """Begin to work with a worker.

        Raises:
            UnfitWorker: it cannot work for this one.
            OSError: it cannot be reached, or does not answer.
        """
        link = DaskLink(self._rpc(address), address)
        try:
            await link.open()
        except BaseException:
            await link.let_go()
            raise
        return link

    async def aclose(self) -> None:
        """Let go of the scheduler. Never raises, never hangs."""
        await _let_go(self._scheduler)


class DaskLink:
    """Carries bytes to the bench in one worker, and back.

    It asks the worker itself: the scheduler knows of no call, and needs none of this package.

    Attributes:
        private: whether nobody else can read what it carries.
    """

    def __init__(self, rpc: Any, address: str) -> None:
        self._rpc = rpc
        self._address = address
        self._key = secrets.token_hex(16)
        self.private = is_private(address)

    async def open(self) -> None:
        """Have the worker make a bench.

        Raises:
            UnfitWorker: it has no such thing.
        """
        try:
            with _answer_within(OPEN_SECONDS, f"the worker {self._address}"):
                answer = await self._rpc.run(
                    function=pickle.dumps(open_bench), args=pickle.dumps((self._key,)), wait=True
                )
        except (ImportError, AttributeError) as error:
            raise UnfitWorker(f"it has no datasette-llm that can work with this one ({error})") from error
        if answer["status"] != "OK":
            raise answer["exception"]

    async def _call(self, seconds: float, method: str, *arguments: Any) -> bytes:
        with _answer_within(seconds, f"the worker {self._address}"):
            answer = await getattr(self._rpc, OPERATION)(
                bench=self._key, method=method, arguments=list(arguments)
            )
        return bytes(answer)

    async def ask(self, request: bytes) -> bytes:
        return await self._call(OPEN_SECONDS, "ask", request)

    async def send(self, parcel: bytes) -> None:
        await self._call(OPEN_SECONDS, "send", parcel)

    async def poll(self, acknowledged: int) -> bytes:
        return await self._call(CONNECT_SECONDS + POLL_SECONDS + ANSWER_SECONDS, "poll", acknowledged)

    async def aclose(self) -> None:
        try:
            await self._call(CLOSE_SECONDS, "end")
        finally:
            await self.let_go()

    async def let_go(self) -> None:
        """Close the connections. Never raises, never hangs."""
        await _let_go(self._rpc)


async def _let_go(rpc: Any) -> None:
    with anyio.move_on_after(CLOSE_SECONDS, shield=True):
        try:
            await rpc.close_rpc()
        except Exception as error:
            logger.debug("A connection of Dask was left as it is: %s", error)


@contextmanager
def _answer_within(seconds: float, who: str) -> Iterator[None]:
    """Bound what waits for somebody, who is named when it took too long."""
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as error:
        raise ConnectionError(f"{who} did not answer within {seconds:g} seconds") from error


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

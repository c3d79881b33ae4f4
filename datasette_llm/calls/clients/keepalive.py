"""TCP keep-alive on the connections of clients: a peer that is gone is noticed within a minute.

A laptop that slept, a NAT or a VPN that forgot a connection tells nobody: what waits for an answer over it
waits for as long as it may. The operating system asks idle connections whether the peer is still there.

HTTP libraries take socket options only together with a transport, and with a transport of one's own they
leave out the proxies of the environment. So the options are given to the transports that a client has made.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds of silence before the peer is asked, from one question to the next, and how many go unanswered.
IDLE_SECONDS, INTERVAL_SECONDS, QUESTIONS = 20, 10, 3


def _options() -> Iterator[tuple[int, int, int]]:
    yield socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
    # macOS has another name for the first.
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    for name, value in (
        (idle, IDLE_SECONDS),
        ("TCP_KEEPINTVL", INTERVAL_SECONDS),
        ("TCP_KEEPCNT", QUESTIONS),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            yield socket.IPPROTO_TCP, option, value


#: What is set on each socket, as ``setsockopt()`` takes it.
OPTIONS = tuple(_options())


def keep_alive(client: Any) -> Any:
    """Have the connections that a client opens from now on kept alive, and return the client.

    Args:
        client: an ``AsyncClient`` of httpx or httpx2, on their own transport or on aiohttp. One
            on a transport of another kind stays as it is.
    """
    mounted = getattr(client, "_mounts", {}).values()
    for transport in (getattr(client, "_transport", None), *mounted):
        pool: Any = getattr(transport, "_pool", None)
        if pool is not None and hasattr(pool, "_socket_options"):
            pool._socket_options = OPTIONS
        elif hasattr(transport, "get_client"):
            _on_aiohttp(transport)
    return client


def _on_aiohttp(transport: Any) -> None:
    make = transport.get_client

    def get_client() -> Any:
        session = make()
        # Older versions of aiohttp cannot be told.
        if hasattr(session.connector, "_socket_factory"):
            session.connector._socket_factory = _make_socket
        return session

    transport.get_client = get_client


def _make_socket(address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(*address[:3])
    try:
        for option in OPTIONS:
            made.setsockopt(*option)
    except BaseException:
        made.close()
        raise
    return made

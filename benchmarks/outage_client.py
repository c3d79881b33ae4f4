"""Imported at the start of the command that ``benchmarks.outage`` runs: how it finds its provider.

The provider's host name is unknown while there is a certain file. Each lookup that fails so, and each attempt
to connect, is noted in another one.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

HOST, PORT = os.environ["OUTAGE_HOST"], int(os.environ["OUTAGE_PORT"])
UNKNOWN, LOG = os.environ["OUTAGE_UNKNOWN"], os.environ["OUTAGE_LOG"]

_look_up, _connect = socket.getaddrinfo, socket.socket.connect


def _note() -> None:
    with open(LOG, "a") as log:
        log.write(f"{time.time()}\n")


def look_up(host: Any, *args: Any, **named: Any) -> Any:
    """Find an address, as ``socket.getaddrinfo()`` does."""
    if host in (HOST, HOST.encode()):
        if os.path.exists(UNKNOWN):
            _note()
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        host = "127.0.0.1"
    return _look_up(host, *args, **named)


def connect(self: socket.socket, address: Any) -> None:
    """Connect a socket, as its own method does."""
    if isinstance(address, tuple) and address[1] == PORT:
        _note()
    _connect(self, address)


socket.getaddrinfo = look_up
socket.socket.connect = connect  # type: ignore[method-assign, assignment]

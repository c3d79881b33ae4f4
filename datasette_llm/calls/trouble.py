"""What kept a call from being answered by anybody: refused connections, unknown names, broken ones, silence.

Read from the exception and its causes, without importing a provider's SDK. Libraries for HTTP pass on
what the operating system said as words alone, so words count too.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from typing import TYPE_CHECKING

import anyio

from ..pace.outcome import Trouble
from .failures import IncompleteAnswer, chain_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .failures import Failure

#: Statuses with which a gateway, or an overloaded server, says that nobody is served.
_UNAVAILABLE = frozenset({502, 503, 504, 529})
#: Of these, what a gateway also says when one request broke, or outlasted, the server behind it.
_ALONE = frozenset({502, 504})

#: What a server says (503) whose line of waiting requests is full: Ollama, and those that are like it.
_LINE_IS_FULL = re.compile(r"maximum pending requests|too many pending requests|queue is full", re.I)

_REFUSED = "the connection is refused"
_UNKNOWN = "no such host name"
_NETWORK = "the network is unreachable"
_CERTIFICATE = "its certificate is not valid"
_CONNECT_TIMEOUT = "no answer to the attempt to connect"
_BROKEN = "the connection broke"
_SILENCE = "no answer in time"

_ERRNOS = {
    errno.ECONNREFUSED: _REFUSED,
    errno.ENETUNREACH: _NETWORK,
    errno.EHOSTUNREACH: _NETWORK,
    errno.ENETDOWN: _NETWORK,
    errno.EHOSTDOWN: _NETWORK,
    errno.ETIMEDOUT: _CONNECT_TIMEOUT,
}
_WORDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"certificate", re.I), _CERTIFICATE),
    (
        re.compile(
            r"name or service not known|name resolution|nodename nor servname|no address associated"
            r"|getaddrinfo failed|cannot resolve",
            re.I,
        ),
        _UNKNOWN,
    ),
    (re.compile(r"unreachable|no route to host|network is down", re.I), _NETWORK),
    (re.compile(r"refused|all connection attempts failed|cannot connect", re.I), _REFUSED),
)
#: Class names of HTTP libraries' errors for a connection that was never made.
_CONNECT_ERRORS = frozenset({"ConnectError", "ClientConnectorError"})
_CONNECT_TIMEOUTS = frozenset({"ConnectTimeout", "ConnectionTimeoutError", "PoolTimeout"})
_TIMEOUTS = frozenset({"TimeoutException", "ServerTimeoutError", "APITimeoutError"})
_TRANSPORTS = frozenset(
    {
        "NetworkError",
        "RemoteProtocolError",
        "ClientConnectionError",
        "ClientPayloadError",
        "APIConnectionError",
    }
)
_TRANSPORT_BASES = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)


def trouble_of(error: Exception, failure: Failure) -> Trouble | None:
    """Say what kept a call from being answered; ``None`` if somebody answered it, with whatever.

    Args:
        failure: what ``classify()`` says of the error.
    """
    if failure.status is not None:
        if failure.status not in _UNAVAILABLE or is_line_full(error, failure):
            return None
        return Trouble(
            f"it answers with status {failure.status}",
            error,
            _address(list(chain_of(error))),
            alone=failure.status in _ALONE,
            answered=True,
        )
    if failure.kind != "transient":
        return None
    chain = list(chain_of(error))
    errors = untranslated(chain)
    address = _address(chain)
    what = _connecting(errors)
    if what is not None:
        return Trouble(what, error, address)
    if any(isinstance(each, TimeoutError) or _is_a(each, _TIMEOUTS) for each in errors):
        return Trouble(_SILENCE, error, address, alone=True, silent=True)
    return Trouble(_BROKEN, error, address, alone=True) if _is_transport(errors) else None


def untranslated(errors: Sequence[BaseException]) -> Sequence[BaseException]:
    """Leave out what SDKs make of an error of aiohttp: whatever is no answer, they call a connect timeout.

    Args:
        errors: an exception and its causes.
    """
    for number, error in enumerate(errors):
        if type(error).__module__.partition(".")[0] == "aiohttp":
            return errors[number:]
    return errors


def said_by(error: Exception) -> str:
    """Return an error's text: that of aiohttp's below it, where an SDK made a timeout of what was none."""
    original = untranslated(list(chain_of(error)))[0]
    timed_out = isinstance(original, TimeoutError) or _is_a(original, _TIMEOUTS)
    return str(error) if timed_out else str(original) or str(error)


def is_line_full(error: Exception, failure: Failure) -> bool:
    """Whether a server refused a call because too many wait already: somebody is there, and is busy.

    Args:
        failure: what ``classify()`` says of the error.
    """
    return failure.status == 503 and any(_LINE_IS_FULL.search(str(each)) for each in chain_of(error))


def _connecting(errors: Sequence[BaseException]) -> str | None:
    """Say why no connection could be made, if that is it."""
    tried = False
    for error in errors:
        if isinstance(error, ssl.SSLCertVerificationError):
            return _CERTIFICATE
        if isinstance(error, socket.gaierror):
            return _UNKNOWN
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return _ERRNOS[error.errno]
        if _is_a(error, _CONNECT_TIMEOUTS):
            return _CONNECT_TIMEOUT
        tried = tried or _is_a(error, _CONNECT_ERRORS)
    if not tried:
        return None
    text = " ".join(map(str, errors))
    return next((what for words, what in _WORDS if words.search(text)), "no connection can be made")


def _is_a(error: BaseException, names: frozenset[str]) -> bool:
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _is_transport(errors: Sequence[BaseException]) -> bool:
    """Whether it was the connection, and not what was told over it."""
    if any(
        isinstance(error, IncompleteAnswer) or isinstance(getattr(error, "body", None), dict)
        for error in errors
    ):
        return False
    return any(isinstance(error, _TRANSPORT_BASES) or _is_a(error, _TRANSPORTS) for error in errors)


def _address(errors: Sequence[BaseException]) -> str | None:
    """Return host and port of the request that failed: nothing else of its URL, which may hold a key."""
    for error in errors:
        try:
            url = getattr(error, "request", None) and error.request.url  # type: ignore[attr-defined]
        except RuntimeError:  # httpx, of an error that knows no request
            continue
        host = getattr(url, "host", None)
        if not isinstance(host, str) or not host:
            continue
        port = getattr(url, "port", None)
        return f"{host}:{port}" if port else host
    return None

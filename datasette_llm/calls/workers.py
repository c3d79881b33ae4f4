"""Which workers: so many local processes, or those of a scheduler that is there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

#: How long prompts wait for a worker by default: shorter than the shortest time that an attempt may take.
TIMEOUT_SECONDS = 60.0
#: Seconds that local processes outlive the last group that uses them: the next one need not start them.
LINGER_SECONDS = 1.0
KEPT_SECONDS = 60.0
#: Local processes that can be asked for.
MOST = 256


@dataclass(frozen=True)
class Workers:
    """Who makes model calls.

    Attributes:
        count: local processes to start, or ``None`` for those of a scheduler.
        scheduler: its address.
        security: file names or PEM texts for TLS: ``ca_file``, ``cert``, ``key``; in no repr.
        client_security: the ``distributed.Security`` of a client that was given.
        timeout: seconds that prompts wait while there is no worker.
        linger: seconds that they are kept when nobody uses them.
        fleet: a fleet that somebody else looks after.
    """

    count: int | None = None
    scheduler: str | None = None
    security: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    client_security: Any = field(default=None, repr=False)
    timeout: float = TIMEOUT_SECONDS
    linger: float = LINGER_SECONDS
    fleet: Any = field(default=None, repr=False)

    def kept(self) -> Workers:
        """Return the same workers, kept for a while between two groups, as a server does."""
        return replace(self, linger=KEPT_SECONDS)


def workers_from(given: Any, *, timeout: float | None = None) -> Workers | None:
    """Return what is meant by a number, a scheduler's address, a mapping or a ``distributed.Client``.

    Args:
        given: the number of local processes (0 is none, as is ``None``), an address such as
            ``tls://host:8786``, ``{"scheduler": address, "security": {"ca_file", "cert", "key"}}``, or a
            client, whose scheduler and security are used.
        timeout: seconds that prompts wait while there is no worker.

    Raises:
        ValueError: it is none of these.
    """
    workers = _from(given)
    return workers if workers is None or timeout is None else replace(workers, timeout=timeout)


def _from(given: Any) -> Workers | None:
    if given is None or isinstance(given, Workers):
        return given
    if isinstance(given, bool):
        raise ValueError("workers must be a number of processes or a scheduler's address")
    if isinstance(given, int):
        if not 0 <= given <= MOST:
            raise ValueError(f"workers must be between 0 and {MOST}, not {given}")
        return Workers(count=given) if given else None
    if isinstance(given, str):
        return Workers(scheduler=_address(given))
    if isinstance(given, Mapping):
        return _from_mapping(given)
    scheduler = getattr(getattr(given, "scheduler", None), "address", None)
    if isinstance(scheduler, str):
        return Workers(scheduler=scheduler, client_security=getattr(given, "security", None))
    raise ValueError("workers must be a number of processes, a scheduler's address or a distributed.Client")


def _from_mapping(given: Mapping[str, Any]) -> Workers:
    unknown = given.keys() - {"scheduler", "security", "timeout"}
    if unknown:
        raise ValueError(f"workers has no setting {min(unknown)!r}; it has scheduler, security and timeout")
    security = given.get("security") or {}
    if not isinstance(security, Mapping) or security.keys() - {"ca_file", "cert", "key"}:
        raise ValueError("security takes the file names ca_file, cert and key")
    timeout = given.get("timeout", TIMEOUT_SECONDS)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
        raise ValueError(f"timeout must be a number of seconds, not {timeout!r}")
    if not isinstance(given.get("scheduler"), str):
        raise ValueError("scheduler must be an address such as tls://host:8786")
    return Workers(
        scheduler=_address(given["scheduler"]),
        security=tuple(sorted((str(name), str(value)) for name, value in security.items())),
        timeout=float(timeout),
    )


def _address(text: str) -> str:
    protocol, separator, rest = text.partition("://")
    if not separator or protocol not in ("tcp", "tls", "ws", "wss", "inproc") or not rest:
        raise ValueError(f"{text!r} is no scheduler's address; it looks like tls://host:8786")
    return text

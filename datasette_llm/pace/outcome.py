"""How a model call ended, as far as it tells anything about when the next one may go."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Trouble(NamedTuple):
    """A call that found nobody to answer it.

    Attributes:
        what: what happened, in words that go on from "no connection to ...: ".
        error: the exception, for those who give up because of it.
        address: whom it was for, if that is known: host and port.
        alone: whether one prompt by itself may have caused it, by what it asks: the connection was made
            and broke, or nothing came over it. Nobody is refused a connection for what he wants to say.
        silent: it ended by a timeout.
        answered: somebody is there, and says that it cannot serve anybody now.
    """

    what: str
    error: Exception
    address: str | None = None
    alone: bool = False
    silent: bool = False
    answered: bool = False


class Outcome(NamedTuple):
    """How a model call ended. (One per call: a tuple is made in a third of a frozen dataclass's time.)

    Attributes:
        kind: ``throttled`` is a refusal by the provider's rate limit.
        retry_after: seconds the provider asked to wait.
        seconds: how long the call took, from the moment ``acquire()`` let it start.
        tokens: what it really used.
        trouble: why nobody answered, if nobody did.
        answered: whether somebody did, as far as is known.
    """

    kind: Literal["ok", "throttled", "transient", "failed", "cancelled"]
    retry_after: float | None = None
    seconds: float = 0.0
    tokens: int | None = None
    trouble: Trouble | None = None
    answered: bool = True

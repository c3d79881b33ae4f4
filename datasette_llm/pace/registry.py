"""The throttles of an event loop: one for each provider key and model."""

from __future__ import annotations

import hashlib
import os
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakSet

from anyio.lowlevel import RunVar

from ..backends.loops import loop_end
from .throttle import Throttle

if TYPE_CHECKING:
    from .policy import PromptSettings


class Throttles(dict[tuple[bytes, str], Throttle]):
    """Those of the running event loop.

    Attributes:
        is_over: whether the event loop has ended; its clock may not be read any more then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_over = loop_end()

    __hash__ = object.__hash__  # type: ignore[assignment]  # Each is one of its own.

    def __eq__(self, other: object) -> bool:
        return self is other


_throttles: RunVar[Throttles] = RunVar("datasette_llm_throttles")
#: Those of all event loops that there are, for whoever looks at them from another thread.
_everywhere: WeakSet[Throttles] = WeakSet()
_lock = Lock()

#: Makes the registry's digests of keys useless outside of this process.
_SALT = os.urandom(16)

#: Throttles an event loop keeps; beyond that, the ones that nobody uses are forgotten, oldest first.
MOST_THROTTLES = 256


def get_throttle(
    key: str | None, model_id: str, settings: PromptSettings, key_name: str | None = None
) -> Throttle:
    """Return this event loop's throttle for a provider key and a model; the key itself is not kept.

    Args:
        key: the key.
        model_id: the model.
        settings: of its prompts; those of whoever asks first count.
        key_name: where the key comes from, in words.
    """
    try:
        throttles = _throttles.get()
    except LookupError:
        throttles = Throttles()
        _throttles.set(throttles)
        with _lock:
            _everywhere.add(throttles)
    digest = hashlib.blake2b((key or "").encode(), key=_SALT, digest_size=16).digest()
    identity = (digest, model_id)
    throttle = throttles.pop(identity, None)
    if throttle is None:
        throttle = Throttle(model_id, settings, key_name)
        for old in [each for each, old in throttles.items() if not (old.in_use or old.waiting)]:
            if len(throttles) < MOST_THROTTLES:
                break
            del throttles[old]
    # Put back at the end: the order is that of last use.
    throttles[identity] = throttle
    return throttle


def throttles_here() -> list[Throttle]:
    """Return this event loop's throttles, the one that was used last at the end."""
    return list(_throttles.get({}).values())


def throttles_everywhere() -> list[Throttle]:
    """Return the throttles of all event loops that run in this process; for any thread."""
    with _lock:
        loops = list(_everywhere)
    return [throttle for loop in loops if not loop.is_over() for throttle in list(loop.values())]

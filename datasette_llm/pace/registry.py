"""The throttles of an event loop: one for each provider key and model."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from anyio.lowlevel import RunVar

from .throttle import Throttle

if TYPE_CHECKING:
    from .policy import PromptSettings

_throttles: RunVar[dict[tuple[bytes, str], Throttle]] = RunVar("datasette_llm_throttles")

#: Makes the registry's digests of keys useless outside of this process.
_SALT = os.urandom(16)

#: Throttles an event loop keeps; beyond that, the ones that nobody uses are forgotten, oldest first.
MOST_THROTTLES = 256


def get_throttle(key: str | None, model_id: str, settings: PromptSettings) -> Throttle:
    """Return this event loop's throttle for a provider key and a model; the key itself is not kept."""
    try:
        throttles = _throttles.get()
    except LookupError:
        throttles = {}
        _throttles.set(throttles)
    digest = hashlib.blake2b((key or "").encode(), key=_SALT, digest_size=16).digest()
    identity = (digest, model_id)
    throttle = throttles.pop(identity, None)
    if throttle is None:
        throttle = Throttle(model_id, settings)
        for old in [each for each, old in throttles.items() if not (old.in_use or old.waiting)]:
            if len(throttles) < MOST_THROTTLES:
                break
            del throttles[old]
    # Put back at the end: the order is that of last use.
    throttles[identity] = throttle
    return throttle

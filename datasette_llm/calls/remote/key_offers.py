"""Which key a worker sends: its own of that name, if that is the same key; else one that it is told.

A worker is told a key's names and a fingerprint of it. The fingerprint is salted, and slow to compute: who
reads it learns no key from it, and nobody is billed for a key that only has the same name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llm

from ...secrecy import keep_secret

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: scrypt's cost: 5 ms.
_COST = 2**11


class KeyOffer:
    """A key, as workers are told of it.

    Attributes:
        reference: what calls name it by.
        value: the key; in no repr.
    """

    def __init__(self, names: Iterable[str], value: str) -> None:
        self.reference = secrets.token_hex(8)
        self.value = value
        self._names = [name for name in names if name]
        self._salt = secrets.token_hex(16)
        self._print: str | None = None

    def __repr__(self) -> str:
        return f"<KeyOffer {self._names}>"

    def told(self) -> dict[str, Any]:
        """Return what every worker may know."""
        if self._print is None:
            self._print = _fingerprint(self.value, self._salt)
        return {"names": self._names, "salt": self._salt, "print": self._print}


@lru_cache(maxsize=64)
def _fingerprint(value: str, salt: str) -> str:
    return hashlib.scrypt(value.encode(), salt=bytes.fromhex(salt), n=_COST, r=8, p=1).hex()


def found(told: Mapping[str, Any]) -> str | None:
    """Return the worker's own key, if it has the one that is offered under one of its names."""
    for name in told["names"]:
        for value in (os.environ.get(name), _of_llm(name)):
            if value and _fingerprint(value, told["salt"]) == told["print"]:
                keep_secret(value)
                return value
    return None


def _of_llm(name: str) -> str | None:
    try:
        value = llm.get_key(None, name)
    except Exception:  # a keys.json that cannot be read
        return None
    return value if isinstance(value, str) else None

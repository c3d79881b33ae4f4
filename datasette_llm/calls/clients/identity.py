"""What makes two clients the same: the arguments they are made with, and what else they read."""

from __future__ import annotations

import enum
import functools
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Hashable

_PLAIN = (str, bytes, int, float, bool, type(None), enum.Enum)

#: Values of these packages that hold nothing but settings, such as a timeout, an address or headers.
_SETTINGS = frozenset({"Timeout", "Limits", "URL", "Headers", "QueryParams", "BasicAuth", "NotGiven", "Omit"})

_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+")


class CannotShareError(Exception):
    """A client that was asked for with these arguments can be nobody else's."""


def frozen(value: Any) -> Hashable:
    """Return what compares equal for equal settings.

    Raises:
        CannotShareError: the value is code, a connection, or something else that is not known.
    """
    if isinstance(value, _PLAIN):
        # True is no 1 here.
        return type(value), value
    if isinstance(value, Mapping):
        return "mapping", frozenset((name, frozen(entry)) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return "list", tuple(frozen(entry) for entry in value)
    kind = type(value)
    if kind.__name__ in _SETTINGS and not callable(value):
        return kind, frozen(_state(value))
    raise CannotShareError(f"it was given a {kind.__name__}")


def _state(value: Any) -> dict[str, Any]:
    multi_items = getattr(value, "multi_items", None)
    if multi_items is not None:
        return {"items": [list(item) for item in multi_items()]}
    if hasattr(value, "raw_host"):
        return {"url": str(value)}
    return dict(getattr(value, "__dict__", {}))


def environment_of(kind: type) -> tuple[str | None, ...]:
    """Return the values of the environment variables that a client's constructor reads."""
    return tuple([os.environ.get(name) for name in _variables(kind)])


@functools.lru_cache(maxsize=64)
def _variables(kind: type) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for base in kind.__mro__:
        code = getattr(vars(base).get("__init__"), "__code__", None)
        for constant in getattr(code, "co_consts", ()):
            if isinstance(constant, str) and _VARIABLE.fullmatch(constant):
                found[constant] = None
    return tuple(found)

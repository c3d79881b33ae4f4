"""The large parts of a request, past an SDK's walk through them.

SDKs that Stainless generates compare each part of a request with its type, to turn files, dates and models
of pydantic into JSON: an eighth of the CPU that a prompt takes. What is plain JSON already gains nothing by
it, and goes into ``extra_body`` instead, which every method of theirs has and which they merge into the body
as it is.
"""

from __future__ import annotations

from typing import Any

#: What a conversation, and with it a request, consists of; not what SDKs look into themselves.
_LARGE = ("messages", "input", "tools", "functions")

_SCALARS = frozenset({str, int, float, bool, type(None)})


def past_the_walk(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call that give the same request, with less work.

    Args:
        kwargs: those of a method that creates something; they are not changed.
    """
    large = {name: kwargs[name] for name in _LARGE if is_plain(kwargs.get(name))}
    if not large:
        return kwargs
    extra = kwargs.get("extra_body")
    if extra is not None and not isinstance(extra, dict):
        return kwargs
    # The names stay: some are required, and keys keep their place in the body.
    emptied = dict.fromkeys(large, ())
    # What a model puts into the body itself comes last, as it would have.
    return {**kwargs, **emptied, "extra_body": {**large, **(extra or {})}}


def is_plain(value: Any) -> bool:
    """Say whether a list is nothing but what JSON has, all through."""
    return type(value) is list and _plain(value)


def _plain(value: Any) -> bool:
    kind = type(value)
    if kind in _SCALARS:
        return True
    if kind is list:
        return all(map(_plain, value))
    if kind is dict:
        return all(type(name) is str for name in value) and all(map(_plain, value.values()))
    return False

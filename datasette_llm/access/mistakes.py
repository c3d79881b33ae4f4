"""What is wrong with a configuration: one line a mistake, with its path and what would be right."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from .sections import (
    BOUNDS,
    NUMBER,
    ROOT,
    Bounds,
    ModelPrice,
    ModelReference,
    PluginSettings,
    PurposeSettings,
    RateLimits,
    Retries,
    Section,
)
from .values import kind_of

if TYPE_CHECKING:
    from collections.abc import Mapping


# How a section is found on the way down a path, to suggest its nearest key.
_SECTIONS: Mapping[str, type[Section]] = {
    "default_model": ModelReference,
    "model": ModelReference,
    "models": ModelReference,
    "purposes": PurposeSettings,
    "concurrency": Bounds,
    "retries": Retries,
    "rate_limits": RateLimits,
    "prices": ModelPrice,
}


def describe(details: Mapping[str, Any]) -> str:
    """Say where a mistake is and what would be right."""
    path = [part for part in details["loc"] if part not in (NUMBER, BOUNDS, "[key]")]
    kind, context = details["type"], details.get("ctx") or {}
    value = details.get("input")
    if kind == "extra_forbidden":
        problem = _unknown_key(path)
    elif kind == "missing":
        problem = "is missing"
    elif kind == "datasette_llm":
        problem = context["message"]
    elif kind == "literal_error":
        problem = f"must be {context['expected']}"
    elif kind == "greater_than_equal":
        problem = f"must be at least {context['ge']}"
    elif kind == "greater_than":
        problem = f"must be more than {context['gt']:g}"
    elif kind == "int_from_float":
        problem = "must be a whole number"
    elif kind == "finite_number":
        problem = "must be a finite number"
    else:
        expected = _EXPECTED.get(kind, "something else")
        if path and path[-1] in _AMOUNTS:
            expected = expected.replace("seconds", "dollars")
        problem = f"must be {expected}, not {kind_of(value)}"
    return f"{'.'.join([ROOT, *map(str, path)])}: {problem}"


def _unknown_key(path: list[Any]) -> str:
    section: type[Section] = PluginSettings
    named = False  # whether the next part is a name that the configuration chose
    for part in path[:-1]:
        if not named and part in section.model_fields:
            section = _SECTIONS.get(str(part), section)
        named = part in ("purposes", "rate_limits", "prices") and not named
    known = list(section.model_fields)
    near = difflib.get_close_matches(str(path[-1]), known, n=1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; the keys here are {', '.join(known)}"


_AMOUNTS = {*ModelPrice.model_fields, "max_cost", "confirm_above"}

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number of seconds",
    "float_parsing": "a number of seconds",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}

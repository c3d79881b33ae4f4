"""Who a worker is, and whether its model is the one that was chosen: found out before a row is sent."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from typing import TYPE_CHECKING, Any

import llm

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Changes with what crosses between the two.
WIRE = 1
#: Where a model's answers come from; what else it holds may be a secret.
_ADDRESSES = ("model_name", "api_base", "api_type", "api_version", "api_engine")


def of_this_process() -> dict[str, Any]:
    """Return what makes two processes fit together, and where this one is."""
    return {
        "wire": WIRE,
        "llm": version("llm"),
        "python": platform.python_version(),
        "pid": os.getpid(),
        "host": platform.node(),
    }


def unfit(hello: Mapping[str, Any]) -> str | None:
    """Say why a worker that introduced itself so can be given nothing; ``None`` if it can."""
    own = of_this_process()
    if hello.get("wire") != WIRE:
        return "it has another version of datasette-llm, which speaks otherwise"
    if hello.get("llm") != own["llm"]:
        return f"it has llm {hello.get('llm')}, and here is {own['llm']}"
    return None


def of_model(model: Any) -> dict[str, Any]:
    """Return what a worker's model must be alike in."""
    kind = type(model)
    return {
        "id": model.model_id,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "plugin": _distribution(kind.__module__.partition(".")[0]),
        "address": {name: value for name in _ADDRESSES if (value := getattr(model, name, None)) is not None},
    }


def difference(wanted: Mapping[str, Any]) -> str | None:
    """Say what is wrong with this process's model of that id; ``None`` if nothing is."""
    name = wanted["id"]
    try:
        model = llm.get_async_model(name)
    except llm.UnknownModelError:
        plugin = wanted["plugin"]
        needs = f", which comes with {plugin[0]} {plugin[1]}" if plugin and plugin[0] != "llm" else ""
        return f"it has no model {name}{needs}"
    own = of_model(model)
    if own["plugin"] != wanted["plugin"] and own["plugin"] and wanted["plugin"]:
        return f"its {name} is of {' '.join(own['plugin'])}, and here of {' '.join(wanted['plugin'])}"
    if own["class"] != wanted["class"]:
        return f"its {name} is a {own['class']}, and here a {wanted['class']}"
    if own["address"] != wanted["address"]:
        return f"its {name} asks another address or for another model"
    return None


@cache
def _distribution(top: str) -> list[str] | None:
    for name in packages_distributions().get(top, ()):
        try:
            return [name, version(name)]
        except PackageNotFoundError:
            continue
    return None

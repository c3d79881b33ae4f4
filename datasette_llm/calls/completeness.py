"""An answer that only looks complete: a stream that just ended, taken by llm's plugins for all there is."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from ..responses import finish
from .failures import IncompleteAnswer

if TYPE_CHECKING:
    import llm


def check_complete(response: llm.AsyncResponse) -> None:
    """Make sure that an answer which came in pieces did not end half-way.

    llm and its plugins take a stream that just ends for a complete answer. The providers' last words are why
    it ended: without these, something is missing.

    Raises:
        IncompleteAnswer: if so. Other models' responses are never doubted.
    """
    doubted = _says_the_end(type(response.model))
    if not (response.stream or doubted == "always"):
        return
    found = finish.said(response)
    # Where nothing was kept: these keep something at the end of a stream, and from nothing else. Whatever the
    # model, a stream that was listened to has no reason only if it ended without saying that it was done.
    silent = doubted is not None if found is None else found.reason is None
    if silent and (doubted is not None or finish.was_noted(response)):
        raise IncompleteAnswer("the answer's stream ended before the provider said that it was complete")


#: Plugins whose providers say at the end of every answer why it ended: ``always`` those that ask for a stream
#: whatever they are asked for. With the first version that keeps it: older ones keep nothing of a stream.
_SAY_THE_END: dict[str, tuple[Literal["always", "streamed"], tuple[int, int]]] = {
    "llm_anthropic": ("always", (0, 11)),
    "llm_gemini": ("always", (0, 4)),
    "llm_mistral": ("streamed", (0, 16)),
    "llm_ollama": ("streamed", (0, 17)),
}


@cache
def _says_the_end(model: type[Any]) -> Literal["always", "streamed"] | None:
    plugin = model.__module__.partition(".")[0]
    if plugin in _SAY_THE_END:
        when, since = _SAY_THE_END[plugin]
        installed = _version(plugin)
        return when if installed is None or installed >= since else None
    from llm.default_plugins import openai_models

    # A subclass with its own execute() may fill response_json in its own way.
    families = (openai_models.AsyncChat, getattr(openai_models, "AsyncResponses", None))
    for family in families:
        if family is not None and issubclass(model, family) and model.execute is family.execute:
            return "streamed"
    return None


def _version(plugin: str) -> tuple[int, ...] | None:
    """The first two numbers of a plugin's version, if that is known."""
    try:
        numbers = metadata.version(plugin.replace("_", "-")).split(".")[:2]
        return tuple(int(number) for number in numbers)
    except (metadata.PackageNotFoundError, ValueError):
        return None

"""What prompts are for: the purposes that plugins register, for pages and commands that list them."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from ..hookspecs import Purpose, plugin_manager

if TYPE_CHECKING:
    from datasette.app import Datasette

logger = logging.getLogger("datasette_llm")


#: What our own prompts are for, in the command and in the pages of datasette-enrichments.
ENRICHMENTS = Purpose("enrichments", "Fill columns of a table with answers to a prompt about each row")


def listed_purposes(datasette: Datasette) -> list[Purpose]:
    """Return every registered purpose, and our own, which the command has whatever is installed."""
    registered = get_purposes(datasette)
    described = any(purpose.name == ENRICHMENTS.name for purpose in registered)
    return registered if described else [*registered, ENRICHMENTS]


def get_purposes(datasette: Datasette) -> list[Purpose]:
    """Return every registered purpose; of two with the same name the first one wins.

    A plugin whose answer makes no sense is left out, with a warning that says what it answered.
    """
    purposes: dict[str, Purpose] = {}
    for answer in plugin_manager().hook.register_llm_purposes(datasette=datasette):
        for purpose in _as_list(answer):
            name = getattr(purpose, "name", None)
            if not isinstance(name, str) or not name:
                _warn("an entry", purpose)
                continue
            purposes.setdefault(name, purpose)
    return list(purposes.values())


def _as_list(answer: Any) -> list[Any]:
    """Accept what plugins are documented to return, and one Purpose that forgot its list."""
    if answer is None:
        return []
    if isinstance(answer, Purpose):
        return [answer]
    if isinstance(answer, (list, tuple, set, frozenset)) or inspect.isgenerator(answer):
        return list(answer)
    if inspect.iscoroutine(answer):
        answer.close()
    _warn("an answer", answer)
    return []


def _warn(what: str, value: Any) -> None:
    logger.warning(
        "register_llm_purposes: left out %s of type %s: the hook returns a list of Purpose and is not async",
        what,
        type(value).__name__,
    )

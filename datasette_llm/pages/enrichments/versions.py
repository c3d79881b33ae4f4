"""A datasette-enrichments that does not work with Datasette 1.0, and what its pages say instead.

An unpinned install gives one: the version that works is a pre-release.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

from datasette.views.base import DatasetteError

#: The first one that asks Datasette 1.0 for permissions the way that it answers.
NEEDED = (0, 6)


def outdated() -> str | None:
    """Return what is wrong with the installed version, or ``None``."""
    installed = version("datasette-enrichments")
    if tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) >= NEEDED:
        return None
    return (
        f"datasette-enrichments {installed} does not work with Datasette 1.0: "
        "datasette install 'datasette-llm[enrichments]' gets the version that does"
    )


def routes(problem: str) -> list[tuple[str, Any]]:
    """Return routes in front of its pages that say so, where its own would fail."""

    async def refuse() -> None:
        raise DatasetteError(problem, title="Enrichments are not available", status=501)

    return [(r"^/-/enrich/", refuse)]

"""Jobs in the browser: start one, watch it, have it pause, go on, and see what it came to.

A job here is `enrich.EnrichJob` with another display: `live` runs it as a background task of the server,
`form` is what a person fills in, `filters` makes the rows of a table's page the rows of a job, `story` tells
of a run, live or on record, and `routes` says who may see and do what.
"""

from __future__ import annotations

from typing import Any

from ...access.purposes import ENRICHMENTS

__all__ = ["PURPOSE", "is_possible"]

#: What the prompts are for, as configuration and hooks know it: the command's, so that they share it.
PURPOSE = ENRICHMENTS.name


def is_possible(datasette: Any) -> bool:
    """Say whether this Datasette can own a job: since 1.0a40."""
    return hasattr(datasette, "add_background_task")

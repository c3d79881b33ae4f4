"""Jobs in the browser: start one, watch it, have it pause, go on, and see what it came to.

A job here is `enrich.EnrichJob` with another display: `live` runs it as a task of the server (`owner`),
`form` is what a person fills in, `filters` makes the rows of a table's page the rows of a job, `story` tells
of a run, live or on record, and `routes` says who may see and do what.
"""

from __future__ import annotations

from ...access.purposes import ENRICHMENTS
from .owner import is_possible

__all__ = ["PURPOSE", "is_possible"]

#: What the prompts are for, as configuration and hooks know it: the command's, so that they share it.
PURPOSE = ENRICHMENTS.name

"""Bulk enrichment in Datasette's own pages, where datasette-enrichments is installed.

``form`` is what a person fills in, ``enrichment`` runs the job a batch at a time, ``routes`` says who
may see and start it. Nothing outside of this package imports datasette-enrichments, and nothing in it
is imported unless that is there.
"""

from __future__ import annotations

import sys

from ...hookspecs import plugin_manager

__all__ = ["PURPOSE", "SLUG", "is_possible"]

#: What our enrichment is called in addresses and in the tables of datasette-enrichments.
SLUG = "prompt-rows"

#: What the prompts are for, as configuration and hooks know it: the command's, so that they share it.
PURPOSE = "enrichments"


def is_possible() -> bool:
    """Say whether datasette-enrichments is one of the plugins that Datasette has loaded."""
    module = sys.modules.get("datasette_enrichments")
    return module is not None and plugin_manager().is_registered(module)

"""``datasette llm``: enrich a table, see which models, purposes and runs there are, try it out.

One module for each command or two. This room is loaded by every ``datasette``, so what a command needs is
imported inside of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .demo import demo_command
from .enrich import enrich_command
from .group import llm_group
from .listing import models_command, purposes_command, runs_command

if TYPE_CHECKING:
    import click

__all__ = ["llm_group", "register"]

for _command in (enrich_command, models_command, purposes_command, runs_command, demo_command):
    llm_group.add_command(_command)


def register(cli: click.Group) -> None:
    """Add the group ``llm`` to Datasette's commands."""
    cli.add_command(llm_group)

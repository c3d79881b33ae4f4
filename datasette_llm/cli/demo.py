"""``datasette llm demo``: the first thing to run."""

from __future__ import annotations

from functools import partial

import click

from .options import InputProblem
from .running import make_datasette, run_job


@click.command(name="demo")
@click.argument("path", default="demo.db", type=click.Path(dir_okay=False))
@click.option("--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True)
def demo_command(path: str, backend: str) -> None:
    """Build a small table at PATH and enrich it with a model that needs no key.

    A second run finds nothing left to do. Delete the file to start over.
    """
    from ..enrich import demo
    from ..enrich.command import exit_code
    from ..enrich.errors import EnrichInputError
    from ..enrich.telling.display import open_display

    try:
        plan = demo.prepare(path)
    except EnrichInputError as error:
        raise InputProblem(str(error)) from None
    click.echo(plan.introduction)
    display = open_display(quiet=False)
    with demo.without_policies() as left_out:
        if left_out:
            click.echo(f"Left out, since this model has no price and no key: {', '.join(left_out)}\n")
        report = run_job(partial(make_datasette, [path], None, None), plan.spec, display, backend)
    click.echo(report.summary())
    click.echo(demo.closing_words(plan))
    raise SystemExit(exit_code(report))

"""``datasette llm models``, ``purposes`` and ``runs``: what there is."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from .options import CONFIG_OPTION, INTERNAL_OPTION, InputProblem
from .running import check_header, make_datasette, with_datasette


@click.command(name="models")
@click.option("--purpose", help="Models for this purpose.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@CONFIG_OPTION
@INTERNAL_OPTION
def models_command(purpose: str | None, as_json: bool, config: str | None, internal: str | None) -> None:
    """List the models that can be used: configured, allowed, and with a key.

    With --json it says of each whether it takes schemas and tools, and whether its prompts share HTTP
    clients ("shared_clients"): one that does not makes a client, and a connection, for each prompt.
    """
    from ..calls.clients.adoption import shares_clients
    from ..errors import ModelNotFoundError
    from ..facade import LLM

    async def models(datasette: Any) -> list[dict[str, Any]]:
        facade = LLM(datasette)
        try:
            default = (await facade.model(purpose=purpose)).model_id
        except ModelNotFoundError:
            default = None
        return [
            {
                "model_id": model.model_id,
                "default": model.model_id == default,
                "schemas": bool(getattr(model, "supports_schema", False)),
                "tools": bool(getattr(model, "supports_tools", False)),
                "shared_clients": shares_clients(model),
            }
            for model in await facade.models(purpose=purpose)
        ]

    found = with_datasette(partial(make_datasette, [], config, internal), models)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for model in found:
        click.echo(model["model_id"] + ("  (default)" if model["default"] else ""))
    if not found:
        click.echo(
            "No model can be used. Store a key with `llm keys set openai`, install a plugin such as "
            "llm-anthropic, or see what the configuration allows.",
            err=True,
        )


@click.command(name="purposes")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@CONFIG_OPTION
@INTERNAL_OPTION
def purposes_command(as_json: bool, config: str | None, internal: str | None) -> None:
    """List what prompts are run for, and the default model of each purpose."""
    from ..access.purposes import listed_purposes
    from ..errors import ModelNotFoundError
    from ..facade import LLM

    async def purposes(datasette: Any) -> list[dict[str, Any]]:
        found = []
        for purpose in listed_purposes(datasette):
            try:
                model: str | None = await LLM(datasette)._resolve_model_id(purpose=purpose.name)
            except ModelNotFoundError:
                model = None
            found.append({"name": purpose.name, "description": purpose.description, "model": model})
        return found

    found = with_datasette(partial(make_datasette, [], config, internal), purposes)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for purpose in found:
        model = purpose["model"] or "no default model"
        click.echo(
            f"{purpose['name']}  ({model})"
            + (f"  {purpose['description']}" if purpose["description"] else "")
        )


@click.command(name="runs")
@click.argument("database", type=click.Path(exists=True, dir_okay=False))
@click.argument("table", required=False)
@click.option("--run", type=int, metavar="N", help="Show one run: what was asked, and what failed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of runs, or an object for one.")
def runs_command(database: str, table: str | None, run: int | None, as_json: bool) -> None:
    """List the runs of `datasette llm enrich` on a database, the latest first, or show one.

    \b
      datasette llm runs data.db
      datasette llm runs data.db articles
      datasette llm runs data.db --run 7
    """
    from ..enrich.command import list_runs_of
    from ..enrich.telling.history import one_run, run_line

    check_header(database)
    found = list_runs_of(database, table=table, run=run)
    if run is not None and not found:
        raise InputProblem(f"No run {run} is on record in {database}: leave --run out for a list")
    if as_json:
        click.echo(json.dumps(found[0] if run is not None else found, indent=2, ensure_ascii=False))
    elif run is not None:
        click.echo(one_run(found[0], database))
    elif found:
        for each in found:
            click.echo(run_line(each))
    else:
        of = f" of {table}" if table else ""
        click.echo(f"No run{of} is on record in {database}.", err=True)

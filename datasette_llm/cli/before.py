"""What comes before a run: a few rows tried, or what it would take, and a question where that is much."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .options import InputProblem
from .running import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..enrich.spec import JobSpec


def show_trial(
    make: Callable[[], Any],
    spec: JobSpec,
    backend: str,
    *,
    number: int,
    models: Sequence[str],
    command: str,
    as_json: bool,
) -> int:
    """Try a few rows and show what came of it.

    Returns:
        the exit code: 0 if any row was answered, or none is waiting.
    """
    from ..enrich.trial import in_words, try_rows

    trial = _with_job(make, spec, backend, partial(try_rows, number=number, models=models))
    if as_json:
        click.echo(json.dumps({**trial.as_dict(), "command": command}, indent=2, ensure_ascii=False))
    else:
        click.echo(in_words(trial, shutil.get_terminal_size().columns))
        click.echo(f"Nothing was written. Run it with:\n  {command}")
    return int(bool(trial.answers) and all(answer.error is not None for answer in trial.answers))


def show_estimate(make: Callable[[], Any], spec: JobSpec, backend: str, *, as_json: bool) -> None:
    """Show what a job would take; nothing is sent."""
    from ..enrich.estimate import estimate_job

    found = _with_job(make, spec, backend, estimate_job)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    click.echo(_wrapped(found.line()) if sys.stdout.isatty() else found.line())
    if not found.rows:
        return
    click.echo(f"Told from {_BASES[found.basis]}. Rows that ask the same are asked once. Nothing was sent.")


_BASES = {
    "characters": "the characters of the prompts, four to a token; --try N tells it better",
    "earlier runs": "what earlier runs of this prompt used",
}


def asking_first(
    *, yes: bool, quiet: bool
) -> Callable[[Any, JobSpec], Awaitable[Callable[[], Awaitable[str]] | None]]:
    """Return what a run begins with: on a terminal the estimate, and a question if that is much.

    Where nothing has to be asked, nobody waits for the estimate: what is returned tells it beside the run.
    """

    async def before(datasette: Any, spec: JobSpec) -> Callable[[], Awaitable[str]] | None:
        from ..access.settings import get_settings
        from ..enrich.estimate import estimate_job

        limit = get_settings(datasette).money(spec.purpose, "confirm_above")
        shown = sys.stderr.isatty() and not quiet
        if spec.dry_run or not (shown or (limit is not None and not yes)):
            return None
        if limit is None or yes:

            async def tell() -> str:
                return _wrapped((await estimate_job(datasette, spec)).line())

            return tell
        found = await estimate_job(datasette, spec)
        if not found.rows:
            return None
        if shown:
            click.echo(_wrapped(found.line()), err=True)
        if found.due is not None and found.due <= limit:
            return None
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            if found.due is None:
                raise InputProblem(
                    f"{found.line()}: nobody knows whether that is above confirm_above (${limit:g}), "
                    "and nobody can be asked: --yes runs it all the same"
                )
            raise InputProblem(
                f"{found.line()}: above confirm_above (${limit:g}), and nobody can be asked: "
                "--yes runs it all the same"
            )
        if not click.confirm("Go on?", err=True):
            raise SystemExit(2)
        return None

    return before


def _wrapped(line: str) -> str:
    return textwrap.fill(line, shutil.get_terminal_size().columns - 1, subsequent_indent="    ")


def _with_job(
    make: Callable[[], Any],
    spec: JobSpec,
    backend: str,
    function: Callable[[Any, JobSpec], Awaitable[Any]],
) -> Any:
    from ..enrich.command import for_the_one_database, started_datasette

    async def main() -> Any:
        async with started_datasette(make, lock_timeout=spec.lock_timeout) as datasette:
            return await function(datasette, await for_the_one_database(datasette, spec))

    return run(main, backend)

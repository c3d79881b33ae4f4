"""Running a command's work: a Datasette around it, an event loop, errors as messages with an exit code."""

from __future__ import annotations

import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from .options import InputProblem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..enrich.spec import JobSpec
    from ..enrich.telling.report import EnrichReport

_SQLITE_HEADER = b"SQLite format 3\0"


def run_job(
    make_datasette: Callable[[], Any], spec: JobSpec, display: Any, backend: str, before: Any = None
) -> EnrichReport:
    """Run a job to its report; what stops it becomes a message and an exit code."""
    from ..enrich.command import run_job
    from ..enrich.errors import EnrichError

    try:
        report: EnrichReport = run(partial(run_job, make_datasette, spec, display, before), backend)
        return report
    except EnrichError as error:
        raise click.ClickException(str(error)) from error
    except (click.ClickException, SystemExit):
        raise
    except Exception as error:  # Of a plugin that takes part, say: not a row's, and not foreseen here.
        *_, frame = traceback.extract_tb(error.__traceback__)
        raise click.ClickException(
            f"{type(error).__name__}: {error}\n(raised in {frame.filename}, line {frame.lineno}; "
            "what was answered before is written, and the same command goes on from there)"
        ) from error
    finally:
        display.close()


def with_datasette(make: Callable[[], Any], function: Callable[[Any], Awaitable[Any]]) -> Any:
    from ..enrich.command import started_datasette

    async def main() -> Any:
        async with started_datasette(make) as datasette:
            return await function(datasette)

    return run(main, "asyncio")


def run(main: Callable[[], Awaitable[Any]], backend: str) -> Any:
    import anyio
    from datasette.utils import StartupError

    from ..enrich.errors import EnrichInputError
    from ..errors import ModelNotFoundError

    if backend == "trio":
        try:
            import trio_asyncio  # noqa: F401
        except ImportError:
            raise InputProblem(
                "--backend trio needs two more packages: pip install 'datasette-llm[trio]'"
            ) from None
    try:
        return anyio.run(main, backend=backend)
    except (EnrichInputError, ModelNotFoundError, StartupError) as error:
        raise InputProblem(str(error)) from error
    except KeyboardInterrupt:
        click.echo("Interrupted before anything was sent.", err=True)
        raise SystemExit(130) from None


def make_datasette(files: list[str], config: str | None, internal: str | None) -> Any:
    from datasette.app import Datasette
    from datasette.utils import BadMetadataError, parse_metadata

    settings: Any = None
    if config is not None:
        try:
            with open(config, encoding="utf-8") as file:
                settings = parse_metadata(file.read())
        except (BadMetadataError, UnicodeDecodeError) as error:
            raise InputProblem(f"{config} is no configuration file: {error}") from None
        if settings is not None and not isinstance(settings, dict):
            raise InputProblem(f"{config} is no configuration file: it does not hold a mapping")
    return Datasette(files, config=settings, internal=internal)


def check_header(path: str) -> None:
    """Refuse a file that is no database before Datasette opens it, which would say so in its own way too."""
    with open(path, "rb") as file:
        header = file.read(len(_SQLITE_HEADER))
    if header not in (b"", _SQLITE_HEADER):
        raise InputProblem(f"{path} is no SQLite database")

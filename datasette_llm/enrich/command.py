"""Running a job for a person at a terminal: Datasette around it, signals, exit codes, how to go on.

The first Ctrl-C (or SIGTERM) stops the job: no more rows, a few seconds for the prompts in flight,
which are paid for, and everything that was answered is written. The second one ends the process at
once; what the last half second brought is then lost.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from datasette_llm._compat import BaseExceptionGroup
from datasette_llm.access.starting import warn
from datasette_llm.backends.datasette_side import call, open_side
from datasette_llm.errors import ModelNotFoundError
from datasette_llm.pace.descriptors import raise_limit

from .database import LOCKED_SECONDS, recover
from .errors import EnrichError, EnrichInputError, raise_bare
from .job import EnrichJob
from .record.runs import list_runs
from .telling.display import warnings_through
from .telling.invocation import datasette_command
from .telling.stopped import REFUSED_REASONS
from .telling.words import counted
from .ways import way_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from .spec import JobSpec
    from .telling.display import Display
    from .telling.report import EnrichReport

# How long prompts in flight may still take after the first Ctrl-C: most answers arrive within it, and
# `docker stop` waits ten seconds before it kills.
GRACE_SECONDS = 5.0
CLOSE_SECONDS = 10.0

EXIT_FAILED_ROWS = 1
EXIT_USAGE = 2
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


@asynccontextmanager
async def started_datasette(
    make: Callable[[], Any], *, lock_timeout: float = LOCKED_SECONDS
) -> AsyncIterator[Any]:
    """Start a Datasette without a server, and shut it down again.

    Args:
        lock_timeout: how many seconds a locked database is waited for.
    """
    async with open_side():
        datasette = await call(make)
        try:
            # Starting reads the schemas, on connections that may not write.
            for database in datasette.databases.values():
                if database.path is not None and database.is_mutable:
                    await recover(database, patience_seconds=lock_timeout)
            await call(datasette.invoke_startup)
            if hasattr(datasette, "add_background_task"):  # That of our own startup runs in servers.
                await call(warn, datasette)
            yield datasette
        finally:
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                if hasattr(datasette, "invoke_shutdown"):  # Datasette 1.0a40 and later
                    await call(datasette.invoke_shutdown)
                if hasattr(datasette, "close"):
                    datasette.close()


async def run_job(
    make_datasette: Callable[[], Any],
    spec: JobSpec,
    display: Display,
    before: Callable[[Any, JobSpec], Awaitable[Callable[[], Awaitable[str]] | None]] | None = None,
) -> EnrichReport:
    """Run a job on the one database of a Datasette, under the signals of a terminal.

    Args:
        before: called with the Datasette and the job before it runs. What it returns is called while the job
            runs, and its answer shown; if the job is done before that, it is not.
    """
    raise_limit()
    async with started_datasette(make_datasette, lock_timeout=spec.lock_timeout) as datasette:
        spec = await for_the_one_database(datasette, spec)
        tell = await before(datasette, spec) if before is not None else None
        job = EnrichJob(datasette, spec, on_progress=display.update, way=way_of(datasette, spec))
        try:
            async with anyio.create_task_group() as tasks:
                await tasks.start(_obey_signals, job, display)
                if tell is not None:
                    tasks.start_soon(_tell, tell, display)
                with warnings_through(display):
                    report = await job.run()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise_bare(group)
    return report


async def _tell(tell: Callable[[], Awaitable[str]], display: Display) -> None:
    # What is wrong with the job, it says itself; a database that cannot be read, too.
    with suppress(EnrichError, ModelNotFoundError):
        display.note(await tell())


async def for_the_one_database(datasette: Any, spec: JobSpec) -> JobSpec:
    """Return a job for the one database of a Datasette, with llm's default model where nothing names one.

    Raises:
        ModelNotFoundError: llm has no default model either.
    """
    import llm

    from datasette_llm.facade import LLM

    spec = replace(spec, database=next(iter(datasette.databases)))
    if spec.model is not None:
        return spec
    try:
        await LLM(datasette)._resolve_model_id(None, spec.purpose, spec.actor)
    except ModelNotFoundError as error:
        model = llm.get_default_model(default=None)
        if model is None:
            raise ModelNotFoundError(f"{error}, give one with -m, or choose: llm models default ID") from None
        return replace(spec, model=model)
    return spec


async def _obey_signals(job: EnrichJob, display: Display, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    if sys.platform == "win32":  # pragma: no cover - the tests run on Unix
        task_status.started()  # There asyncio has no signal handlers: Ctrl-C cancels the job.
        return
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        asked = False
        async for number in signals:
            if asked:
                display.close()
                sys.stderr.flush()
                os._exit(128 + number)
            asked = True
            job.stop("SIGINT" if number == signal.SIGINT else "SIGTERM", grace_seconds=GRACE_SECONDS)
            running = job.in_flight
            display.note(
                f"Stopping: up to {GRACE_SECONDS:.0f} s for {counted(running, 'prompt')} in flight, then the "
                "last answers are written. Once more to stop at once."
            )


def list_runs_of(path: str, *, table: str | None = None, run: int | None = None) -> list[dict[str, Any]]:
    """Return the runs that are on record in a database file, latest first; nothing is changed in it.

    Raises:
        EnrichInputError: SQLite cannot read the file.
    """
    try:
        with closing(sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)) as conn:
            return list_runs(conn, table=table, run=run)
    except sqlite3.Error as error:
        raise EnrichInputError(f"The runs in {path!r} cannot be read: {error}") from error


def exit_code(report: EnrichReport) -> int:
    """Return the exit code: 0, 1 if rows failed or could not be written, 130 or 143 after a signal."""
    if report.stopped in EXIT_CODES:
        return EXIT_CODES[report.stopped]
    incomplete = report.failed or report.in_side_file or report.lost
    if report.stopped == "database" or report.stopped in REFUSED_REASONS:
        return EXIT_FAILED_ROWS
    return EXIT_FAILED_ROWS if incomplete else 0


def go_on(report: EnrichReport, arguments: Sequence[str], options: Sequence[tuple[str, str | None]]) -> str:
    """Return the command that goes on where a stopped job ended."""
    words = ["llm", "enrich", *arguments]
    for name, value in options:
        if name == "--limit" or (name == "--where" and report.resume_where is not None):
            continue  # What is left is more than a run was to do.
        words += [name] if value is None else [name, value]
    if report.resume_where is not None:
        words += ["--where", report.resume_where]
    return datasette_command(*words)

"""``python -m benchmarks.batch_kill``: what is lost or sent twice when a job with batches is killed.

Runs the real command, ``datasette llm enrich --batch``, in processes of its own against a provider of batches
in this one; kills it with SIGKILL at random moments (a seed decides) while it submits or collects; runs the
same command again. When a table is complete the next one is begun, and the last one is run to its end.

The provider writes down every prompt that it is to answer, a trigger of the table every value that is written
over another one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from .batch_provider import BatchProvider, Settings
from .killing import MODEL_ID, run_command, write_model
from .launch import own_environment
from .provider import answer_text

if TYPE_CHECKING:
    from pathlib import Path

HOUR = 3_600.0
PATIENCE_SECONDS = 300.0
LOOK_SECONDS = 0.002

_FORKS = multiprocessing.get_context("forkserver")
_LOADED = [
    "datasette.cli",
    "datasette_llm.cli",
    "datasette_llm.facade",
    "datasette_llm.enrich.batches.way",
    "openai",
]


class Table:
    """A table whose values are watched by a trigger."""

    def __init__(self, directory: Path, number: int, rows: int) -> None:
        self.path = directory / f"table{number}.db"
        self.prompts = {key: f"table {number} row {key}" for key in range(1, rows + 1)}
        with closing(sqlite3.connect(self.path)) as database:
            database.execute("create table jobs (id integer primary key, text text, answer text)")
            database.executemany("insert into jobs (id, text) values (?, ?)", self.prompts.items())
            database.execute("create table overwritten (id integer)")
            database.execute(
                "create trigger watch after update of answer on jobs when old.answer is not null "
                "begin insert into overwritten values (old.id); end"
            )
            database.commit()

    def count(self, sql: str) -> int:
        """Return the number that a query gives, 0 where its table is not there yet."""
        with closing(sqlite3.connect(self.path)) as database:
            try:
                return int(database.execute(sql).fetchone()[0])
            except sqlite3.OperationalError:
                return 0

    @property
    def missing(self) -> int:
        """How many rows have no value."""
        return self.count("select count(*) from jobs where answer is null")

    @property
    def wrong(self) -> int:
        """How many rows have another row's answer."""
        with closing(sqlite3.connect(self.path)) as database:
            values = database.execute("select id, answer from jobs where answer is not null").fetchall()
        return sum(value != answer_text(self.prompts[key]) for key, value in values)


@dataclass
class Found:
    """What came of it all."""

    kills: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    runs: int = 0

    def __str__(self) -> str:
        rows = sum(len(table.prompts) for table in self.tables)
        states = {state: self.kills.count(state) for state in sorted(set(self.kills))}
        return "\n".join(
            [
                f"{len(self.kills)} kills in {self.runs} runs, {len(self.tables)} tables, {rows} rows",
                "killed while: " + ", ".join(f"{state} {count}" for state, count in states.items()),
                *(f"{what}: {count}" for what, count in self.figures.items()),
            ]
        )


def enrich(path: Path, size: int, environment: dict[str, str]) -> None:
    """Run the command, in a process that has loaded what it needs."""
    os.environ.update(environment)
    from datasette.cli import cli

    arguments = ["llm", "enrich", str(path), "jobs", "{{ text }}", "--column", "answer", "--model", MODEL_ID]
    cli.main([*arguments, "--batch", "--batch-size", str(size), "--quiet"])


def run(table: Table, llm_directory: Path, size: int, kill_after: float | None) -> tuple[int | None, float]:
    """Run the command, killed so many seconds after it took its lock unless it is done by then.

    Returns:
        its exit status, and the seconds from its lock to its end.
    """
    # Forked from a process that has everything loaded: a start takes longer than what is looked at here.
    process = _FORKS.Process(target=enrich, args=(table.path, size, own_environment(llm_directory)))
    locks = f"{table.path.name}-llm-*.lock"
    for lock in table.path.parent.glob(locks):
        lock.unlink()
    process.start()
    while process.exitcode is None and not any(table.path.parent.glob(locks)):
        time.sleep(LOOK_SECONDS)
    began = time.monotonic()
    process.join(PATIENCE_SECONDS if kill_after is None else kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, time.monotonic() - began


def state_of(table: Table) -> str:
    """Say how far a table was when its process was killed."""
    batches = "select count(*) from _llm_enrich_batches where state = '{}'"
    for state in ("writing", "prepared", "creating"):
        if table.count(batches.format(state)):
            return state
    if table.count(batches.format("collected")) and table.count(batches.format("running")):
        return "collecting"
    return "running" if table.count(batches.format("running")) else "before or after"


def kill_again_and_again(kills: int, rows: int, batch_size: int, seed: int, directory: Path) -> Found:
    """Do it, in this directory."""
    random = Random(seed)
    found = Found()
    llm_directory = directory / "llm"
    llm_directory.mkdir()
    os.environ.update(own_environment(llm_directory))
    _FORKS.set_forkserver_preload(_LOADED)
    with BatchProvider(Settings(seconds=HOUR)).running() as provider:
        write_model(llm_directory, f"{provider.url}/v1")
        # How long it takes.
        _, longest = run(Table(directory, 0, rows), llm_directory, batch_size, None)
        tables = [Table(directory, 1, rows)]
        while len(found.kills) < kills or tables[-1].missing:
            if not tables[-1].missing:
                tables.append(Table(directory, len(tables) + 1, rows))
            table = tables[-1]
            # Batches are done now and then.
            if random.random() < 0.5:
                provider.advance(2 * HOUR)
            moment = random.uniform(0, longest) if len(found.kills) < kills else None
            if moment is None:
                provider.advance(2 * HOUR)
            status, _ = run(table, llm_directory, batch_size, moment)
            found.runs += 1
            if status == -signal.SIGKILL:
                found.kills.append(state_of(table))
                if len(found.kills) % 10 == 0:
                    print(f"{len(found.kills)} kills, {rows - table.missing} of {rows} rows", flush=True)
            elif status:
                found.problems.append(f"exit code {status}")
                break
        judge(found, tables, provider)
    return found


def judge(found: Found, tables: list[Table], provider: BatchProvider) -> None:
    """Note what must not be."""
    twice = {prompt: count for prompt, count in provider.asked.items() if count > 1}
    figures = {
        "rows submitted twice": len(twice),
        "rows written twice": sum(table.count("select count(*) from overwritten") for table in tables),
        "rows lost": sum(table.missing for table in tables),
        "rows with another row's answer": sum(table.wrong for table in tables),
        "rows that failed": sum(table.count("select count(*) from _llm_enrich_errors") for table in tables),
        "rows left in batches": sum(
            table.count("select count(*) from _llm_enrich_batch_rows") for table in tables
        ),
    }
    found.problems += [f"{count} {what}" for what, count in figures.items() if count]
    found.tables, found.figures = tables, figures


if __name__ == "__main__":
    run_command("batch_kill", __doc__, kill_again_and_again, kills=50, rows=1000, batch_size=100, seed=0)
